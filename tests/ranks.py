"""Processes to be killed, and several of one run, on loopback. They are forked from a server that has imported the libraries
once: programs of their own, as a launcher starts them, would each spend some five seconds of a core on that."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.warm"])


def join(folder: Path, rank: int, world: int, **variables: str) -> None:
    """Makes this process a rank of several, with the variables that a launcher sets; the folder holds the meeting point."""
    if world == 1:
        return
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo",
                      **variables)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
                            timeout=timedelta(seconds=150))


def start(function: Callable[..., int | None], *args, said: Path, before: Callable[[], None] | None = None):
    """``function(*args)``, which a module names, in a process; an integer that it returns is the exit code. said: file for
    what it prints; its errors go into one beside it that ends in .err. before: a function that a module names, called first.
    Its caller ends it.
    """
    import torch

    process = SERVER.Process(target=_run, args=(function, args, said, before, os.getcwd(), dict(os.environ),
                                                torch.get_num_threads()))
    process.start()
    return process


def together(function: Callable[..., int | None], *args, folder: Path, world: int = 2, limit: float = 240,
             **variables: str) -> list[str]:
    """``function(*args)`` in every process of a run. What each printed, when all have ended with 0. folder: one without a
    meeting point. variables: of the environment.
    """
    said = [folder / f"rank-{rank}.txt" for rank in range(world)]
    ranks = [start(function, *args, said=said[rank], before=partial(join, folder, rank, world, **variables))
             for rank in range(world)]
    try:
        for process in ranks:
            process.join(limit)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    errors = [file.with_suffix(".err").read_text(errors="replace")[-2000:] for file in said]
    assert [process.exitcode for process in ranks] == [0] * world, errors
    return [file.read_text(errors="replace") for file in said]


def _run(function, args, said, before, place, environment, threads) -> None:
    import torch

    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, said), (2, said.with_suffix(".err"))):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(threads)
    if before is not None:
        before()
    sys.exit(function(*args))
