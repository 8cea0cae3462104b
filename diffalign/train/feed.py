"""Batches from a source, optionally one step ahead of the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..types import Batch, pinned


class Source(Protocol):
    """take(step): this rank's micro-batches, CPU tensors, the same number on every rank; offline a pure function of step.

    boundary(step): True when a checkpoint after ``step`` steps is exact. identity: hash of the data, verified on resume.
    pure: False for a source that draws with the policy's weights; its steps are then never read ahead.
    """

    identity: str

    def take(self, step: int) -> list[Batch]: ...

    def boundary(self, step: int) -> bool: ...


class Feed:
    """take(step) -> micro-batches. ahead: fetch the next step in a thread meanwhile, for sources that are pure functions
    of the step. On CUDA the tensors are pinned, so that copying them need not wait."""

    def __init__(self, source: Source, device: torch.device, ahead: bool, last: int):
        self.source, self.pin, self.last = source, device.type == "cuda", last
        ahead = ahead and getattr(source, "pure", True)
        self.pool = ThreadPoolExecutor(1, "feed") if ahead else None
        self._next: tuple[int, Future] | None = None

    def take(self, step: int) -> list[Batch]:
        ready = self._next[1].result() if self._next and self._next[0] == step else self._read(step)
        self._next = None
        if self.pool is not None and step + 1 < self.last:
            self._next = (step + 1, self.pool.submit(self._read, step + 1))
        return ready

    def peek(self, step: int) -> list[Batch]:
        """As ``take``, which then hands out the same ones: nothing is drawn by a model, or read, twice."""
        micros, there = self._read(step), Future()
        there.set_result(micros)
        self._next = step, there
        return micros

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> list[Batch]:
        micros = self.source.take(step)
        return [_pinned(batch) for batch in micros] if self.pin else micros


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Without waiting. Key and place stay on the CPU, where the noise is drawn, and the labels can be read there, which tell
    who is compared: reading them back would stop the device."""
    return replace(batch.to(device), key=batch.key, place=batch.place, host=batch)


def _pinned(value):
    if isinstance(value, Tensor):
        return pinned(value)
    if isinstance(value, dict):
        return {name: _pinned(item) for name, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _pinned(getattr(value, f.name)) for f in fields(value)})
    return value
