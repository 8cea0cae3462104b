"""Processes of one run: rank, sums, texts, agreement; tensors that they hold in parts.

``Single`` is the one-process twin with the same interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError


class World(Protocol):
    """rank: 0 .. size-1. Every method is collective: all ranks call it, in the same order."""

    rank: int
    size: int

    def sum(self, x: Tensor) -> Tensor: ...

    def gather(self, text: str) -> list[str]: ...

    def barrier(self) -> None: ...


@dataclass(frozen=True)
class Single:
    """One process."""

    rank: int = 0
    size: int = 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, text: str) -> list[str]:
        return [text]

    def barrier(self) -> None:
        pass


@dataclass(frozen=True)
class Distributed:
    """Several processes over torch.distributed. Texts travel as bytes: gathering objects would unpickle."""

    rank: int
    size: int
    device: torch.device

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks of a tensor on ``device``; a new tensor, no wait on the host."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    def gather(self, text: str) -> list[str]:
        """Every rank's text, by rank."""
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8).to(self.device)
        length = torch.tensor([len(text.encode())], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        padded = torch.zeros(max(1, *(int(n) for n in lengths)), dtype=torch.uint8, device=self.device)
        padded[:len(data)] = data[:len(padded)]
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [part[:int(n)].cpu().numpy().tobytes().decode() for part, n in zip(parts, lengths)]

    def barrier(self) -> None:
        self.gather("")  # works on every backend and never needs a device id


def world_of(accelerator) -> World:
    """The world that accelerate has set up."""
    if accelerator.num_processes == 1:
        return Single()
    return Distributed(accelerator.process_index, accelerator.num_processes, accelerator.device)


def raise_together(world: World, error: Exception | None, kind: type[Exception] = UserError) -> None:
    """Every rank raises when one has an error: its own, or the first of the others as ``kind``. A bug is named by its type."""
    said = "" if error is None else str(error) if isinstance(error, UserError) and str(error) else repr(error)
    messages = [text for text in world.gather(said) if text]
    if error is not None:
        raise error
    if messages:
        raise kind(messages[0])


def together(world: World, action: Callable[[], str | None], kind: type[UserError] = UserError) -> list[str]:
    """The texts of every rank's ``action``, by rank. Where one raises, all do: its own error, ``kind`` on the others.

    Bugs, too: the others would otherwise wait for it until the launcher ends them.
    """
    text, error = None, None
    try:
        text = action()
    except Exception as failure:
        error = failure
    raise_together(world, error, kind)
    return world.gather(text or "")


def on_first(world: World, action: Callable[[], str | None], kind: type[UserError] = UserError) -> str:
    """The text of ``action``, which rank 0 alone does, on all ranks; the others wait for it. Errors are as in ``together``."""
    return together(world, action if world.rank == 0 else str, kind)[0]


@contextmanager
def left_in_order():
    """Around a whole command: torch's process group, if there is one, ends while Python still runs.

    A thread of gloo drops the tensors of a collective a moment after it has returned. Where Python is ending by then, that
    thread is ended inside of a destructor, and C++ aborts the process ("terminate called without an active exception").
    Destroying the group waits for the thread. NCCL has no such thread, but waits for the other ranks: not where one failed.
    """
    try:
        yield
    except UserError:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


# --- tensors that FSDP2 has cut: each process holds some rows ---


def is_cut(x: Tensor) -> bool:
    """Whether this process holds a part of ``x`` only (a DTensor; asked without importing it)."""
    return hasattr(x, "full_tensor")


def local(x: Tensor) -> Tensor:
    """This process's rows of a cut tensor, in the same memory and without gradient; any other tensor, detached."""
    return x.detach().to_local() if is_cut(x) else x.detach()


def part(x: Tensor) -> tuple[int, ...]:
    """Which rows of a cut tensor this process holds: equal where processes hold the same ones. () for any other tensor."""
    if not is_cut(x):
        return ()
    return tuple(here for here, placement in zip(x.device_mesh.get_coordinate(), x.placements) if placement.is_shard())


def copies(x: Tensor) -> int:
    """How many processes hold the same rows of a cut tensor. 1 for any other tensor."""
    if not is_cut(x):
        return 1
    return math.prod(size for size, placement in zip(x.device_mesh.shape, x.placements) if placement.is_replicate())


def whole(x: Tensor) -> Tensor:
    """All of a cut tensor, on every process: collective. Any other tensor itself."""
    return x.detach().full_tensor() if is_cut(x) else x


def cut_like(x: Tensor, example: Tensor) -> Tensor:
    """A whole tensor -> this process's rows of it, cut as ``example`` is, without communication."""
    if not is_cut(example):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.detach().to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def joined_as(rows: Tensor, example: Tensor) -> Tensor:
    """This process's rows -> the tensor that they are a part of, cut as ``example`` is."""
    if not is_cut(example):
        return rows
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(rows, example.device_mesh, example.placements, run_check=False, shape=example.shape,
                              stride=example.stride())
