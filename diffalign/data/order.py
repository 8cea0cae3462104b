"""The data order: a pure function of (seed, step). Nothing to save, nothing to skip on resume.

Every step takes exactly G groups of one bucket. A bucket is an endless stream of keyed permutations of its rows (visit e is
the e-th permutation), read on from where the bucket's last step ended, so there is no remainder and no row comes twice in
a visit. The bucket of a step is the one furthest behind its share of the rows. Processes and micro-batches only cut the
step's list into consecutive pieces: the order depends on neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .. import rng

BLOCK = 1024  # steps whose buckets are worked out together


@dataclass(frozen=True, slots=True)
class Place:
    """What one step reads. bucket: index; rows: [G] int64, positions inside the bucket; visits, places: [G] int64; a place is
    the group's number in the run, over all buckets."""

    bucket: int
    rows: np.ndarray
    visits: np.ndarray
    places: np.ndarray

    def part(self, rank: int, world: int) -> Place:
        """This process's consecutive share."""
        size = len(self.rows) // world
        return self._cut(rank * size, size)

    def micro_batches(self, count: int) -> list[Place]:
        """``count`` consecutive pieces of equal size."""
        size = len(self.rows) // count
        return [self._cut(i * size, size) for i in range(count)]

    def _cut(self, start: int, size: int) -> Place:
        part = slice(start, start + size)
        return Place(self.bucket, self.rows[part], self.visits[part], self.places[part])


class Order:
    """sizes: rows in each bucket. groups_per_step: G = train_batch_size * gradient_accumulation_steps * world."""

    def __init__(self, sizes: Sequence[int], *, seed: int, groups_per_step: int):
        if not sum(sizes):
            raise ValueError("the order of an empty data set")
        self.sizes, self.seed, self.groups_per_step = [int(n) for n in sizes], seed, groups_per_step
        # memos, not a state. Steps that each bucket had before a block; two blocks; of each bucket this visit and the next
        self._taken = {0: [0] * len(self.sizes)}
        self._block = lru_cache(maxsize=2)(self._block)
        self._permutation = lru_cache(maxsize=2 * len(self.sizes))(self._permutation)

    def at(self, step: int) -> Place:
        """The groups of one step, all of one bucket; any step may be asked for at any time."""
        bucket, before = self._bucket(step)
        n = self.sizes[bucket]
        position = before * self.groups_per_step + np.arange(self.groups_per_step, dtype=np.int64)
        visits, inside = position // n, position % n
        rows = np.empty_like(position)
        for visit in np.unique(visits):
            here = visits == visit
            rows[here] = self._permutation(bucket, int(visit))[inside[here]]
        return Place(bucket, rows, visits, step * self.groups_per_step + np.arange(self.groups_per_step, dtype=np.int64))

    def _bucket(self, step: int) -> tuple[int, int]:
        """Whose turn it is, and how many steps that bucket had before."""
        for number in range(len(self._taken) - 1, step // BLOCK):
            self._block(number)
        return self._block(step // BLOCK)[step % BLOCK]

    def _block(self, number: int) -> list[tuple[int, int]]:
        """``_bucket`` of BLOCK steps; those before have been asked for."""
        total, taken, steps = sum(self.sizes), list(self._taken[number]), []
        for due in range(number * BLOCK + 1, (number + 1) * BLOCK + 1):
            deficit = [due * n - had * total for n, had in zip(self.sizes, taken, strict=True)]
            bucket = max(range(len(deficit)), key=lambda i: (deficit[i], -i))
            steps.append((bucket, taken[bucket]))
            taken[bucket] += 1
        self._taken[number + 1] = taken
        return steps

    def _permutation(self, bucket: int, visit: int) -> np.ndarray:
        """As ``rng.permutation``, in half the memory: the same swaps of smaller numbers."""
        n = self.sizes[bucket]
        rows = np.arange(n, dtype=np.int32 if n <= 1 << 31 else np.int64)
        rng.generator(self.seed, "order", bucket, visit).shuffle(rows)
        return rows
