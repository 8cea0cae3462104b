"""Several processes of one run, on loopback. They are forked from a server that has imported the libraries once: processes of
their own, as a launcher starts them, would each spend some ten seconds of a core on that."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.warm"])


def join(folder: Path, rank: int, world: int, **variables: str) -> None:
    """Makes this process a rank, with the variables that a launcher sets. A file in the folder is the meeting point."""
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo",
                      **variables)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world,
                            timeout=timedelta(seconds=150))


def together(function: Callable[..., int | None], *args, folder: Path, world: int = 2, limit: float = 240,
             **variables: str) -> list[str]:
    """``function(*args)``, which a module names, in every process; an integer that it returns is the exit code. What each
    printed, when all have ended with 0. folder: an empty one, or one without a meeting point.
    """
    import torch

    told = os.getcwd(), dict(os.environ), torch.get_num_threads(), variables
    ranks = [SERVER.Process(target=_rank, args=(function, args, folder, rank, world, told)) for rank in range(world)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(limit)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = [(folder / f"rank-{rank}.txt").read_text(errors="replace") for rank in range(world)]
    assert [process.exitcode for process in ranks] == [0] * world, [text[-2000:] for text in said]
    return said


def _rank(function, args, folder, rank, world, told) -> None:
    import torch

    place, environment, threads, variables = told
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    with open(folder / f"rank-{rank}.txt", "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(threads)
    join(folder, rank, world, **variables)
    sys.exit(function(*args))
