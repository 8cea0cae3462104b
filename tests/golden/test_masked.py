"""The bound of a masked language model: vrpo.md section 8 by hand, unbiasedness by enumeration, keyed and shared masks."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from diffalign.config import build_recipe
from diffalign.likelihood import MaskedELBO
from diffalign.methods import Context, Preference
from diffalign.objectives import KTO, LINKS, ORPO, SFT, MaPO, Pairwise, Regularized
from diffalign.process import LowDiscrepancy, Masking, Random, Stratified
from diffalign.types import Batch, Cond, Memory

MASK = 9
A, B = 1, 2


def batch_of(answers, prompt=(5, 6), groups=1, key=None, place=None):
    """Groups of the same answers behind one prompt, padded with zeros."""
    length = len(prompt) + max(map(len, answers))
    rows = torch.tensor([[*prompt, *answer, *[0] * (length - len(prompt) - len(answer))] for answer in answers])
    place_of = torch.arange(length)
    answer = torch.stack([(place_of >= len(prompt)) & (place_of < len(prompt) + len(a)) for a in answers])
    attended = torch.stack([place_of < len(prompt) + len(a) for a in answers])
    k = len(answers)

    def many(x):
        return x[None].repeat(groups, 1, 1)

    return Batch(x0=many(rows), cond=Cond(extra={"answer": many(answer), "attended": many(attended)}),
                 utility=torch.arange(k, 0, -1).float()[None].repeat(groups, 1), valid=torch.ones(groups, k, dtype=torch.bool),
                 key=torch.stack([torch.arange(groups), torch.zeros(groups, dtype=torch.int64)], 1) if key is None else key,
                 place=place)


def toy_logits(xt):
    """The card's model of two tokens: p(a|MM) .5, p(b|MM) .25, p(a|M b) .8, p(b|a M) .4; other words share the rest."""
    first, second = xt[:, 2], xt[:, 3]
    p = torch.stack([torch.where(second == B, 0.8, 0.5), torch.where(first == A, 0.4, 0.25)], 1)[xt[:, 2:4] == MASK]
    token = torch.tensor([[A, B]]).expand(len(xt), 2)[xt[:, 2:4] == MASK]
    return ((1 - p) / 9).log()[:, None].repeat(1, 10).scatter(1, token[:, None], p.log()[:, None])


def context(predict=None, seed=0):
    predict = predict or (lambda name, xt, t, cond: toy_logits(xt))
    return Context(predict=predict, process=Masking(mask_id=MASK), param=None, seed=seed, step=0, memory=Memory())


TOY = batch_of([(A, B)], groups=1)
L1A, L1B, L2 = 2 * math.log(0.8), 2 * math.log(0.4), math.log(0.5) + math.log(0.25)
BOUND = ((L1A + L1B) / 2 + L2) / 2


def estimates(estimator, count):
    """As many independent estimates: groups of one, with keys of their own."""
    return estimator(batch_of([(A, B)], groups=count), context(), None).policy.double().flatten()


def test_the_cards_bound():
    # l = 1: 2 ln .8 = -.446287 and 2 ln .4 = -1.832581, mean -1.139434; l = 2: ln .5 + ln .25 = -2.079442; mean ln .2
    assert BOUND == pytest.approx(math.log(0.2), abs=1e-12)
    found = estimates(MaskedELBO(draws=1), 300)
    assert {round(x, 5) for x in found.flatten().tolist()} == {round(x, 5) for x in (L1A, L1B, L2)}


@pytest.mark.parametrize("draws, masks, variance", [(4, 1, 0.115283), (4, 2, 0.170509), (4, 4, 0.280961)])
def test_the_cards_variances(draws, masks, variance):
    # V_t = .220904 (over l), V_y = .240227 (over the choice, mean over l); V = V_t/n_t + V_y/n
    found = estimates(MaskedELBO(draws=draws, masks_per_time=masks), 4000)
    assert found.mean().item() == pytest.approx(BOUND, abs=4 * math.sqrt(variance / 4000))
    assert found.var().item() == pytest.approx(variance, rel=0.08)


def test_both_forms_estimate_one_bound():
    count, time = estimates(MaskedELBO(draws=1), 6000), estimates(MaskedELBO(draws=1, form="time", t_min=1e-3), 6000)
    # t_min leaves out a thousandth of the times: their part of the bound is at most 1e-3 * |2 ln .4 + ...| < 0.004
    assert time.mean().item() == pytest.approx(BOUND, abs=0.004 + 4 * time.std().item() / math.sqrt(6000))
    assert time.var() > 2 * count.var()


def enumerated(logp, count, tokens):
    """Mean of weight * sum of the masked tokens' log-probabilities over all masks of ``count`` tokens."""
    masks = [frozenset(chosen) for chosen in itertools.combinations(range(tokens), count)]
    return sum(tokens / count * sum(logp(masked, i) for i in masked) for masked in masks) / len(masks)


def test_the_count_form_is_unbiased_by_enumeration():
    """Every mask of 3 tokens, with its probability, against the mean over all orders of the chain rule: they are equal."""
    table = {}

    def logp(masked, place):
        return table.setdefault((masked, place), -0.1 - 0.37 * ((len(table) * 7) % 5))

    exact = sum(enumerated(logp, count, 3) for count in (1, 2, 3)) / 3
    orders = []
    for order in itertools.permutations(range(3)):
        left, total = set(range(3)), 0.0
        for place in order:
            total += logp(frozenset(left), place)
            left.remove(place)
        orders.append(total)
    assert exact == pytest.approx(sum(orders) / len(orders), abs=1e-12)

    def predict(name, xt, t, cond):
        rows = []
        for row in (xt[:, 2:5] == MASK).tolist():
            masked = frozenset(i for i in range(3) if row[i])
            rows += [[logp(masked, i)] for i in sorted(masked)]
        x = torch.tensor(rows)
        logits = torch.full((len(rows), 10), -50.0)
        logits[:, 3], logits[:, 4] = x[:, 0], torch.log1p(-x[:, 0].exp())
        return logits

    found = MaskedELBO(draws=8)(batch_of([(3, 3, 3)], groups=1000), context(predict), None).policy
    assert found.mean().item() == pytest.approx(exact, abs=4 * found.std().item() / math.sqrt(1000))


