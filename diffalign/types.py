"""The types that flow through diffalign. B groups, K candidates a group, N = B*K rows, S = latent shape (C, H, W), or (L,)
for text: prompt and answer as one row of L token ids, padded at its end.

Time runs from 0 (clean) to 1 (noise) everywhere. A pair is a group of two, an unpaired picture a group of one, a ranking
a group of K.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor


def carried(x: Tensor, device: torch.device | str) -> Tensor:
    """x on ``device``: on its way there without waiting, back on the CPU once it has arrived, as the next line may read it.

    CUDA copies pageable memory after all that was queued before, and the host waits for that: such tensors are pinned first.
    """
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type != "cpu")


class _Movable:
    """``to(device)`` for frozen dataclasses of tensors."""

    __slots__ = ()

    def to(self, device: torch.device | str):
        return replace(self, **{f.name: _move(getattr(self, f.name), device) for f in fields(self)})


def _move(value, device):
    if isinstance(value, dict):
        return {name: _move(item, device) for name, item in value.items()}
    if isinstance(value, _Movable):
        return value.to(device)
    return carried(value, device) if isinstance(value, Tensor) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Cond(_Movable):
    """What the denoiser is conditioned on.

    tokens: [B, L, D] float, text-encoder states; None for text, whose prompt is a part of ``Batch.x0``. pooled: [B, D'] float
    or None. extra: per candidate, [B, K, ...]; SDXL's ``time_ids`` [B, K, 6] in pixels stay float32 (bf16 cannot hold 1023);
    text's ``answer`` and ``attended`` [B, K, L] bool, where the answer lies and what is no padding; those of sounds are named
    by their adapters.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, k: int, draws: int = 1) -> Cond:
        """One row per (draw, group, candidate): everything becomes [draws*B*K, ...], draws outermost."""
        def shared(x):
            return None if x is None else x.repeat_interleave(k, dim=0).repeat(draws, *[1] * (x.dim() - 1))

        def own(x):
            return x.flatten(0, 1).repeat(draws, *[1] * (x.dim() - 2))

        return Cond(tokens=shared(self.tokens), pooled=shared(self.pooled),
                    extra={name: own(x) for name, x in self.extra.items()})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sound:
    """A clip as people hear it. wave: [channels, samples] float32, full scale is -1 to 1. rate: Hz."""

    wave: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return self.wave.shape[1] / self.rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps(_Movable):
    """One step of a sampler for every candidate of B groups.

    x_t: [B, 1, *S] where the candidates of a group came from one state, else [B, K, *S]. x_s: [B, K, *S], what the step led
    to. t, s: [B] float32, the noise levels before and after, s < t. solver, eta, guidance_scale: of the sampler, whose density
    the steps have. unconditional: B groups, what guidance compares with, or None.
    """

    x_t: Tensor
    x_s: Tensor
    t: Tensor
    s: Tensor
    solver: str
    eta: float = 1.0
    guidance_scale: float = 1.0
    unconditional: Cond | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(_Movable):
    """Groups of candidates for one prompt each.

    x0: [B, K, *S] float32, latents scaled to unit variance, or int64 token ids. utility: [B, K] float32, higher is better;
    (1, 0) for a plain pair, equal values for a tie. valid: [B, K] bool. key: [B, 2] int64 (row id, visit), the identity that
    seeds all noise. soft: [B] float32 or None, the probability that the best candidate is truly preferred (soft labels).
    place: [B] int64 or None, the group's number in the run (step * groups a step + its place in the step), the same however a
    step is cut up. steps: the sampler's steps that step densities are taken of, or None. reference_error: [B, K, draws]
    float32 or None, mean squared errors of a frozen reference that were measured beforehand; its pass is then not run.
    host: the same batch on the CPU, or None where this one lies there; ``labels`` are read from it without waiting.
    """

    x0: Tensor
    cond: Cond
    utility: Tensor
    valid: Tensor
    key: Tensor
    soft: Tensor | None = None
    place: Tensor | None = None
    steps: Steps | None = None
    reference_error: Tensor | None = None
    host: Batch | None = None

    @property
    def labels(self) -> Batch:
        """Where utility, valid, soft and masks can be asked for indices without stopping the device."""
        return self.host or self

    @property
    def groups(self) -> int:
        return self.x0.shape[0]

    @property
    def k(self) -> int:
        return self.x0.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Noised(_Movable):
    """Noisy candidates: ``xt = alpha * x0 + sigma * noise``. x0, xt, noise: [N, *S]; t, alpha, sigma, log_snr: [N] float32."""

    x0: Tensor
    xt: Tensor
    noise: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked(_Movable):
    """Text with masked tokens. x0, xt: [N, L] int64, before and after; masked: [N, L] bool, where they differ in kind; places:
    [M] int64, where those lie in the rows put end to end: how many there are, a device would have to be waited for.

    t: [N] float32, the share of the answer that is masked, or its expectation. weight: [N] float32, what the summed
    log-probabilities of the masked tokens are multiplied by to estimate the bound on the answer's log-likelihood.
    """

    x0: Tensor
    xt: Tensor
    masked: Tensor
    places: Tensor
    t: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Log-likelihood surrogates in nats per latent element (a mean, not a sum: ``-1/2 * weight * error``), of text in nats per
    answer (a sum over its tokens).

    policy: [B, K] float32 with grad. reference: the same under the reference set, or None. error: [B, K] float32 with grad,
    mean squared error per element in the model's native space, before weighting; of text minus ``policy`` per answer token.
    reference_error: the same, or None.
    t: [B, K] float32, time used (mean over draws). anchor: [B, K] float32 with grad, 1/2 * weight * mean squared difference of
    the predictions of policy and base model, for methods that penalise it, else None. importance: [B] float32 or None, what
    the group's loss is multiplied by when its time was drawn from a density that is to be divided out.
    """

    policy: Tensor
    reference: Tensor | None
    error: Tensor
    reference_error: Tensor | None
    t: Tensor
    anchor: Tensor | None = None
    importance: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """[B, K]: ``policy - reference``, or ``policy`` when reference-free."""
        return self.policy if self.reference is None else self.policy - self.reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """per_group: [B] float32 with grad, summed over the group's pairs, 0 where no pair is valid.

    metrics: detached values of any length; the loop averages each once over the whole step and skips NaN entries.
    observed: name -> (sum, count), statistics offered to ``Memory``.
    """

    per_group: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Tensor, group: Tensor, batch: Batch, **metrics: Tensor) -> Loss:
        """rows: [P] losses of the pairs; group: [P] index of each pair's group."""
        total = rows.new_zeros(batch.groups).index_add(0, group, rows)
        return cls(per_group=total, metrics={name: value.detach() for name, value in metrics.items()})


class Memory:
    """Named running means that a method reads (last step's value) and offers to (this step's sum and count).

    Updated once a step from global sums, so independent of micro-batching and world size, with a lag of one step. A name that
    ends in "@0.9" has that decay instead of the common one; "@0" is the last step's own mean.
    """

    def __init__(self, decay: float = 0.99):
        self.decay, self.values = decay, {}

    def _decay(self, name: str) -> float:
        return float(name.rpartition("@")[2]) if "@" in name else self.decay

    def read(self, name: str, default: float = 0.0) -> float:
        return self.values.get(name, default)

    def forget(self) -> None:
        """Every mean is void: what was measured against is no longer there."""
        self.values.clear()

    def update(self, observed: dict[str, tuple[float, float]]) -> None:
        """observed: name -> (global sum, global count)."""
        for name, (total, count) in observed.items():
            if count > 0:
                old = self.values.get(name, total / count)
                decay = self._decay(name)
                self.values[name] = decay * old + (1 - decay) * total / count
