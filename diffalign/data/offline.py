"""Batches from the cache: a pure function of (seed, step), without a model, without a data loader to keep in step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from .. import rng
from ..types import Batch, Cond
from .cache import Cache, Group
from .order import Order, Place
from .reference import ReferenceErrors
from .text import Texts


class Offline:
    """A source of groups that lie on disk. identity: hash of the data, written into checkpoints.

    k: candidates per group (smaller groups are padded with ``valid=False``). groups: groups in the data set. elements:
    latent numbers per candidate (of the fullest bucket), or tokens of a mean answer. soft: whether batches carry soft labels.
    A step takes train_batch_size * gradient_accumulation_steps * world groups. reference: the frozen reference's errors of the
    whole run, measured beforehand, which the batches then bring; may be set until the first step is taken.
    """

    def __init__(self, cache: Cache | Texts, *, seed: int, train_batch_size: int, gradient_accumulation_steps: int = 1,
                 rank: int = 0, world: int = 1, caption_dropout: float = 0.0, random_flip: bool = False,
                 prefetch: bool = True):
        if random_flip and not cache.mirrored:
            raise ValueError("random_flip needs a cache that was built with it")
        self.cache, self.rank, self.world, self.micro_batches = cache, rank, world, gradient_accumulation_steps
        self.order = Order([len(members) for members in cache.members], seed=seed,
                           groups_per_step=train_batch_size * gradient_accumulation_steps * world)
        self._assemble = cache if isinstance(cache, Texts) else _Assembler(cache, seed, caption_dropout, random_flip)
        self.reference: ReferenceErrors | None = None
        self.identity, self.k, self.soft, self.groups = cache.identity, cache.k, cache.soft, len(cache)
        self.elements = cache.elements
        self._ahead: tuple[int, Future] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None

    def take(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step, on the CPU. The next step is read meanwhile; as every batch is a function
        of its step, that changes nothing. Raises DataError when a cache file turns out to be damaged."""
        if self._thread is None:
            return self._read(step)
        ahead, self._ahead = self._ahead, None
        batches = (ahead[1] if ahead and ahead[0] == step else self._thread.submit(self._read, step)).result()
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        return batches

    def prompts(self, step: int) -> list[list[str]]:
        """The prompts of ``take(step)``, by micro-batch."""
        place = self.order.at(step).part(self.rank, self.world)
        start = self.cache.members[place.bucket].start
        return [[self.cache.prompt(self.cache.group(int(i)).prompt) for i in start + micro.rows]
                for micro in place.micro_batches(self.micro_batches)]

    def unconditional(self) -> Cond:
        """One row: the embedding of no prompt, without sizes."""
        tokens, pooled = self.cache.unconditional()
        return Cond(tokens=_stacked([tokens]), pooled=None if pooled is None else _stacked([pooled]))

    def boundary(self, step: int) -> bool:
        """A checkpoint is exact after every step."""
        return True

    def _read(self, step: int) -> list[Batch]:
        place = self.order.at(step).part(self.rank, self.world)
        return [self._batch(micro) for micro in place.micro_batches(self.micro_batches)]

    def _batch(self, place: Place) -> Batch:
        batch = self._assemble(self.cache.members[place.bucket].start + place.rows, place.visits, place.places)
        if self.reference is None:
            return batch
        return replace(batch, reference_error=self.reference.read(place.places, batch.key))


