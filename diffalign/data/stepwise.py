"""Preferences at every step of the sampler: children of one state, ranked where they are (SPO, LPO, TailorPO).

A rollout walks from noise to a picture with the weights of that moment. At each step ``candidates`` children are drawn from
one state, a judge ranks them, best and worst become a group with the step's exact density, and one child goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from .. import rng
from ..process.parameterization import like
from ..process.solver import at, bridge_std, guided, stochastic_step
from ..rewards import Reward, columns_of, identity, judged
from ..sampling.latents import Sampler
from ..types import Batch, Cond, Steps, carried
from .judges import LatentJudge
from .offline import Offline
from .sources import sizes_of_samples

# --- what ranks the children, and which pairs are kept -----------------------------------------------------------------


class StepJudge(Protocol):
    """(x [N, *S] at levels t [N], x0 [N, *S] or None, prompts) -> [N] float32, higher is better, NaN for what it cannot rank.

    predicts: whether it reads the model's prediction of the picture, x0. time, where it has one: "parent" gets it the levels
    that the children came from. decode: latents -> pictures [N, 3, H, W] in [0, 1]. differentiable, False where it is left
    out: ``slope``, called alike, is the gradient of the scores with respect to what it reads, x or x0, [N, *S].
    """

    predicts: bool
    title: str  # of the method that ranks in this way

    def __call__(self, x: Tensor, t: Tensor, x0: Tensor | None, prompts: Sequence[str], decode: Callable) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PredictedImage:
    """A reward of the picture that the model predicts from the child, at the child's own level (TailorPO, arXiv 2502.01667;
    SPO, arXiv 2406.04314, with a reward that reads the level: one that names a column ``t``).

    The prediction is that of the sampling weights, with the sampler's guidance; of the child that goes on it is the next
    step's own pass, so it costs candidates - 1 passes a step.
    """

    reward: Reward
    predicts = True

    def __call__(self, x: Tensor, t: Tensor, x0: Tensor | None, prompts: Sequence[str], decode: Callable) -> Tensor:
        return judged(self.reward, list(decode(x0)), prompts, self._columns(t))

    @property
    def title(self) -> str:
        return "SPO" if "t" in columns_of(self.reward) else "TailorPO"

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def identity(self) -> str:
        """Hash of what pins its scores: a run goes on with the judge it began with."""
        return hashlib.sha256(json.dumps(identity(self.reward), sort_keys=True, default=str).encode()).hexdigest()

    def slope(self, x: Tensor, t: Tensor, x0: Tensor | None, prompts: Sequence[str], decode: Callable) -> Tensor:
        """With respect to the predicted latent, without the Jacobian of the model, which would take a backward pass of it."""
        with torch.enable_grad():
            latent = x0.detach().requires_grad_()
            scores = self.reward(list(decode(latent)), prompts, **self._columns(t))
            return torch.autograd.grad(scores.nan_to_num(0.0).sum(), latent)[0]

    def _columns(self, t: Tensor) -> dict[str, list[float]]:
        return {"t": t.tolist()} if "t" in columns_of(self.reward) else {}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A pair is kept where tanh((best - worst) / 2), the gap of their softmax, is above ``gap`` (SPO: 0.3, SDXL 0.4; 0: every
    pair that is no tie). The scores are in logits."""

    gap: float = 0.3

    def __post_init__(self):
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be at least 0 and below 1, got {self.gap}")

    def __call__(self, std: Tensor) -> Tensor:
        return torch.full_like(std, self.gap)


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """``Constant`` with a gap that rises linearly with the step's standard deviation, from ``low`` at the smallest of the
    schedule to ``high`` at the largest (LPO, arXiv 2502.01051: 0.35 to 0.5 for SD 1.5, 0.45 to 0.6 for SDXL). Released as a
    table for one schedule of 20 steps; computed here, for any.
    """

    low: float = 0.35
    high: float = 0.5

    def __post_init__(self):
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"low must be at least 0, at most high, and high below 1, got {self.low} and {self.high}")

    def __call__(self, std: Tensor) -> Tensor:
        spread = std.max() - std.min()
        return self.low + (std - std.min()) / spread.clamp(min=1e-12) * (self.high - self.low)


