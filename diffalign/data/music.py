"""Preference data of token music: prompts -> text states, clips -> codec tokens, held in memory; what ``Texts`` is to text.

A candidate is a WAV file, which the model's own codec encodes, or its codes as they are, [codebooks][frames]. Samples of the
policy belong into a table as codes: a codec does not give back the codes that it was fed, so the likelihood of an encoded
sample is not that of the sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DataError
from .audio import read_wav
from .columns import ImageRef, Row, Tally, nothing_left, read_rows, refuse_or_skip
from .spec import DataSpec
from .text import Group, Texts

if TYPE_CHECKING:  # it imports transformers' models
    from ..models.musicgen import Inputs


class Clips(Texts):
    """``Texts`` whose answers are [C, T] codes and whose prompts are states [L, D]. elements: mean codes of a clip."""

    def __init__(self, groups: list[Group], start_id: int, report: dict):
        super().__init__(groups, start_id, report)
        sizes = [answer.size for group in groups for answer in group.answers]
        self.elements = round(sum(sizes) / len(sizes))

    def tensors(self, groups: list[Group], rows: list[tuple[np.ndarray, np.ndarray]], visits: np.ndarray) -> dict:
        from ..models.musicgen import padded_states

        codebooks = len(rows[0][1])
        x0 = np.full((len(rows), codebooks, max(codes.shape[1] for _, codes in rows)), self.end_id, dtype=np.int64)
        for i, (_, codes) in enumerate(rows):
            x0[i, :, :codes.shape[1]] = codes
        return {"x0": torch.from_numpy(x0).unflatten(0, (len(groups), self.k)),
                "cond": padded_states([group.prompt for group in groups], self.k)}


def read_clips(spec: DataSpec, inputs: Inputs, *, part: str = "train", seed: int = 0) -> Clips:
    """Reads and encodes a part of the data set. Raises DataError naming the row; skipped rows are in ``report``."""
    tally, groups, states, frames = Tally(), [], {}, []
    for row in read_rows(spec, tally, part=part, seed=seed, candidates="clips"):
        try:
            groups.append(_encoded(row, inputs, states))
        except DataError as error:
            refuse_or_skip(spec, tally, error)
            continue
        frames += [codes.shape[1] for codes in groups[-1].answers]
    if not groups:
        raise nothing_left(spec, tally, part)
    report = {"layout": tally.layout, "rows": tally.rows, "groups": len(groups), "ties": tally.ties,
              "unlabelled": tally.unlabelled, "bad_rows": tally.bad_rows, "bad": tally.bad,
              "tokens": inputs.codebooks * sum(frames), "longest": max(frames)}
    return Clips(groups, inputs.words, report)


def _encoded(row: Row, inputs: Inputs, states: dict[str, np.ndarray]) -> Group:
    try:
        if row.prompt not in states:
            states[row.prompt] = inputs.states(row.prompt)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None
    return Group(row=row.id, prompt=states[row.prompt], answers=tuple(_codes(clip, row, inputs) for clip in row.images),
                 utility=row.utility, soft=row.soft)


def _codes(clip: ImageRef | np.ndarray, row: Row, inputs: Inputs) -> np.ndarray:
    where, data = (row.where, None) if isinstance(clip, np.ndarray) else (clip.where, clip.read())
    try:
        return inputs.checked(clip) if data is None else inputs.encode(read_wav(data, inputs.rate).mean(0))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