class _FixedBatches(Sequence):
    """Batches made when asked for: a held-out set need not fit into memory, nor a list of its batches."""

    def __init__(self, assemble, members: Sequence[Sequence[int]], size: int, draws: int):
        self._assemble, self._members, self._size, self._draws = assemble, members, size, draws
        self._ends = list(accumulate(-(-len(bucket) // size) for bucket in members))  # of the buckets, in batches of a visit

    def __len__(self) -> int:
        return self._ends[-1] * self._draws

    def __getitem__(self, i):
        return [self._at(j) for j in range(len(self))[i]] if isinstance(i, slice) else self._at(range(len(self))[i])

    def _at(self, number: int) -> Batch:
        visit, number = divmod(number, self._ends[-1])
        bucket = bisect_right(self._ends, number)
        start = (number - (self._ends[bucket - 1] if bucket else 0)) * self._size
        groups = self._members[bucket][start:start + self._size]
        return self._assemble(groups, np.full(len(groups), visit, dtype=np.int64))


def fixed_batches(cache: Cache | Texts, batch_size: int, draws: int = 1, *, seed: int = 0) -> Sequence[Batch]:
    """Every group once for each of ``draws`` visits (0, 1, ...), never flipped, no caption dropped: the same batches and keys
    whenever they are asked for. A batch holds groups of one bucket and one visit; the last of a bucket may be smaller."""
    return _FixedBatches(cache if isinstance(cache, Texts) else _Assembler(cache, seed, 0.0, False), cache.members, batch_size,
                         draws)


class _Assembler:
    """(groups, visits) -> Batch. Latents are drawn afresh from the posterior at every visit: mean + std * keyed normal."""

    def __init__(self, cache: Cache, seed: int, caption_dropout: float, random_flip: bool):
        self.cache, self.seed, self.caption_dropout, self.random_flip = cache, seed, caption_dropout, random_flip

    def __call__(self, numbers: np.ndarray, visits: np.ndarray, places: np.ndarray | None = None) -> Batch:
        groups = [self.cache.group(int(i)) for i in numbers]
        key = torch.tensor([[group.row, int(visit)] for group, visit in zip(groups, visits, strict=True)], dtype=torch.int64)
        flip = self._happens("flip", key, 0.5 * self.random_flip)
        drop = self._happens("caption_dropout", key, self.caption_dropout)
        return Batch(x0=self._x0(groups, key, flip), cond=self._cond(groups, flip, drop), key=key,
                     utility=_padded([group.utility for group in groups], self.cache.k),
                     valid=_padded([[1.0] * len(group.images) for group in groups], self.cache.k) > 0,
                     soft=self._soft(groups), place=None if places is None else torch.from_numpy(places))

    def _happens(self, purpose: str, key: torch.Tensor, share: float) -> list[bool]:
        """Per group, the same for all its candidates."""
        return (rng.uniform(self.seed, purpose, key) < share).tolist() if share else [False] * len(key)

    def _x0(self, groups: list[Group], key: torch.Tensor, flip: list[bool]) -> torch.Tensor:
        shape = self.cache.latent(groups[0].images[0])[0].shape
        x0 = np.zeros((len(groups), self.cache.k, *shape), dtype=np.float32)
        for b, group in enumerate(groups):
            candidate = torch.arange(len(group.images))[:, None]
            noise = rng.normal(self.seed, "posterior", torch.cat([key[b].expand(len(candidate), 2), candidate], dim=1), shape)
            for k, image in enumerate(group.images):
                mean, std = self.cache.latent(image, flip[b])
                x0[b, k] = mean.astype(np.float32) + std.astype(np.float32) * noise[k].numpy()
        return torch.from_numpy(x0)

    def _cond(self, groups: list[Group], flip: list[bool], drop: list[bool]) -> Cond:
        texts = [self.cache.unconditional() if dropped else self.cache.text(group.prompt)
                 for group, dropped in zip(groups, drop, strict=True)]
        tokens, pooled = zip(*texts, strict=True)
        extra = {"time_ids": self._time_ids(groups, flip)} if self.cache.family == "sdxl" else {}
        return Cond(tokens=_stacked(tokens), pooled=None if pooled[0] is None else _stacked(pooled), extra=extra)

    def _time_ids(self, groups: list[Group], flip: list[bool]) -> torch.Tensor:
        """[B, K, 6] float32, pixels: (original height, width, crop top, left, target height, width), each picture's own."""
        ids = torch.zeros(len(groups), self.cache.k, 6)
        for b, group in enumerate(groups):
            for k, image in enumerate(group.images):
                height, width, top, left, left_flipped = self.cache.size(image)
                ids[b, k] = torch.tensor([height, width, top, left_flipped if flip[b] else left,
                                          *self.cache.buckets[group.bucket]], dtype=torch.float32)
        return ids

    def _soft(self, groups: list[Group]) -> torch.Tensor | None:
        """[B]: hard labels are certain. None for a data set without any soft label."""
        if not self.cache.soft:
            return None
        return torch.tensor([1.0 if group.soft is None else group.soft for group in groups], dtype=torch.float32)


def _padded(rows: Sequence[Sequence[float]], k: int) -> torch.Tensor:
    """[B, K] float32, zeros where a group has fewer candidates."""
    padded = torch.zeros(len(rows), k)
    for row, values in zip(padded, rows, strict=True):
        row[:len(values)] = torch.tensor(values)
    return padded


def _stacked(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False))
