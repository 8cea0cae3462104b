"""Preference data of audio for latent diffusion: WAV files -> posteriors of the autoencoder, held in memory.

What the cache is to pictures, without its files: a clip of 47 s takes half a megabyte, so some ten thousand pairs fit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..errors import DataError
from ..models.encoders import Encoders
from ..types import Cond
from .audio import read_wav
from .columns import ImageRef, Tally, nothing_left, read_rows, refuse_or_skip
from .spec import DataSpec
from .text import Group, Texts, filled


@dataclass(frozen=True, slots=True)
class _Group(Group):
    """prompt: [T, D] projected text. answers: [2, C, L], mean and std of each clip. durations: [2, D] of each."""

    durations: tuple[np.ndarray, ...]


class Sounds(Texts):
    """``Texts`` whose answers are posteriors; every visit draws from them afresh, as from those of pictures."""

    def __init__(self, groups: list[_Group], seed: int, report: dict):
        super().__init__(groups, 0, report)
        self.seed, self.elements = seed, groups[0].answers[0][0].size
        durations = b"".join(one.tobytes() for group in groups for one in group.durations)
        self.identity = hashlib.sha256(self.identity.encode() + durations).hexdigest()  # silence at the end changes them alone

    def tensors(self, groups: list[_Group], rows: list[tuple[np.ndarray, np.ndarray]], visits: np.ndarray) -> dict:
        mean, std = (torch.from_numpy(np.stack([clip[i] for _, clip in rows])) for i in (0, 1))
        keys = [[group.row, int(visit), k] for group, visit in zip(groups, visits, strict=True) for k in range(self.k)]
        noise = rng.normal(self.seed, "posterior", torch.tensor(keys), tuple(mean.shape[1:]))
        durations = np.stack([one for group in groups for one in filled(group.durations, self.k)])

        def grouped(x: Tensor) -> Tensor:
            return x.unflatten(0, (len(groups), self.k))

        return {"x0": grouped(mean + std * noise),
                "cond": Cond(tokens=torch.from_numpy(np.stack([group.prompt for group in groups])),
                             extra={"durations": grouped(torch.from_numpy(durations))})}


def read_sounds(spec: DataSpec, encoders: Encoders, *, part: str = "train", seed: int = 0) -> Sounds:
    """Reads and encodes a part of the data set. Raises DataError naming the row; skipped rows are in ``report``."""
    tally, groups, prompts, longest = Tally(), [], {}, 0.0
    for row in read_rows(spec, tally, part=part, seed=seed):
        try:
            if row.prompt not in prompts:
                prompts[row.prompt] = _text(encoders, row.prompt, row.where)
            clips = [_encoded(clip, encoders) for clip in row.images]
        except DataError as error:
            refuse_or_skip(spec, tally, error)
            continue
        longest = max(longest, *(seconds for _, _, seconds in clips))
        groups.append(_Group(row=row.id, prompt=prompts[row.prompt], answers=tuple(clip[0] for clip in clips),
                             utility=row.utility, soft=row.soft, durations=tuple(clip[1] for clip in clips)))
    if not groups:
        raise nothing_left(spec, tally, part)
    report = {"layout": tally.layout, "rows": tally.rows, "groups": len(groups), "ties": tally.ties,
              "unlabelled": tally.unlabelled, "bad_rows": tally.bad_rows, "bad": tally.bad, "longest": longest}
    return Sounds(groups, seed, report)


def _text(encoders: Encoders, prompt: str, where: str) -> np.ndarray:
    tokenizer = encoders.pipe.tokenizer
    count = len(tokenizer(prompt, verbose=False)["input_ids"])
    if count > tokenizer.model_max_length:
        raise DataError(f"{where}: the prompt has {count} tokens, and the model's text encoder reads "
                        f"{tokenizer.model_max_length}; shorten it")
    return encoders.encode_prompts([prompt])[0][0].cpu().numpy()


def _encoded(clip: ImageRef, encoders: Encoders) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior [2, C, L], embeddings of start and end [2, D], and the clip's seconds. As the pipeline does, a shorter clip is
    a full one whose end is silent, and the seconds tell where it ends."""
    vae, data = encoders.pipe.vae.config, clip.read()
    try:
        wave = read_wav(data, vae.sampling_rate)
    except DataError as error:
        raise DataError(f"{clip.where}: {error}") from None
    full = encoders.default_resolution  # samples
    seconds = wave.shape[1] / vae.sampling_rate
    if wave.shape[1] > full:
        raise DataError(f"{clip.where}: lasts {seconds:.2f} s, and the model makes {full / vae.sampling_rate:.2f} s at most; "
                        "cut it")
    wave = np.broadcast_to(wave.mean(0), (vae.audio_channels, wave.shape[1])) if len(wave) != vae.audio_channels else wave
    padded = np.zeros((1, vae.audio_channels, full), np.float32)
    padded[0, :, :wave.shape[1]] = wave
    posterior = encoders.encode_images(torch.from_numpy(padded))
    with torch.no_grad():
        durations = encoders.pipe.encode_duration(0.0, seconds, encoders.device, False, 1)
    return (torch.cat(posterior).cpu().numpy(), torch.cat(durations, 1)[0].float().cpu().numpy(), seconds)
