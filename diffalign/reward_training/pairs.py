"""Preference rows as labelled pairs of picture numbers: every pair of a group, each with a probability and a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .. import rng
from ..data.columns import ImageRef, Row, Tally, normalised, nothing_left, read_rows, refuse_or_skip
from ..data.images import decode
from ..data.spec import DataSpec
from ..errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """P pairs. pictures, prompts: what they count in; first, second, prompt [P] int64. target [P]: probability that the first
    is preferred, 0.5 a tie. weight [P]: 1 / number of the group's pairs. users: P names or None.
    """

    pictures: list[ImageRef]
    prompts: list[str]
    first: np.ndarray
    second: np.ndarray
    prompt: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    users: list[str | None]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, kept: np.ndarray) -> Pairs:
        """The pairs that the mask or index picks; pictures and prompts keep their numbers."""
        index = np.arange(len(self))[kept]
        return replace(self, first=self.first[index], second=self.second[index], prompt=self.prompt[index],
                       target=self.target[index], weight=self.weight[index], users=[self.users[i] for i in index])

    @property
    def ties(self) -> int:
        return int((self.target == 0.5).sum())


def read_pairs(spec: DataSpec, tally: Tally, *, part: str, seed: int) -> Pairs:
    """All pairs of one part of a data set; no picture is decoded. Raises DataError for rows of one picture, and for none."""
    pictures: dict[object, int] = {}  # by path or content: a session's best picture returns in many pairs
    refs: list[ImageRef] = []
    prompts: dict[str, int] = {}
    rows: list[tuple] = []
    for row in read_rows(spec, tally, part=part, seed=seed):
        if len(row.images) < 2:
            raise DataError(f"{row.where}: one picture; a reward learns from pairs or ranked groups")
        number, places = prompts.setdefault(row.prompt, len(prompts)), []
        for image in row.images:
            places.append(pictures.setdefault(image.data if image.path is None else image.path, len(pictures)))
            refs += [image] if places[-1] == len(refs) else []
        found = list(_labels(row, spec))
        rows += [(places[i], places[j], number, target, 1 / len(found), row.user) for i, j, target in found]
    if not rows:
        raise nothing_left(spec, tally, part)
    first, second, prompt, target, weight, users = zip(*rows, strict=True)
    return Pairs(pictures=refs, prompts=list(prompts), first=np.array(first), second=np.array(second),
                 prompt=np.array(prompt), target=np.array(target, np.float64), weight=np.array(weight), users=list(users))


def _labels(row: Row, spec: DataSpec) -> Iterator[tuple[int, int, float]]:
    """(first, second, target) of each pair of the group. The sides of a pair with a soft label stay as they are."""
    for i, j in itertools.combinations(range(len(row.images)), 2):
        if row.utility[i] == row.utility[j]:
            if spec.ties == "soft":
                yield i, j, 0.5
            continue
        sure = 1.0 if row.soft is None else row.soft
        yield i, j, sure if row.utility[i] > row.utility[j] else 1 - sure


def decoded(pictures: Sequence[ImageRef], spec: DataSpec, tally: Tally) -> Iterator[Image.Image | None]:
    """Each picture in order; None for a broken one where data.bad_rows=skip, else DataError."""
    for picture in pictures:
        try:
            yield decode(picture.read(), picture.where, spec.max_pixels)
        except DataError as error:
            refuse_or_skip(spec, tally, error)
            yield None


def set_apart(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """(training, stopping): a keyed ``share`` of the prompts, equal but for case and spaces on one side."""
    apart = np.array([_draw(prompt, seed) < share for prompt in pairs.prompts], bool)[pairs.prompt]
    return pairs.take(~apart), pairs.take(apart)


def _draw(prompt: str, seed: int) -> float:
    words = normalised(prompt).encode()
    return rng.generator(seed, "reward_stop", int.from_bytes(words, "big")).random()


def balanced(groups: Sequence, weight: np.ndarray | None = None) -> np.ndarray:
    """Weights [P] with mean 1 under which every group (user, prompt) has the same sum, over the whole data set and not inside
    a batch, where they would depend on who else is in it. weight [P]: shares inside a group; all alike if None.
    """
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    weight = np.ones(len(number)) if weight is None else weight
    share = weight / np.bincount(number, weight)[number]
    return share * len(share) / share.sum()
