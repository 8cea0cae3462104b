"""How candidates are noised. draw(batch, ctx, keys, t) -> Noised, rows ordered (draw, group, candidate).

keys: [draws*B, 3] (row, visit, draw), draws outermost; t: [draws*B] float64. ctx gives ``process``, ``seed`` and, to plans
that invert with the model, ``param`` and ``predict``. forwards: passes of the policy without gradient, a candidate and draw.
Shared noise inside a group lowers the variance of the margin (notation.md section 6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import rng
from ..types import Batch, Noised, carried
from .parameterization import like
from .solver import at, bridge_std, move

CURRENT = "current"  # the weight set of inversions: the policy as it is, without gradient


def draw_keys(key: Tensor, draws: int) -> Tensor:
    """[B, 2] -> [draws*B, 3] (row, visit, draw), draws outermost."""
    numbers = torch.arange(draws).repeat_interleave(len(key))
    return torch.cat([key.cpu().repeat(draws, 1), numbers[:, None]], dim=1)


def candidate_keys(batch: Batch, keys: Tensor) -> Tensor:
    """[draws*B*K, 4]: a key for each candidate."""
    candidate = torch.arange(batch.k).repeat(len(keys))[:, None]
    return torch.cat([keys.repeat_interleave(batch.k, dim=0), candidate], dim=1)


def _rows(batch: Batch, keys: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and t of every (draw, group, candidate), on the batch's device."""
    x0 = batch.x0.flatten(0, 1)
    draws = len(keys) // batch.groups
    return x0.repeat(draws, *[1] * (x0.dim() - 1)), carried(t.repeat_interleave(batch.k), x0.device)


@dataclass(frozen=True)
class Shared:
    """One time and one noise per (group, draw), the same for every candidate and every weight set."""

    forwards = 0

    def draw(self, batch: Batch, ctx, keys: Tensor, t: Tensor) -> Noised:
        x0, t = _rows(batch, keys, t)
        eps = rng.normal(ctx.seed, "noise", keys, tuple(batch.x0.shape[2:])).repeat_interleave(batch.k, dim=0)
        return ctx.process.noise(x0, t, carried(eps, x0.device))


@dataclass(frozen=True)
class Independent:
    """One time per (group, draw), own noise per candidate (Diffusion-DPO Eq. 14 as written)."""

    forwards = 0

    def draw(self, batch: Batch, ctx, keys: Tensor, t: Tensor) -> Noised:
        x0, t = _rows(batch, keys, t)
        eps = rng.normal(ctx.seed, "noise", candidate_keys(batch, keys), tuple(batch.x0.shape[2:]))
        return ctx.process.noise(x0, t, carried(eps, x0.device))


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """InPO (arXiv 2503.18454): the noisy latent is the image's own, by deterministic DDIM inversion with the policy.

    ``steps`` equal steps from the first level up to exactly t, each row on its own grid; the noise that the error is measured
    against is read off the result, (xt - alpha x0) / sigma. eta: that share of the DDPM posterior's standard deviation is
    added after each step (0.1 in the released code). Deviation from it: there the inversion ends on a level of a common grid,
    not on t, which leaves x0 in the target (inpo.md section 7), and a batch shares its first row's t.
    """

    steps: int = 10
    eta: float = 0.0

    def __post_init__(self):
        _check_steps(self.steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1, got {self.eta}")

    @property
    def forwards(self) -> int:
        return self.steps

    def draw(self, batch: Batch, ctx, keys: Tensor, t: Tensor) -> Noised:
        return _invert(batch, ctx, keys, t, self.steps, eta=self.eta)


@dataclass(frozen=True, kw_only=True)
class ReNoised:
    """SmPO (arXiv 2506.02698): inversion with one ReNoise correction a step: the noise prediction is averaged with the one at
    the step's end. at: where the second prediction is asked for; "next" is ReNoise as published, "current" the released code,
    which in a Gaussian toy gains nothing (smpo.md section 3).
    """

    steps: int = 5
    at: Literal["next", "current"] = "next"

    def __post_init__(self):
        _check_steps(self.steps)

    @property
    def forwards(self) -> int:
        return 2 * self.steps

    def draw(self, batch: Batch, ctx, keys: Tensor, t: Tensor) -> Noised:
        return _invert(batch, ctx, keys, t, self.steps, again=self.at)


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps must be at least 1 and at most 1000, got {steps}")


@torch.no_grad()
def _invert(batch: Batch, ctx, keys: Tensor, t: Tensor, steps: int, eta: float = 0.0, again: str | None = None) -> Noised:
    """x_t and its noise are constants: gradients flow through the later policy pass alone."""
    x0, t = _rows(batch, keys, t)
    x0, cond = x0.float(), batch.cond.rows(batch.k, len(keys) // batch.groups)
    t = ctx.process.snap(t)
    first = ctx.process.snap(torch.zeros_like(t))  # a VAE's latent is taken to lie on the first level, not beyond it
    fractions = torch.linspace(0, 1, steps + 1).tolist()
    levels = [ctx.process.snap(first + (t - first) * f) for f in fractions[:-1]] + [t]
    x, candidates = x0, candidate_keys(batch, keys) if eta else None
    for number, (low, high) in enumerate(zip(levels, levels[1:])):
        after = _step(ctx, x, low, high, cond, again)
        if eta:
            step = torch.full((len(candidates), 1), number, dtype=torch.int64)
            noise = rng.normal(ctx.seed, "inversion", torch.cat([candidates, step], dim=1), tuple(x.shape[1:]))
            after = after + like(eta * bridge_std(ctx.process, low, high), x) * carried(noise, x.device)
        x = torch.where(like(high > low, x).bool(), after, x)  # rows close to the start have steps of no length
    end = at(ctx.process, x, t)
    tau = (x - like(end.alpha, x) * x0) / like(end.sigma, x)
    return replace(end, x0=x0, noise=tau)


def _step(ctx, x: Tensor, low: Tensor, high: Tensor, cond, again: str | None) -> Tensor:
    """One step towards noise, with ReNoise's correction where asked for."""
    def prediction(x, t):
        raw, here = ctx.predict(CURRENT, x, t, cond).float(), at(ctx.process, x, t)
        return ctx.param.to_x0(raw, here), ctx.param.to_eps(raw, here)

    x0, eps = prediction(x, low)
    after = move(ctx.process, x0, eps, high)
    if again is None:
        return after
    second = prediction(after, high if again == "next" else low)[1]
    eps = (eps + second) / 2
    here = at(ctx.process, x, low)
    return move(ctx.process, (x - like(here.sigma, x) * eps) / like(here.alpha, x), eps, high)


NoisePlan = Shared | Independent | Inverted | ReNoised
