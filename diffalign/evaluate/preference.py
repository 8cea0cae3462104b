"""Held-out preference accuracy on fixed draws: does the model now find the preferred picture more likely?

Two questions, answered on the same (pair, time, noise) draws at every call, so that a change is the model's and not chance's:

accuracy            the implicit reward's: share of pairs with  log p_policy/p_reference(winner) > the same of the loser.
                    Before training policy = reference, every log-ratio is exactly 0, every pair a tie: 0.5 by definition.
likelihood_accuracy the model's own: share of pairs whose winner it denoises better (lower error). Before training this is
                    the base model's and says how far the base already agrees with the preferences; it need not be 0.5.

Both average the margins over a pair's draws before taking the sign; ``per_draw`` takes the sign of every draw instead, which
is what training sees and is always closer to one half. Times are stratified: draw d of n lies in [d/n, (d+1)/n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from .. import rng
from ..likelihood import CodeLikelihood, MaskedELBO, Simple, Weighting
from ..methods.base import Context
from ..objectives import BestWorst
from ..process import Independent, NoisePlan, Shared, Stratified, draw_keys
from ..types import Batch, Noised
from ..world import Single, World
from .shards import exchange
from .statistics import wilson

BINS = 5
SIMPLE, INDEPENDENT, ALONE = Simple(), Independent(), Single()


def stratified(seed: int, keys: Tensor, draws: int) -> Tensor:
    """Draw d of n has a time in [d/n, (d+1)/n): keys [N, J] int64, their last number d -> [N] float64."""
    return (keys[:, -1].double() + rng.uniform(seed, "time", keys)) / draws


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Per pair and draw, [P, D] float32 on the CPU, in nats per latent element (text: per answer); mergeable across processes.

    policy, reference: winner's minus loser's likelihood surrogate (-1/2 W error) under each set; reference None when there
    is none. win_error, lose_error: policy's error minus the reference's (or the error itself without one). t: times.
    """

    policy: Tensor
    reference: Tensor | None
    win_error: Tensor
    lose_error: Tensor
    t: Tensor

    @classmethod
    def merge(cls, parts: list[Margins]) -> Margins:
        """All pairs of several batches or processes."""
        def cat(name):
            return torch.cat([getattr(part, name) for part in parts])

        reference = None if parts[0].reference is None else cat("reference")
        return cls(policy=cat("policy"), reference=reference, win_error=cat("win_error"), lose_error=cat("lose_error"),
                   t=cat("t"))


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """value: share of pairs ordered right, ties one half, with Wilson's 95 % interval over pairs. per_draw: the same of
    single draws. by_time: single draws by fifths of time, nearly clean first; None where a fifth has no draw. by_time_low,
    by_time_high: their 95 % intervals, over the pairs that have a draw there, however many draws each has.
    """

    value: float
    low: float
    high: float
    per_draw: float
    by_time: list[float | None]
    by_time_low: list[float | None]
    by_time_high: list[float | None]


@dataclass(frozen=True, kw_only=True)
class HeldoutPreference:
    """pairs, draws: size of the measurement. accuracy: implicit reward (None without a reference). likelihood_accuracy: of
    the policy; reference_likelihood_accuracy: of the reference, that is the policy before training. margin: mean log-ratio
    margin. win_error_change, lose_error_change: policy minus reference; both rising means that losers are ruined, not
    winners improved (None without a reference).
    """

    pairs: int
    draws: int
    accuracy: Accuracy | None
    likelihood_accuracy: Accuracy
    reference_likelihood_accuracy: Accuracy | None
    margin: float
    win_error_change: float | None
    lose_error_change: float | None

    def figures(self) -> dict[str, float]:
        """Flat numbers for the log, by the names that the report's curves look for behind "validation/"."""
        implicit = {} if self.accuracy is None else {
            "accuracy": self.accuracy.value, "accuracy_low": self.accuracy.low, "accuracy_high": self.accuracy.high,
            "win_error_change": self.win_error_change, "lose_error_change": self.lose_error_change}
        return {"likelihood_accuracy": self.likelihood_accuracy.value, "margin": self.margin, **implicit}


