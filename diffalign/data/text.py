"""Preference data of text: prompts and answers -> token ids, held in memory; what ``Cache`` is to pictures.

Rows are read by ``columns``: prompt, chosen, rejected; or prompt, completions, scores (or ranks); or prompt, completion,
label.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DataError
from ..types import Batch, Cond
from .columns import Row, Tally, nothing_left, read_rows, refuse_or_skip
from .spec import DataSpec

if TYPE_CHECKING:  # it imports transformers' models
    from ..models.masked_lm import Tokens


@dataclass(frozen=True, slots=True)
class Group:
    """row: its number in the data set. prompt: its token ids. answers: token ids of each candidate, its end token included."""

    row: int
    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    utility: tuple[float, ...]
    soft: float | None


class Texts:
    """Tokenised groups. Calling it with their numbers and visits gives a batch, whatever the visit: text is read as it is.

    identity: hash of all that training reads. k: largest group. soft: whether any group has a soft label. elements: mean
    tokens of an answer. report: counts of the reading, for people.
    """

    def __init__(self, groups: list[Group], end_id: int, report: dict):
        self._groups, self.end_id, self.report = groups, end_id, report
        self.members = [range(len(groups))]
        self.k = max(len(group.answers) for group in groups)
        self.soft = any(group.soft is not None for group in groups)
        lengths = [len(answer) for group in groups for answer in group.answers]
        self.elements = round(sum(lengths) / len(lengths))
        self.identity = _identity(groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __call__(self, numbers: np.ndarray, visits: np.ndarray, places: np.ndarray | None = None) -> Batch:
        groups = [self._groups[int(i)] for i in numbers]
        # a group with fewer candidates is filled up with its first, marked as not valid
        rows = [(group.prompt, answer) for group in groups for answer in filled(group.answers, self.k)]
        return Batch(**self.tensors(groups, rows, visits),
                     utility=torch.tensor([filled(group.utility, self.k) for group in groups]),
                     valid=torch.tensor([[i < len(group.answers) for i in range(self.k)] for group in groups]),
                     key=torch.tensor([[group.row, int(visit)] for group, visit in zip(groups, visits, strict=True)],
                                      dtype=torch.int64),
                     soft=self._soft(groups), place=None if places is None else torch.from_numpy(places))

    def tensors(self, groups: list[Group], rows: list[tuple[np.ndarray, np.ndarray]], visits: np.ndarray) -> dict:
        """x0 and cond of a batch. rows: prompt and answer of every candidate, those of a group one after the other."""
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        x0 = np.full((len(rows), length), self.end_id, dtype=np.int64)
        answers, attended = np.zeros_like(x0, dtype=bool), np.zeros_like(x0, dtype=bool)
        for i, (prompt, answer) in enumerate(rows):
            begin, end = len(prompt), len(prompt) + len(answer)
            x0[i, :begin], x0[i, begin:end], answers[i, begin:end], attended[i, :end] = prompt, answer, True, True

        def grouped(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x).view(len(groups), self.k, length)

        return {"x0": grouped(x0), "cond": Cond(extra={"answer": grouped(answers), "attended": grouped(attended)})}

    def _soft(self, groups: list[Group]) -> torch.Tensor | None:
        """[B]: hard labels are certain. None for a data set without any soft label."""
        return torch.tensor([1.0 if group.soft is None else group.soft for group in groups]) if self.soft else None


def read_texts(spec: DataSpec, tokens: Tokens, *, part: str = "train", seed: int = 0) -> Texts:
    """Reads and tokenises a part of the data set. Raises DataError naming the row; skipped rows are in ``report``."""
    tally, groups, lengths = Tally(), [], Counter()
    for row in read_rows(spec, tally, part=part, seed=seed, candidates="texts"):
        try:
            group = _tokenised(row, tokens, spec.max_tokens or tokens.longest)
        except DataError as error:
            refuse_or_skip(spec, tally, error)
            continue
        groups.append(group)
        lengths.update(len(group.prompt) + len(answer) for answer in group.answers)
    if not groups:
        raise nothing_left(spec, tally, part)
    report = {"layout": tally.layout, "rows": tally.rows, "groups": len(groups), "ties": tally.ties,
              "unlabelled": tally.unlabelled, "bad_rows": tally.bad_rows, "bad": tally.bad,
              "tokens": sum(n * times for n, times in lengths.items()), "longest": max(lengths)}
    return Texts(groups, tokens.end_id, report)


def _tokenised(row: Row, tokens: Tokens, longest: int) -> Group:
    try:
        prompt, answers = tokens.prompt(row.prompt), [tokens.answer(text) for text in row.images]
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None
    for ids in answers:
        if len(prompt) + len(ids) > longest:
            raise DataError(f"{row.where}: prompt ({len(prompt)} tokens) and answer ({len(ids)}) are longer than the "
                            f"{longest} tokens that are read (data.max_tokens, or the model's limit)")
    return Group(row=row.id, prompt=np.asarray(prompt, np.int32), utility=row.utility, soft=row.soft,
                  answers=tuple(np.asarray(ids, np.int32) for ids in answers))


def filled(items: tuple, k: int) -> tuple:
    return (*items, *[items[0]] * (k - len(items)))


def _identity(groups: list[Group]) -> str:
    total = hashlib.sha256()
    for group in groups:
        total.update(f"{group.row} {group.utility} {group.soft} {len(group.prompt)}".encode() + group.prompt.tobytes())
        for answer in group.answers:
            total.update(f" {len(answer)} ".encode() + answer.tobytes())
    return total.hexdigest()