JUDGES = {"predicted_image": PredictedImage, "latent": LatentJudge}
THRESHOLDS = {"constant": Constant, "dynamic": Dynamic}
Threshold = Constant | Dynamic


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """Pairs of one prompt and one step, drawn by the current model; of the data set only the prompts are read.

    judge: what ranks the children. candidates: children of a state; best and worst are the pair. threshold: which pairs are
    kept. block: steps that every child goes on its own before it is judged; all of them become pairs (SPO for SDXL: 4, with 2
    children). start, end: steps from a level above start or to one below end are sampled without comparison (SPO: 0.752,
    timestep 751).
    continuation: which child goes on: "random" (SPO, LPO) or "best". push: TailorPO-G's winner is moved along the judge's
    gradient by this share of the step's standard deviation (at most 0.2 keeps it typical). updates: optimizer
    steps that share a rollout; a checkpoint lies between rollouts.
    """

    judge: StepJudge
    sampler: Sampler = Sampler(solver="ancestral")
    candidates: int = 4
    threshold: Threshold = Constant()
    block: int = 1
    start: float = 1.0
    end: float = 0.0
    continuation: Literal["random", "best"] = "random"
    push: float = 0.0
    updates: int = 1
    weights = "current"
    k = 2
    reads_prompts_only = True

    def __post_init__(self):
        if not 2 <= self.candidates <= 64:
            raise ValueError(f"candidates must be at least 2 and at most 64, got {self.candidates}")
        for name in ("block", "updates"):
            if not 1 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must be at least 1 and at most 1000, got {getattr(self, name)}")
        if not 0 <= self.end < self.start <= 1:
            raise ValueError(f"start must be above end, both noise levels between 0 and 1, got {self.start} and {self.end}")
        if not 0 <= self.push <= 1:
            raise ValueError(f"push must be at least 0 and at most 1 standard deviation, got {self.push}")
        if self.push and not getattr(self.judge, "differentiable", False):
            raise ValueError("push needs a judge whose reward is differentiable; set it to 0")
        if self.sampler.solver == "ddim":
            raise ValueError("sampler.solver ddim is deterministic (eta 0): children of one state would be equal, and a step "
                             "without noise has no density; use ancestral, or lcm for models distilled for it")
        if len(self.sampler.times()) < 2 or not self.forks():
            raise ValueError(f"start, end and block leave no step of the {len(self.sampler.times())} to compare; a comparison "
                             f"needs {self.block} steps that begin at or below {self.start:g} and end above {self.end:g}")

    def forks(self) -> list[int]:
        """Numbers of the steps at which children part; step n leads from level n to level n + 1."""
        times, places, n = self.sampler.times(), [], 0
        while n + self.block < len(times):
            inside = times[n] <= self.start + 1e-9 and times[n + self.block] >= self.end - 1e-9
            places += [n] if inside else []
            n += self.block if inside else 1
        return places

    def finished(self) -> list[int]:
        """Numbers of the levels whose latents are pictures already: timestep 0, where SPO judges the latents themselves."""
        return [n for n, t in enumerate(self.sampler.times()) if t < 1.5 / 1000]


# --- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """Where B prompts are. x: [B, *S]. raw: the prediction there, or None where it is not known yet. cond, empty: B rows.
    stds: of the schedule's steps."""

    x: Tensor
    raw: Tensor | None
    cond: Cond
    empty: Cond | None
    keys: Tensor
    prompts: list[str]
    stds: list[float]


