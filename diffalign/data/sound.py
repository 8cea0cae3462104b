"""Preference data of audio for latent diffusion: WAV files -> posteriors of the autoencoder, held in memory.

What the cache is to pictures, without its files: a clip of 47 s takes half a megabyte, so some ten thousand pairs fit.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..errors import DataError
from ..models.encoders import Encoders
from ..models.sound import Arrays
from ..types import Cond
from .audio import read_wav
from .columns import ImageRef, Row, Tally, nothing_left, read_rows, refuse_or_skip
from .spec import DataSpec
from .text import Group, Texts, filled


@dataclass(frozen=True, slots=True)
class _Group(Group):
    """prompt: [T, D] text states. answers: [2, *S], mean and std of each clip. told: of all clips; timing: of each."""

    told: Arrays
    timing: tuple[Arrays, ...]


class Sounds(Texts):
    """``Texts`` whose answers are posteriors; every visit draws from them afresh, as from those of pictures. A bucket
    (``members``) holds the groups whose latents have one shape, one after another. elements: numbers of a latent, of the
    fullest bucket.
    """

    def __init__(self, groups: list[_Group], seed: int, report: dict):
        super().__init__(groups, 0, report)
        self.seed, buckets = seed, defaultdict(list)
        for group in groups:
            buckets[group.answers[0].shape].append(group)
        self._groups = [group for bucket in buckets.values() for group in bucket]
        ends = [0, *accumulate(map(len, buckets.values()))]
        self.members = [range(start, end) for start, end in pairwise(ends)]
        self.elements = self._groups[max(self.members, key=len).start].answers[0][0].size
        self.identity = _identity(self.identity, groups)

    def tensors(self, groups: list[_Group], rows: list[tuple[np.ndarray, np.ndarray]], visits: np.ndarray) -> dict:
        mean, std = (torch.from_numpy(np.stack([clip[i] for _, clip in rows])) for i in (0, 1))
        keys = [[group.row, int(visit), k] for group, visit in zip(groups, visits, strict=True) for k in range(self.k)]
        noise = rng.normal(self.seed, "posterior", torch.tensor(keys), tuple(mean.shape[1:]))
        extras = [{**group.told, **timing} for group in groups for timing in filled(group.timing, self.k)]

        def grouped(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(groups), self.k))

        return {"x0": grouped(mean + std * noise),
                "cond": Cond(tokens=_padded([group.prompt for group in groups]),
                             extra={name: grouped(_padded([extra[name] for extra in extras])) for name in extras[0]})}


def _identity(known: str, groups: list[_Group]) -> str:
    """known: that of captions, latents and labels. Silence at the end of a clip, or other lyrics, change the rest alone."""
    total, digests = hashlib.sha256(known.encode()), {}
    for group in groups:
        for arrays in (group.told, *group.timing):
            for name, one in sorted(arrays.items()):
                if id(one) not in digests:  # many groups share an array
                    digests[id(one)] = hashlib.sha256(np.ascontiguousarray(one)).digest()
                total.update(name.encode() + digests[id(one)])
    return total.hexdigest()


def _padded(arrays: list[np.ndarray]) -> Tensor:
    """[n, longest, ...]: zeros behind those that are shorter."""
    longest = max(len(one) for one in arrays)
    return torch.from_numpy(np.stack([np.pad(one, [(0, longest - len(one))] + [(0, 0)] * (one.ndim - 1)) for one in arrays]))


def read_sounds(spec: DataSpec, encoders: Encoders, *, part: str = "train", seed: int = 0) -> Sounds:
    """Reads and encodes a part of the data set. Raises DataError naming the row; skipped rows are in ``report``."""
    tally, groups, told, longest = Tally(), [], {}, 0.0
    for row in read_rows(spec, tally, part=part, seed=seed, notes=encoders.adapter.notes):
        try:
            group, seconds = _encoded(row, encoders, told)
        except DataError as error:
            refuse_or_skip(spec, tally, error)
            continue
        groups.append(group)
        longest = max(longest, seconds)
    if not groups:
        raise nothing_left(spec, tally, part)
    report = {"layout": tally.layout, "rows": tally.rows, "groups": len(groups), "ties": tally.ties,
              "unlabelled": tally.unlabelled, "bad_rows": tally.bad_rows, "bad": tally.bad, "longest": longest}
    return Sounds(groups, seed, report)


def _encoded(row: Row, encoders: Encoders, told: dict) -> tuple[_Group, float]:
    """The group, and the seconds of its longest clip. told: what was made before, of texts and of lengths."""
    adapter, facts = encoders.adapter, encoders.adapter.clips(encoders.pipe)
    waves = [_wave(clip, encoders) for clip in row.images]
    lengths = sorted({facts.padded(wave.shape[1]) for wave in waves})
    if len(lengths) > 1:
        raise DataError(f"{row.where}: its clips last {lengths[0] / facts.rate:.2f} s and {lengths[-1] / facts.rate:.2f} s, "
                        "and clips of one length are compared; cut them to the same")
    key = (row.prompt, tuple(sorted(row.notes.items())), lengths[0])
    if key not in told:
        try:
            told[key] = adapter.told(encoders, row.prompt, row.notes, lengths[0])
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None
    if lengths[0] not in told:
        told[lengths[0]] = adapter.beside(encoders, lengths[0])
    prompt, arrays = told[key]
    group = _Group(row=row.id, prompt=prompt, utility=row.utility, soft=row.soft, told={**arrays, **told[lengths[0]]},
                   answers=tuple(_posterior(wave, lengths[0], encoders) for wave in waves),
                   timing=tuple(adapter.timing(encoders, wave.shape[1]) for wave in waves))
    return group, max(wave.shape[1] for wave in waves) / facts.rate


def _wave(clip: ImageRef, encoders: Encoders) -> np.ndarray:
    """[channels, samples], as many channels as the model reads: others are mixed to one, and that is repeated."""
    facts, data = encoders.adapter.clips(encoders.pipe), clip.read()
    try:
        wave = read_wav(data, facts.rate)
    except DataError as error:
        raise DataError(f"{clip.where}: {error}") from None
    if wave.shape[1] > facts.longest:
        raise DataError(f"{clip.where}: lasts {wave.shape[1] / facts.rate:.2f} s, and the model makes "
                        f"{facts.longest / facts.rate:.2f} s at most; cut it")
    return wave if len(wave) == facts.channels else np.broadcast_to(wave.mean(0), (facts.channels, wave.shape[1]))


def _posterior(wave: np.ndarray, samples: int, encoders: Encoders) -> np.ndarray:
    """[2, *S], mean and std, of the clip with silence up to ``samples``."""
    padded = np.zeros((1, len(wave), samples), np.float32)
    padded[0, :, :wave.shape[1]] = wave
    return torch.cat(encoders.adapter.posterior(encoders, torch.from_numpy(padded))).cpu().numpy()
