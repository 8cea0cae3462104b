"""Held-out accuracy on fixed draws, against models whose errors are known."""

from __future__ import annotations

import pytest
import torch

from diffalign import rng
from diffalign.evaluate.preference import Margins, before_and_after, heldout_preference, measure, stratified, summarise
from diffalign.likelihood import MinSNR
from diffalign.methods import Context
from diffalign.process import Eps, VariancePreserving
from diffalign.types import Batch, Cond, Memory

PROCESS = VariancePreserving(torch.linspace(0.999, 0.01, 1000))
SHAPE = (2, 4, 4)


def batch(rows, utility=(1.0, 0.0), k=2) -> Batch:
    """Winners are filled with 1, losers with -1: a model can tell them apart by the sign of x0."""
    rows = torch.as_tensor(rows)
    sign = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    x0 = sign + 0.1 * rng.normal(0, "x0", rows[:, None], (k, *SHAPE))
    return Batch(
        x0=x0,
        cond=Cond(tokens=torch.zeros(len(rows), 3, 5)),
        valid=torch.ones(len(rows), k, dtype=torch.bool),
        utility=torch.tensor([utility] * len(rows)),
        key=torch.stack([rows, torch.zeros_like(rows)], 1),
    )


class Model:
    """Knows the winners' x0 (1) or the losers' (-1), or nothing; counts its calls."""

    def __init__(self, **believes):
        self.believes, self.calls, self.seen = believes, [], []

    def __call__(self, name, xt, t, cond):
        assert not torch.is_grad_enabled() and len(cond.tokens) == len(xt)
        self.calls.append(name)
        self.seen.append((name, xt, t))
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in PROCESS.coefficients(t))
        return (xt - alpha * self.believes[name]) / sigma


def context(model, seed=0) -> Context:
    return Context(predict=model, process=PROCESS, param=Eps(), seed=seed, step=0, memory=Memory())


def test_policy_that_knows_winners_is_always_right():
    found = heldout_preference(context(Model(policy=1.0, reference=0.0)), [batch([0, 1, 2]), batch([3, 4])], draws=4)
    assert (found.pairs, found.draws, found.accuracy.value, found.likelihood_accuracy.value) == (5, 4, 1.0, 1.0)
    assert found.win_error_change < 0 < found.lose_error_change and found.margin > 0
    wrong = heldout_preference(context(Model(policy=-1.0, reference=0.0)), [batch(range(5))], draws=4)
    assert wrong.accuracy.value == 0.0 and wrong.accuracy.by_time == [0.0] * 5 or None in wrong.accuracy.by_time


def test_a_reference_that_stays_is_asked_once():
    known, batches = {}, [batch([0, 1, 2]), batch([3, 4])]
    first, second = Model(policy=0.3, reference=0.0), Model(policy=0.7, reference=0.0)
    heldout_preference(context(first), batches, draws=4, known=known)
    found = heldout_preference(context(second), batches, draws=4, known=known)
    assert first.calls.count("reference") == 2 * 4 and set(second.calls) == {"policy"}
    assert found == heldout_preference(context(Model(policy=0.7, reference=0.0)), batches, draws=4)


def test_before_training_it_is_one_half_by_definition():
    """Policy = reference: every log-ratio is exactly 0; the base's own likelihood accuracy is not 0.5."""
    found = heldout_preference(context(Model(policy=1.0, reference=1.0)), [batch(range(6))])
    assert found.accuracy.value == 0.5 == found.accuracy.per_draw and found.margin == 0.0
    assert found.likelihood_accuracy.value == 1.0 == found.reference_likelihood_accuracy.value


def test_margin_by_hand():
    """Eps model that answers x0 = c: error = (alpha/sigma)^2 (x0 - c)^2, so the log-ratio margin is
    -1/2 snr [(1-1)^2 - (1-0)^2 - (-1-1)^2 + (-1-0)^2] = -1/2 snr (0 - 1 - 4 + 1) = 2 snr for x0 = +-1, c = 1, reference 0.
    """
    exact = batch([0])
    exact = Batch(**{**{name: getattr(exact, name) for name in ("cond", "utility", "valid", "key")}, "x0": exact.x0.sign()})
    margins = measure(context(Model(policy=1.0, reference=0.0)), exact, 4, "reference")
    alpha, sigma = PROCESS.coefficients(margins.t[0])
    assert torch.allclose((margins.policy - margins.reference)[0], 2 * (alpha / sigma) ** 2, rtol=1e-3)
    weighted = measure(context(Model(policy=1.0, reference=0.0)), exact, 4, "reference", MinSNR(gamma=0.5))
    expected = 2 * (alpha / sigma).square().clamp(max=0.5)
    assert torch.allclose((weighted.policy - weighted.reference)[0], expected, rtol=1e-3)


