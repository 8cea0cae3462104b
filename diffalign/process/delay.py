"""The delay pattern of MusicGen: codebook k (from 0) runs k columns behind the first, so that one column is one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Delay:
    """Codes [N, C, T] -> columns [N, C, T + C]: codebook k's codes at k+1 .. k+T, ``start_id`` everywhere else (MusicGen,
    arXiv 2306.05284, section 2.1; the layout of transformers' ``build_delay_pattern_mask`` with max_length T + C).

    Codes of shorter clips are filled up with ``start_id`` at their end, and stay apart from it: it is no code. Given all
    earlier columns the C codes of a column are independent, so that the sum of their log-probabilities is exact.
    """

    codebooks: int
    start_id: int

    def __call__(self, codes: Tensor) -> Tensor:
        n, c, length = codes.shape
        columns = codes.new_full((n, c, length + c), self.start_id)
        for k in range(c):
            columns[:, k, k + 1:k + 1 + length] = codes[:, k]
        return columns

    def undo(self, columns: Tensor) -> Tensor:
        """[N, C, T + C] -> [N, C, T]."""
        c, length = columns.shape[1], columns.shape[2] - columns.shape[1]
        return torch.stack([columns[:, k, k + 1:k + 1 + length] for k in range(c)], dim=1)
