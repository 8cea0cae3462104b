"""A toy run: a 1,300-weight denoiser on [4, 8, 8] latents, a bank and a source that keep the contracts."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffalign import rng
from diffalign.errors import UserError
from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Preference
from diffalign.objectives import Pairwise
from diffalign.process import Eps, VariancePreserving
from diffalign.train import TrainSpec, fit
from diffalign.types import Batch, Cond

SHAPE, TOKENS = (4, 8, 8), (3, 5)


class Net(nn.Module):
    """Two convolutions, conditioned on the time and the mean token."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.leave = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.time, self.text = nn.Linear(1, 16), nn.Linear(TOKENS[1], 16)

    def forward(self, xt, t, tokens):
        shift = self.time(t[:, None]) + self.text(tokens.mean(1))
        return self.leave(torch.tanh(self.enter(xt) + shift[:, :, None, None]))


class Toy:
    """A Denoiser."""

    family, param, lora_targets = "toy", Eps(), ()

    def __init__(self, seed: int = 0):
        from diffusers import DDPMScheduler  # after diffalign.train, which repairs its imports first
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.module, self.process = Net(seed), VariancePreserving.from_scheduler(scheduler)

    def __call__(self, xt, t, cond):
        return self.run(self.module, xt, t, cond)

    def run(self, module, xt, t, cond):
        return module(xt, t, cond.tokens)


class Bank:
    """Full fine-tuning with a frozen copy. broken: a fault to plant."""

    def __init__(self, seed: int = 0, broken: str = ""):
        self.denoiser, self.identity, self.broken = Toy(seed), f"frozen:toy{seed}", broken
        self.frozen = copy.deepcopy(self.denoiser.module).requires_grad_(False)
        self.module, self.advanced = self.denoiser.module, []
        if broken == "reference":
            self.frozen.leave.bias.data += 0.1

    def predict(self, name, xt, t, cond):
        if name == "policy":
            return self.denoiser(xt, t, cond)
        with torch.no_grad():
            return self.denoiser.run(self.frozen, xt, t, cond)

    def trainable(self):
        return dict(sorted(self.module.named_parameters()))

    def advance(self, step):
        self.advanced.append(step)

    def state(self):
        return {f"policy/{name}": p.detach() for name, p in self.trainable().items()}

    def load_state(self, tensors):
        for name, p in self.trainable().items():
            p.data.copy_(tensors[f"policy/{name}"])

    def save(self, folder, metadata):
        save_file(self.state(), Path(folder) / "pytorch_lora_weights.safetensors", metadata=metadata)


class Source:
    """Random pairs, a pure function of (seed, step): groups ``step*G .. (step+1)*G-1``, split as asked over ranks.

    splits: sizes of one rank's micro-batches. invalid: rows whose candidates are all invalid. poison(batch) -> batch.
    """

    def __init__(self, splits=(4,), rank=0, world=1, seed=7, invalid=(), poison=None, boundary=lambda step: True,
                 identity="toy-data", pause=0.0, tokens=TOKENS):
        self.tokens = tokens
        self.splits, self.rank, self.world, self.seed, self.invalid = splits, rank, world, seed, set(invalid)
        self.poison, self.boundary, self.identity, self.pause, self.taken = poison, boundary, identity, pause, []

    def take(self, step):
        time.sleep(self.pause)
        self.taken.append(step)
        size = sum(self.splits)
        first = (step * self.world + self.rank) * size
        rows, batches = list(range(first, first + size)), []
        for n in self.splits:
            batches.append(self._batch(rows[:n]))
            rows = rows[n:]
        return [self.poison(batch, step) for batch in batches] if self.poison else batches

    def _batch(self, rows):
        key = torch.tensor([[row, 0] for row in rows])
        x0 = rng.normal(self.seed, "x0", key, (2, *SHAPE))
        x0[:, 1] *= 1.5  # losers are louder, so that there is something to learn
        valid = torch.tensor([[row not in self.invalid] * 2 for row in rows])
        return Batch(x0=x0, cond=Cond(tokens=rng.normal(self.seed, "tokens", key, self.tokens)),
                     utility=torch.tensor([[1.0, 0.0]] * len(rows)), valid=valid, key=key)


def method(beta: float = 2000.0):
    return Preference(DenoisingELBO(), Pairwise(beta=beta))


def spec(**changes) -> TrainSpec:
    return TrainSpec(**{"max_train_steps": 10, "train_batch_size": 4, "learning_rate": 1e-3, "mixed_precision": "no",
                        "checkpointing_steps": 100, "logging_steps": 5, "cpu": True, **changes})


def recipe(train: TrainSpec, **changes) -> dict:
    from dataclasses import asdict
    return {"seed": 3, "output_dir": "anywhere", "objective": {"beta": 2000.0}, "train": asdict(train), **changes}


DPO = method()


def train(folder, *, bank=None, source=None, method=DPO, config=None, **options):
    """Train the toy; keywords of TrainSpec go to it, the others to ``fit``."""
    passed = {key: options.pop(key) for key in ("hooks", "validation", "identity", "metadata", "accelerator", "progress")
              if key in options}
    train_spec = spec(**options)
    bank = bank or Bank()
    source = source or Source((train_spec.train_batch_size,) * train_spec.gradient_accumulation_steps)
    summary = fit(method=method, bank=bank, source=source, spec=train_spec, seed=3, output_dir=Path(folder),
                  config=config or recipe(train_spec), progress=passed.pop("progress", False), **passed)
    return bank, summary


def command(folder, pause: float, options: dict) -> int:
    """What the command line does around ``train``: the exit code."""
    try:
        train(folder, source=Source((4,), pause=pause), progress=True, **options)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