class StepwiseSource:
    """Rollouts of the current model, cut into micro-batches of pairs.

    context(): ``predict``, ``process``, ``param``, ``seed``. decode: latents [N, *S] -> pictures [N, 3, H, W] in [0, 1]. most:
    the largest of a number over all processes, so that all have as many micro-batches. pairs: of a micro-batch.

    A rollout is a function of the weights at its first step and of the keys of its prompts, so a checkpoint between two
    rollouts is exact. Kept in memory: two latents and their parent a pair, on the CPU.
    """

    pure = False

    def __init__(self, stored: Offline, spec: Stepwise, context: Callable, decode: Callable, *, pairs: int, device,
                 most: Callable[[int], int] = int):
        self.stored, self.spec, self.context, self.decode, self.pairs = stored, spec, context, decode, pairs
        self.device, self.most = device, most
        self.identity, self.k, self.soft, self.groups, self.elements = (stored.identity, 2, False, stored.groups,
                                                                        stored.elements)
        self._round: tuple[int, list[Batch]] | None = None

    def boundary(self, step: int) -> bool:
        return step % self.spec.updates == 0

    def take(self, step: int) -> list[Batch]:
        number, part = divmod(step, self.spec.updates)
        if self._round is None or self._round[0] != number:
            self._round = number, self._rollouts(number)
        groups = self._round[1][part::self.spec.updates]
        count = self.most(max(1, -(-len(groups) // self.pairs)))
        padding = replace(self._round[1][0], valid=torch.zeros_like(self._round[1][0].valid))
        parts = [groups[i * self.pairs:(i + 1) * self.pairs] or [padding] for i in range(count)]
        return [_joined(part) for part in parts]

    def _rollouts(self, number: int) -> list[Batch]:
        """Every kept pair of the round as a batch of one group, in keyed order; an invalid one where none was kept."""
        micros = self.stored.take(number)
        found = [group for batch, prompts in zip(micros, self.stored.prompts(number), strict=True)
                 for group in self._rollout(batch, prompts)]
        kept = [group for group in found if bool(group.valid.all())]
        order = rng.permutation(len(kept), self.context().seed, "stepwise", number)
        return [kept[i] for i in order] or found[:1]

    @torch.no_grad()
    def _rollout(self, batch: Batch, prompts: Sequence[str]) -> list[Batch]:
        spec, ctx = self.spec, self.context()
        levels = spec.sampler.levels(ctx.process, self.device)
        stds = self._stds(ctx, levels)
        limits = spec.threshold(stds).tolist()
        cond = replace(batch.cond, extra=sizes_of_samples(batch.cond.extra, 1)).to(self.device)
        empty = None
        if spec.sampler.guidance_scale != 1:
            empty = replace(self.stored.unconditional().rows(batch.groups).to(self.device), extra=cond.extra)
        shape = tuple(batch.x0.shape[2:])
        x = carried(rng.normal(ctx.seed, "sample", batch.key, shape), self.device)
        walk = _Walk(x=x, raw=None, cond=cond, empty=empty, keys=batch.key, prompts=list(prompts), stds=stds.tolist())
        groups, n, forks = [], 0, set(spec.forks())
        while n < (max(forks) + spec.block):
            count = spec.block if n in forks else 1
            walk, pairs = self._advance(ctx, walk, levels, n, count, limits[n] if n in forks else None)
            groups += [group for step in pairs for group in _single(replace(batch, soft=None, **step))]
            n += count
        return groups

    def _stds(self, ctx, levels: Tensor) -> Tensor:
        """[L - 1] of every step of the schedule."""
        if self.spec.sampler.solver == "lcm":
            return ctx.process.coefficients(levels[1:])[1].cpu()
        return (self.spec.sampler.eta * bridge_std(ctx.process, levels[1:], levels[:-1])).cpu()

    def _advance(self, ctx, walk: _Walk, levels: Tensor, n: int, count: int, limit: float | None) -> tuple[_Walk, list[dict]]:
        """``count`` steps from level n. With a limit the state has children, which are judged at the end of them."""
        spec, b = self.spec, len(walk.prompts)
        k = 1 if limit is None else spec.candidates
        wide, keys = _widened(walk, k), torch.cat([walk.keys.repeat_interleave(k, 0), torch.arange(k).repeat(b)[:, None]], 1)
        x, raw, path = wide.x, None if walk.raw is None else walk.raw.repeat_interleave(k, 0), [wide.x]
        if raw is None:  # one pass for all children of a state
            raw = self._predict(ctx, walk, levels[n]).repeat_interleave(k, 0)
        for step in range(n, n + count):
            if step > n:
                raw = self._predict(ctx, replace(wide, x=x), levels[step])
            x = self._step(ctx, x, raw, levels, step, keys)
            path.append(x)
        if limit is None:
            return replace(walk, x=x, raw=None), []
        level = levels[n + count]
        predicts = spec.judge.predicts and n + count not in spec.finished()
        raw = self._predict(ctx, replace(wide, x=x), level) if predicts else None
        t = level.expand(len(x))
        x0 = x if spec.judge.predicts else None  # a finished latent is its own prediction
        if raw is not None:
            x0 = ctx.param.to_x0(raw, at(ctx.process, x, t))
        if getattr(spec.judge, "time", "own") == "parent":
            t = levels[n + count - 1].expand(len(x))
        scores = spec.judge(x, t, x0, wide.prompts, self.decode).float().cpu().view(b, k)
        best, worst, valid = _ends(scores, limit)
        picked = torch.stack([best, worst], 1)
        if spec.push:
            path[-1] = self._pushed(path[-1], t, x0, best, wide.prompts, walk.stds[n + count - 1])
        chosen = best if spec.continuation == "best" else _any_of(ctx.seed, walk.keys, n, k)
        rows = torch.arange(b)
        after = replace(walk, x=x.view(b, k, *x.shape[1:])[rows, chosen],
                        raw=None if raw is None else raw.view(b, k, *x.shape[1:])[rows, chosen])
        return after, [self._pairs(walk, path[i:i + 2], levels[n + i:n + i + 2], picked, scores, valid, k)
                       for i in range(count)]

    def _predict(self, ctx, walk: _Walk, level: Tensor) -> Tensor:
        t = level.expand(len(walk.x))
        return guided(ctx, self.spec.weights, walk.x, t, walk.cond.rows(1), None if walk.empty is None else walk.empty.rows(1),
                      self.spec.sampler.guidance_scale)

    def _step(self, ctx, x: Tensor, raw: Tensor, levels: Tensor, n: int, keys: Tensor) -> Tensor:
        t, to = levels[n].expand(len(x)), levels[n + 1].expand(len(x))
        mean, std = stochastic_step(ctx, x, raw, t, to, self.spec.sampler.solver, self.spec.sampler.eta)
        numbered = torch.cat([keys, torch.full((len(keys), 1), n + 1)], dim=1)
        return mean + like(std, x) * carried(rng.normal(ctx.seed, "renoise", numbered, tuple(x.shape[1:])), x.device)

    def _pushed(self, x: Tensor, t: Tensor, x0: Tensor | None, best: Tensor, prompts: Sequence[str], std: float) -> Tensor:
        """The winners moved by push * std * sqrt(D) along the judge's gradient."""
        b = len(best)
        rows = torch.arange(b) * (len(x) // b) + best
        slope = self.spec.judge.slope(x[rows], t[rows], None if x0 is None else x0[rows], [prompts[i] for i in rows.tolist()],
                                      self.decode).to(x.device)
        length = slope.flatten(1).norm(dim=1).clamp(min=1e-12)
        moved = x.clone()
        moved[rows] += like(self.spec.push * std * slope[0].numel() ** 0.5 / length, slope) * slope
        return moved

    def _pairs(self, walk: _Walk, path: list[Tensor], levels: Tensor, picked: Tensor, scores: Tensor, valid: Tensor, k: int
               ) -> dict:
        """What a batch of these B groups differs in from the prompts' batch; everything on the CPU."""
        b, rows = len(walk.prompts), torch.arange(len(walk.prompts))[:, None]
        before, after = (x.cpu().view(b, k, *x.shape[1:])[rows, picked] for x in path)
        t, s = (level.cpu().expand(b) for level in levels)
        spec = self.spec.sampler
        extra = {name: x.cpu().repeat(1, 2, *[1] * (x.dim() - 2)) for name, x in walk.cond.extra.items()}
        empty = None if walk.empty is None else replace(walk.empty.to("cpu"), extra=extra)
        cond = replace(walk.cond.to("cpu"), extra=extra)
        shared = before[:, :1] if self.spec.block == 1 else before
        steps = Steps(x_t=shared, x_s=after, t=t, s=s, solver=spec.solver, eta=spec.eta,
                      guidance_scale=spec.guidance_scale, unconditional=empty)
        return {"x0": after, "cond": cond, "utility": scores[rows, picked].nan_to_num(0.0), "steps": steps,
                "valid": valid[:, None].expand(b, 2).clone()}


def _ends(scores: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best, worst [B] of the children that have a score, and whether their gap is above the limit; equal scores never are."""
    known = scores.isfinite()
    best = torch.where(known, scores, -torch.inf).argmax(1)
    worst = torch.where(known, scores, torch.inf).argmin(1)
    rows = torch.arange(len(scores))
    gap = torch.tanh((scores[rows, best] - scores[rows, worst]) / 2)
    return best, worst, (known.sum(1) > 1) & (gap > limit)


def _any_of(seed: int, keys: Tensor, n: int, k: int) -> Tensor:
    """[B] a child each, uniform and independent of the scores."""
    numbered = torch.cat([keys, torch.full((len(keys), 1), n)], dim=1)
    return (rng.uniform(seed, "continuation", numbered) * k).long()


def _widened(walk: _Walk, k: int) -> _Walk:
    """Every prompt k times over."""
    def cond(c: Cond | None) -> Cond | None:
        if c is None:
            return None
        rows = replace(c, extra={name: x.repeat(1, k, *[1] * (x.dim() - 2)) for name, x in c.extra.items()}).rows(k)
        return replace(rows, extra={name: x[:, None] for name, x in rows.extra.items()})

    return replace(walk, x=walk.x.repeat_interleave(k, 0), cond=cond(walk.cond), empty=cond(walk.empty),
                   prompts=[prompt for prompt in walk.prompts for _ in range(k)])


def _single(batch: Batch) -> list[Batch]:
    """A batch for each of its groups."""
    return [_each(batch, slice(i, i + 1)) for i in range(batch.groups)]


def _each(value, rows: slice):
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {name: _each(item, rows) for name, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _each(getattr(value, f.name), rows) for f in fields(value)})
    return value


def _joined(parts: Sequence):
    """Batches, or anything inside them, one after another. What is no tensor is the same in all."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if is_dataclass(first):
        return replace(first, **{f.name: _joined([getattr(part, f.name) for part in parts]) for f in fields(first)})
    return first
