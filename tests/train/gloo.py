"""One rank of a two-process run: ``python -m tests.train.gloo FOLDER RANK``. A file is the meeting point, loopback only.

Runs every scenario in turn and writes ``result-RANK.json``; the last one ends with an exception on rank 1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from diffalign.errors import UserError
from diffalign.train import TrainingError
from diffalign.train.guard import check_same_weights
from diffalign.train.launch import make_accelerator
from diffalign.world import on_first, raise_together, world_of

from ..ranks import join
from . import toy

WORLD = 2
STEPS = {"max_train_steps": 20, "train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 5,
         "learning_rate": 1e-4}


def source(rank, **options):
    return toy.Source((3, 3), rank=rank, world=WORLD, **options)


def weights(bank):
    return {name: p.detach().clone() for name, p in bank.trainable().items()}


class Before:
    """Keeps the weights after each step, and does ``act(state)``."""

    def __init__(self, bank, act=lambda state: None):
        self.bank, self.act, self.kept = bank, act, None

    def after_step(self, state, report):
        self.kept = weights(self.bank)
        self.act(state)


def refusal(action):
    """The text and exit code of the error that ``action`` raises; None for a bug's code."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error), error.exit_code if isinstance(error, UserError) else None]
    return None


def scenarios(folder: Path, rank: int) -> dict:
    world = world_of(make_accelerator(toy.spec(), folder))
    total = world.sum(torch.tensor([rank + 1.0])).item()
    found = {"world": [world.rank, world.size, world.gather(f"from {rank} \u00e9"), total]}
    validated = []

    def validate(bank, step):
        with torch.no_grad():  # ranks may validate unlike numbers of batches
            for _ in range(1 + 2 * rank):
                batch = toy.Source((2,)).take(0)[0]
                bank.predict("policy", batch.x0.flatten(0, 1), torch.full((4,), 0.5), batch.cond.rows(2))
        validated.append(step)
        return {"acc": step / 10}

    toy.train(folder / "equal", source=source(rank), validation=validate, ema_decay=0.9, **STEPS)
    found["validated"] = validated
    toy.train(folder / "empty", source=source(rank, invalid=empty_rows()), **STEPS)
    found["resumed"] = toy.train(folder / "handed-over", source=source(rank), **STEPS)[1].step

    def poison(batch, step):
        if step == 2 and rank == 1:
            batch.x0[1] = float("nan")
        return batch

    bank = toy.Bank()
    before = Before(bank)
    found["nan"] = refusal(lambda: toy.train(folder / "nan", bank=bank, source=source(rank, poison=poison), hooks=[before],
                                             **STEPS))
    found["nan_untouched"] = all(torch.equal(p, before.kept[name]) for name, p in bank.trainable().items())

    bank = toy.Bank()
    ask = Before(bank, lambda state: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 and state.step == 7 else None)
    found["term"] = refusal(lambda: toy.train(folder / "term", bank=bank, source=source(rank), hooks=[ask], **STEPS))

    bank = toy.Bank()
    if rank == 0:
        bank.save = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    found["full"] = refusal(lambda: toy.train(folder / "full", bank=bank, source=source(rank), **STEPS))

    bank = toy.Bank()
    found["same"] = refusal(lambda: check_same_weights(world, bank.trainable()))
    if rank == 1:
        bank.module.leave.weight.data.view(torch.int32)[0, 0, 0, 0] ^= 1  # the last bit of one weight
    found["flip"] = refusal(lambda: check_same_weights(world, bank.trainable()))
    found["together"] = refusal(lambda: raise_together(world, TrainingError("mine") if rank == 1 else None,
                                                              TrainingError))
    found["bug"] = refusal(lambda: on_first(world, lambda: {}["x"], TrainingError))
    return found


def empty_rows():
    """All rows of rank 1, over 20 steps of 6 rows on 2 ranks."""
    return [row for row in range(240) if (row // 6) % 2 == 1]


def crash(folder: Path, rank: int) -> None:
    """Rank 1 fails in step 3; rank 0 must not wait for it for ever."""
    class Method:
        reads = ("policy", "reference")

        def loss(self, batch, ctx):
            if rank == 1 and ctx.step == 2:
                raise RuntimeError("rank 1 fails in step 3")
            return toy.method().loss(batch, ctx)

    toy.train(folder / "crash", source=source(rank), method=Method(), **STEPS)


if __name__ == "__main__":
    here, number = Path(sys.argv[1]), int(sys.argv[2])
    join(here, number, WORLD)
    result = scenarios(here, number)
    (here / f"result-{number}.json").write_text(json.dumps(result))
    crash(here, number)