def test_masks_are_exact_and_stay_in_the_answer():
    batch = batch_of([(1, 2, 3, 4), (1, 2)], groups=3)
    masked = MaskedELBO(draws=6).masked(batch, context())
    answer = batch.cond.rows(2, 6).extra["answer"]
    assert not (masked.masked & ~answer).any() and torch.equal(masked.xt == MASK, masked.masked)
    length = answer.sum(1)
    count = masked.masked.sum(1)
    assert (count >= 1).all() and torch.allclose(masked.weight, length / count) and torch.allclose(masked.t, count / length)
    assert set(count[length == 4].tolist()) >= {1, 2, 3, 4}


def test_a_row_is_a_function_of_its_key_alone():
    """Neither other groups nor padding nor the cut into batches change a mask."""
    estimator = MaskedELBO(draws=3)
    both = batch_of([(1, 2, 3, 4), (1, 2)], groups=4)
    alone = Batch(x0=both.x0[2:3], cond=Cond(extra={n: x[2:3] for n, x in both.cond.extra.items()}), utility=both.utility[2:3],
                  valid=both.valid[2:3], key=both.key[2:3])
    whole, part = (estimator.masked(batch, context()).masked for batch in (both, alone))
    assert torch.equal(whole.view(3, 4, 2, -1)[:, 2], part.view(3, 1, 2, -1)[:, 0])
    padded = Batch(x0=torch.nn.functional.pad(alone.x0, (0, 5)), key=alone.key, utility=alone.utility, valid=alone.valid,
                   cond=Cond(extra={n: torch.nn.functional.pad(x, (0, 5)) for n, x in alone.cond.extra.items()}))
    assert torch.equal(estimator.masked(padded, context()).masked[:, :part.shape[1]], part)


def test_times_of_the_candidates():
    batch = batch_of([tuple(range(1, 9))] * 2, groups=5, place=torch.arange(5))

    def counts(**options):
        return MaskedELBO(draws=8, **options).masked(batch, context()).masked.sum(1).view(8, 5, 2)

    assert not torch.equal(counts()[..., 0], counts()[..., 1])
    assert torch.equal(counts(share_times=True)[..., 0], counts(share_times=True)[..., 1])
    together = counts(masks_per_time=4)
    assert (together[:4] == together[:1]).all() and (together[4:] == together[4:5]).all()
    # eight strata, eight tokens: each answer gets every l once
    spread = counts(sequence=Stratified(strata=8)).sort(0).values
    assert torch.equal(spread, torch.arange(1, 9)[:, None, None].expand(8, 5, 2))
    counts(sequence=LowDiscrepancy())


def test_policy_and_reference_see_the_same_masks():
    seen = {}

    def predict(name, xt, t, cond):
        seen.setdefault(name, []).append(xt)
        return toy_logits(xt)

    est = MaskedELBO(draws=4)(TOY, context(predict), {"reference": 0.5, "origin": 0.5}, anchor="origin")
    assert torch.equal(seen["policy"][0], seen["reference"][0]) and len(seen["origin"]) == 1
    assert est.log_ratio.abs().max() == 0 and est.anchor.abs().max() == 0
    assert torch.equal(est.error, -est.policy / 2)


def noisy(shift):
    """Logits of the policy that depend on ``shift``."""
    def predict(name, xt, t, cond):
        place, word = (xt == MASK).nonzero()[:, 1:].float(), torch.arange(10)[None]
        logits = torch.sin(place + word)
        return logits + shift * torch.cos(place * word) if name == "policy" else logits
    return predict


@pytest.mark.parametrize("objective", [
    *(Pairwise(beta=0.2, link=link()) for link in LINKS.values()), KTO(beta=0.1), SFT(), MaPO(beta=0.1), ORPO(),
    Regularized(objective=Pairwise(beta=0.2), sft=0.05, origin=0.1, winner=0.1)],
    ids=lambda o: f"{type(o).__name__}-{type(getattr(o, 'link', o)).__name__}")
def test_every_objective_works_on_it(objective):
    shift = torch.tensor(0.3, requires_grad=True)
    batch = batch_of([(1, 2, 3), (4, 5)], groups=4)
    method = Preference(MaskedELBO(draws=4), objective)
    ctx = replace(context(noisy(shift)), memory=Memory())
    loss = method.loss(batch, ctx)
    assert loss.per_group.shape == (4,) and loss.per_group.isfinite().all()
    loss.per_group.sum().backward()
    assert shift.grad.isfinite() and shift.grad != 0


def test_bad_options():
    for options, words in (({"draws": 0}, "draws"), ({"draws": 8, "masks_per_time": 3}, "masks_per_time"),
                           ({"t_min": 1.0}, "t_min")):
        with pytest.raises(ValueError, match=words):
            MaskedELBO(**options)
    tree = {"output_dir": "x", "model": {"pretrained_model_name_or_path": "y"}, "data": {"path": "z"},
            "objective": {"kind": "dpo", "beta": 0.2}, "likelihood": {"kind": "masked", "sequence": "stratified"}}
    assert build_recipe(tree).likelihood == MaskedELBO(sequence=Stratified())
    assert MaskedELBO().sequence == Random()