@torch.no_grad()
def heldout_preference(ctx: Context, batches: Sequence[Batch], *, draws: int = 8, against: str | None = "reference",
                       weighting: Weighting = SIMPLE, known: dict[bytes, Tensor] | None = None, device=None,
                       world: World = ALONE) -> HeldoutPreference | None:
    """ctx: predict(name, xt, t, cond), process, param, seed (its step and memory are not read). batches: held-out groups.

    against: None for a bank without a reference; ``accuracy`` is then None. weighting: the estimator's own, so that the
    margin is the one that is trained. known: errors of ``against`` by batch, read and added to, for a reference that stays:
    measured again and again, it is asked once. None when no batch holds a pair. world: its processes share the batches, and
    all have the figures of one process, to the last bit.
    """
    def of(batch: Batch) -> dict[str, Tensor | None]:
        return vars(measure(ctx, batch, draws, against, weighting, known))

    return _summarised(_dealt(batches, of, device, world))


def _summarised(parts: list[dict[str, Tensor]]) -> HeldoutPreference | None:
    """parts: fields of ``Margins``, one batch each."""
    margins = [Margins(**{"reference": None, **part}) for part in parts if len(part["policy"])]
    return summarise(Margins.merge(margins)) if margins else None


def _dealt(batches: Sequence[Batch], of: Callable[[Batch], dict[str, Tensor | None]], device, world: World
           ) -> list[dict[str, Tensor]]:
    """of(batch) -> tensors by name, None left out: those of every batch, in order, on all processes.

    All make the same number of passes, as weights that are cut demand: who has no batch left takes the last again.
    """
    found, count = {}, len(batches)
    for number in range(world.rank, -(-count // world.size) * world.size, world.size):
        batch = batches[min(number, count - 1)]
        values = of(batch if device is None else batch.to(device))
        if number < count:
            found |= {f"{number}/{name}": x.numpy() for name, x in values.items() if x is not None}
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for path, array in exchange(world, lambda: found).items():
        number, name = path.split("/")
        parts[int(number)][name] = torch.from_numpy(array)
    return parts


@torch.no_grad()
def measure(ctx: Context, batch: Batch, draws: int, against: str | None, weighting: Weighting = SIMPLE,
            known: dict[bytes, Tensor] | None = None) -> Margins:
    """One batch of B groups; the model sees B*K rows at a time, one draw after another, reference first. known: see
    ``heldout_preference``."""
    ctx, keys = replace(ctx, seed=rng.integer(ctx.seed, "heldout")), draw_keys(batch.key, draws)
    noised = Shared().draw(batch, ctx, keys, stratified(ctx.seed, keys, draws))
    cond, rows = batch.cond.rows(batch.k), batch.groups * batch.k
    parts = [_rows(noised, slice(d * rows, (d + 1) * rows)) for d in range(draws)]
    weight = torch.stack([weighting(part, ctx.param, ctx.process).view(batch.groups, batch.k) for part in parts])

    def errors(name):
        return torch.stack([_error(ctx, name, part, cond).view(batch.groups, batch.k) for part in parts])  # [D, B, K]

    known, rows_of = {} if known is None else known, batch.key.cpu().numpy().tobytes()
    if against is not None and rows_of not in known:
        known[rows_of] = errors(against)
    reference, policy = known.get(rows_of), errors("policy")
    b, w, l = _decided(batch)
    change = policy if reference is None else policy - reference

    def margin(error):
        score = -0.5 * weight * error
        return (score[:, b, w] - score[:, b, l]).T.float().cpu()

    times = torch.stack([part.t.view(batch.groups, batch.k) for part in parts])[:, b, w]
    return Margins(policy=margin(policy), reference=None if reference is None else margin(reference), t=times.T.cpu(),
                   win_error=change[:, b, w].T.float().cpu(), lose_error=change[:, b, l].T.float().cpu())


@torch.no_grad()
def heldout_text(ctx: Context, batches: Sequence[Batch], estimator: MaskedELBO, *, draws: int = 8,
                 against: str | None = "reference", device=None, world: World = ALONE) -> HeldoutPreference | None:
    """``heldout_preference`` of a masked language model: bounds in nats per answer, a mask in each of ``draws`` time strata.

    estimator: its form is kept. The change of error is per answer token.
    """
    ctx = replace(ctx, seed=rng.integer(ctx.seed, "heldout"))
    estimator = replace(estimator, draws=draws, masks_per_time=1, share_times=False,
                        sequence=Stratified(strata=draws) if draws > 1 else estimator.sequence)
    return _summarised(_dealt(batches, lambda batch: vars(_text_margins(ctx, batch, estimator, against)), device, world))


@torch.no_grad()
def heldout_codes(ctx: Context, batches: Sequence[Batch], estimator: CodeLikelihood, *, against: str | None = "reference",
                  device=None, world: World = ALONE) -> HeldoutPreference | None:
    """``heldout_preference`` of token music: exact log-likelihoods in nats per clip, so one draw. The change of error is per
    code."""
    return _summarised(_dealt(batches, lambda batch: vars(_code_margins(ctx, batch, estimator, against)), device, world))


def _code_margins(ctx: Context, batch: Batch, estimator: CodeLikelihood, against: str | None) -> Margins:
    est = estimator(batch, ctx, against)
    b, w, l = _decided(batch)
    change = est.error if against is None else est.error - est.reference_error

    def margin(likelihood: Tensor) -> Tensor:
        return (likelihood[b, w] - likelihood[b, l])[:, None].cpu()

    return Margins(policy=margin(est.policy), reference=None if against is None else margin(est.reference),
                   win_error=change[b, w][:, None].cpu(), lose_error=change[b, l][:, None].cpu(), t=est.t[b, w][:, None].cpu())


def _text_margins(ctx: Context, batch: Batch, estimator: MaskedELBO, against: str | None) -> Margins:
    """A row's place in the order of strata is its own number: a measurement does not depend on the cut into batches."""
    masked = estimator.masked(replace(batch, place=batch.key[:, 0]), ctx)
    bounds = {name: estimator.bound(estimator.predict(ctx, name, masked, batch), masked, batch)
              for name in (*filter(None, (against,)), "policy")}  # [D, B, K] each
    b, w, l = _decided(batch)
    error = {name: -bound / batch.cond.extra["answer"].sum(2) for name, bound in bounds.items()}
    change = error["policy"] if against is None else error["policy"] - error[against]

    def margin(bound):
        return (bound[:, b, w] - bound[:, b, l]).T.cpu()

    return Margins(policy=margin(bounds["policy"]), reference=None if against is None else margin(bounds[against]),
                   win_error=change[:, b, w].T.cpu(), lose_error=change[:, b, l].T.cpu(),
                   t=masked.t.view_as(bounds["policy"])[:, b, w].T.cpu())


def summarise(margins: Margins) -> HeldoutPreference:
    """margins: all pairs."""
    ratio = None if margins.reference is None else margins.policy - margins.reference
    pairs, draws = margins.policy.shape
    return HeldoutPreference(
        pairs=pairs, draws=draws, accuracy=None if ratio is None else _accuracy(ratio, margins.t),
        likelihood_accuracy=_accuracy(margins.policy, margins.t),
        reference_likelihood_accuracy=None if ratio is None else _accuracy(margins.reference, margins.t),
        margin=float((margins.policy if ratio is None else ratio).mean()),
        win_error_change=None if ratio is None else float(margins.win_error.mean()),
        lose_error_change=None if ratio is None else float(margins.lose_error.mean()))


def before_and_after(after: HeldoutPreference, before: HeldoutPreference | None = None) -> dict:
    """The report's ``heldout_preference_accuracy``: before, after, and what is needed to read them; JSON-ready.

    With a reference, "before" is 0.5 by definition and the base's likelihood accuracy comes with the same measurement.
    Without one, both are the plain likelihood accuracy and ``before`` must have been measured ahead of training.
    """
    if after.accuracy is not None:
        chosen, start, kind = after.accuracy, 0.5, "implicit reward (log-ratio of policy and reference)"
        likelihood_before = after.reference_likelihood_accuracy
    else:
        chosen, kind = after.likelihood_accuracy, "likelihood of the policy (there is no fixed reference)"
        likelihood_before = None if before is None else before.likelihood_accuracy
        start = None if likelihood_before is None else likelihood_before.value
    return {"before": start, "after": chosen.value, "after_low": chosen.low, "after_high": chosen.high, "of": kind,
            "per_draw": chosen.per_draw, "by_time": chosen.by_time, "by_time_low": chosen.by_time_low,
            "by_time_high": chosen.by_time_high, "pairs": after.pairs, "draws": after.draws,
            "margin": after.margin, "win_error_change": after.win_error_change,
            "lose_error_change": after.lose_error_change,
            "likelihood_accuracy": {"before": None if likelihood_before is None else asdict(likelihood_before),
                                    "after": asdict(after.likelihood_accuracy)}}


# --- scores of a latent reward model ---

@dataclass(frozen=True, kw_only=True)
class HeldoutScores:
    """How often a latent reward model scores the preferred picture higher. margin: mean difference of scores, in logits."""

    pairs: int
    draws: int
    accuracy: Accuracy
    margin: float

    def figures(self) -> dict[str, float]:
        """Flat numbers for the log; accuracy_t0 is that of single draws that are nearly clean, accuracy_t4 nearly noise."""
        found = self.accuracy
        bins = {f"accuracy_t{i}": value for i, value in enumerate(found.by_time) if value is not None}
        return {"accuracy": found.value, "accuracy_low": found.low, "accuracy_high": found.high, "margin": self.margin, **bins}

    def tree(self) -> dict:
        """The report's ``heldout_preference_accuracy``; JSON-ready."""
        found = asdict(self.accuracy)
        return {"before": None, "after": found.pop("value"), "after_low": found.pop("low"), "after_high": found.pop("high"),
                "of": "scores of the latent reward", **found, "pairs": self.pairs, "draws": self.draws,
                "margin": self.margin, "likelihood_accuracy": {"before": None, "after": None}}


@torch.no_grad()
def heldout_scores(ctx: Context, batches: Sequence[Batch], *, draws: int = 10, noise: NoisePlan = INDEPENDENT, device=None,
                   world: World = ALONE) -> HeldoutScores | None:
    """ctx: predict("policy", ...) gives scores [N]. The same (pair, time, noise) draws at every call. None without a pair.
    world: its processes share the batches."""
    ctx = replace(ctx, seed=rng.integer(ctx.seed, "heldout"))
    parts = _dealt(batches, lambda batch: _score_margins(ctx, batch, draws, noise), device, world)
    parts = [part for part in parts if len(part["margin"])]
    if not parts:
        return None
    margin, t = (torch.cat([part[name] for part in parts]) for name in ("margin", "t"))
    return HeldoutScores(pairs=len(margin), draws=draws, accuracy=_accuracy(margin, t), margin=float(margin.mean()))


def _score_margins(ctx: Context, batch: Batch, draws: int, noise: NoisePlan) -> dict[str, Tensor]:
    """margin: winner's score minus the loser's; t: times. [P, D] each, on the CPU."""
    b, w, l = _decided(batch)
    cond, margins, times = batch.cond.rows(batch.k), [], []
    for keys in draw_keys(batch.key, draws).split(batch.groups):
        noised = noise.draw(batch, ctx, keys, stratified(ctx.seed, keys, draws))
        scores = ctx.predict("policy", noised.xt, noised.t, cond).float().view(batch.groups, batch.k)
        margins.append((scores[b, w] - scores[b, l]).cpu())
        times.append(noised.t.view_as(scores)[b, w].cpu())
    return {"margin": torch.stack(margins, 1), "t": torch.stack(times, 1)}


def _decided(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Group, winner and loser of the pairs that are no ties: soft labels keep those, which nobody can order right."""
    b, w, l = BestWorst()(batch)
    decided = batch.utility[b, w] > batch.utility[b, l]
    return b[decided], w[decided], l[decided]


def _rows(noised: Noised, part: slice) -> Noised:
    return Noised(x0=noised.x0[part], xt=noised.xt[part], noise=noised.noise[part], t=noised.t[part],
                  alpha=noised.alpha[part], sigma=noised.sigma[part], log_snr=noised.log_snr[part])


def _error(ctx: Context, name: str, noised: Noised, cond) -> Tensor:
    """Mean squared error per element, in float32: [N]."""
    raw = ctx.predict(name, noised.xt, noised.t, cond)
    return (ctx.param.target(noised) - raw.float()).square().flatten(1).mean(1)


def _accuracy(margin: Tensor, t: Tensor) -> Accuracy:
    """margin, t: [P, D]."""
    right = _right(margin.double().mean(1))
    single = _right(margin)
    low, high = wilson(float(right.mean()), len(right))
    index = (t * BINS).long().clamp(0, BINS - 1)
    by_time, by_time_low, by_time_high = zip(*(_bin(single, index == i) for i in range(BINS)), strict=True)
    return Accuracy(value=float(right.mean()), low=low, high=high, per_draw=float(single.mean()), by_time=list(by_time),
                    by_time_low=list(by_time_low), by_time_high=list(by_time_high))


def _bin(single: Tensor, there: Tensor) -> tuple[float | None, float | None, float | None]:
    """Share and interval of the draws that are ``there``. Draws of one pair are alike, so pairs are what is counted."""
    if not there.any():
        return None, None, None
    share = float(single[there].mean())
    return share, *wilson(share, int(there.any(1).sum()))


def _right(margin: Tensor) -> Tensor:
    """1 for a positive margin, 1/2 for exactly 0, else 0."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()