def test_draws_are_fixed_shared_and_independent_of_the_batch():
    model = Model(policy=1.0, reference=0.0)
    together = measure(context(model), batch([5, 6, 7]), 3, "reference")
    alone = [measure(context(Model(policy=1.0, reference=0.0)), batch([row]), 3, "reference") for row in (5, 6, 7)]
    assert torch.allclose(together.policy, Margins.merge(alone).policy, rtol=1e-6)
    assert model.calls == ["reference"] * 3 + ["policy"] * 3  # the reference goes first
    for (_, xt, t), (_, xt2, t2) in zip(model.seen[:3], model.seen[3:], strict=True):
        assert torch.equal(xt, xt2) and torch.equal(t, t2)
    again = measure(context(Model(policy=1.0, reference=0.0)), batch([5, 6, 7]), 3, "reference")
    assert torch.equal(again.policy, together.policy)
    other = measure(context(Model(policy=1.0, reference=0.0), seed=1), batch([5, 6, 7]), 3, "reference")
    assert not torch.equal(other.t, together.t)


def test_times_are_stratified():
    keys = torch.cartesian_prod(torch.arange(50), torch.tensor([0]), torch.arange(8))
    t = stratified(0, keys, 8).view(50, 8)
    assert torch.equal((t * 8).floor(), torch.arange(8).expand(50, 8).double()) and len(t.unique()) == 400


def test_margins_are_averaged_before_the_sign():
    """Draws (+3, -1, -1): the pair is right, two of three draws are not. A margin of exactly 0 counts one half."""
    policy = torch.tensor([[3.0, -1.0, -1.0], [0.0, 0.0, 0.0]])
    found = summarise(
        Margins(policy=policy, reference=None, win_error=policy, lose_error=policy, t=torch.tensor([[0.1, 0.5, 0.9]] * 2))
    )
    assert found.accuracy is None and found.likelihood_accuracy.value == 0.75  # (1 + 0.5)/2
    assert found.likelihood_accuracy.per_draw == pytest.approx((1 + 0 + 0 + 3 * 0.5) / 6)
    assert found.likelihood_accuracy.by_time == [0.75, None, 0.25, None, 0.25]


def test_ties_and_invalid_groups_are_no_pairs():
    tied = batch([0, 1], utility=(1.0, 1.0))
    assert heldout_preference(context(Model(policy=1.0, reference=0.0)), [tied]) is None
    soft = Batch(
        **{name: getattr(tied, name) for name in ("x0", "cond", "utility", "valid", "key")}, soft=torch.tensor([0.5, 0.5])
    )
    assert heldout_preference(context(Model(policy=1.0, reference=0.0)), [soft]) is None
    mixed = heldout_preference(context(Model(policy=1.0, reference=0.0)), [tied, batch([2])])
    assert mixed.pairs == 1


def test_more_draws_lower_the_spread():
    """Fixed draws exist to make the figure steady: the margin of 8 stratified draws varies less between seeds than of one."""

    def spread(draws):
        values = [
            heldout_preference(context(Model(policy=0.3, reference=0.0), seed=s), [batch(range(8))], draws=draws).margin
            for s in range(8)
        ]
        return torch.tensor(values).log().std()

    assert spread(8) < 0.5 * spread(1)


def test_report_fields():
    found = heldout_preference(context(Model(policy=1.0, reference=0.0)), [batch(range(4))])
    fields = before_and_after(found)
    assert (fields["before"], fields["after"], fields["pairs"], fields["draws"]) == (0.5, 1.0, 4, 8)
    assert fields["after_low"] < 1.0 == fields["after_high"]
    assert fields["likelihood_accuracy"]["before"]["value"] == found.reference_likelihood_accuracy.value
    assert found.figures()["accuracy"] == 1.0


def test_without_a_reference_before_must_be_measured():
    after = heldout_preference(context(Model(policy=1.0)), [batch(range(4))], against=None)
    before = heldout_preference(context(Model(policy=-1.0)), [batch(range(4))], against=None)
    assert (before_and_after(after, before)["before"], before_and_after(after, before)["after"]) == (0.0, 1.0)
    assert before_and_after(after)["before"] is None and after.win_error_change is None


def test_real_bank_of_a_tiny_sdxl(tmp_path):
    """A fresh LoRA gives 0.5 exactly; moved weights give something else, and the same something at every call."""
    from diffalign.models import LoRA, WeightBank, load_denoiser

    from ..models import tiny

    denoiser = load_denoiser(tiny.spec(tiny.make("sdxl", tmp_path)))
    bank = WeightBank.build(denoiser, LoRA(rank=2), reads=("policy", "reference"), seed=0)
    ctx = Context(predict=bank.predict, process=denoiser.process, param=denoiser.param, seed=0, step=0, memory=Memory())
    rows = torch.arange(6)
    cond = Cond(tokens=torch.randn(6, 7, 20), pooled=torch.randn(6, 12), extra={"time_ids": torch.full((6, 2, 6), 16.0)})
    held = Batch(
        x0=torch.randn(6, 2, 4, 8, 8),
        cond=cond,
        utility=torch.tensor([[1.0, 0.0]] * 6),
        valid=torch.ones(6, 2, dtype=torch.bool),
        key=torch.stack([rows, 0 * rows], 1),
    )
    fresh = heldout_preference(ctx, [held], draws=4)
    assert fresh.accuracy.value == 0.5 and fresh.margin == 0.0 and fresh.pairs == 6
    tiny.perturb(bank.trainable().values(), scale=0.3)
    moved, again = (heldout_preference(ctx, [held], draws=4) for _ in range(2))
    assert moved == again and moved.margin != 0.0
    assert moved.reference_likelihood_accuracy == fresh.likelihood_accuracy
