"""Keyed randomness: every random number is a pure function of (seed, purpose, key). There is no RNG state to lose.

``purpose`` is a word ("noise", "time", "posterior", ...); a key is a tuple of integers, usually (row, visit, draw).
A counter-based generator (Philox) is seeded with a 128-bit hash, on the CPU, so values don't depend on the device, the
batch an item came in or the number of processes.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def _digest(seed: int, purpose: str, key: tuple[int, ...]) -> bytes:
    text = f"{int(seed)}|{purpose}|{','.join(str(int(part)) for part in key)}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A fresh numpy generator for this key."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, purpose, key), "little")))


def integer(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit integer, to seed somebody else's generator with."""
    return int.from_bytes(_digest(seed, purpose, key)[:8], "little") >> 1


def normal(seed: int, purpose: str, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """keys: [N, J] int64 -> [N, *shape] float32, unit normal, on the CPU."""
    rows = [generator(seed, purpose, *key).standard_normal(shape, dtype=np.float32) for key in keys.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, *shape)


def uniform(seed: int, purpose: str, keys: Tensor) -> Tensor:
    """keys: [N, J] int64 -> [N] float64 in [0, 1), on the CPU."""
    words = [int.from_bytes(_digest(seed, purpose, tuple(key))[:8], "little") >> 11 for key in keys.tolist()]
    return torch.tensor(words, dtype=torch.float64) * 2.0**-53


def permutation(n: int, seed: int, purpose: str, *key: int) -> np.ndarray:
    """A permutation of range(n), int64."""
    return generator(seed, purpose, *key).permutation(n)
