"""References that move: copies, gates, past checkpoints, and what a checkpoint holds of them."""

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.models.references import Frozen, Moving, Past

from . import tiny
from .test_weights import RANK_4, bank_of, predict

SETS = ("policy", "reference", "origin")


@pytest.fixture
def sdxl(folders):
    return folders("sdxl")


def nudge(bank):
    """One "training step": other weights than before."""
    tiny.perturb(bank.trainable().values(), scale=0.02)


def outputs(bank, inputs):
    return {name: predict(bank, name, inputs) for name in bank.names}


@pytest.mark.parametrize("lora", [RANK_4, None])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_copy_makes_the_reference_the_policy(sdxl, lora, autocast):
    bank = bank_of(sdxl, lora, reads=SETS, rule=Moving(every=2), forward_dtype=autocast or torch.float32)
    inputs = tiny.random_input(bank.denoiser)
    start = predict(bank, "policy", inputs, autocast)
    for name in ("current", "reference", "origin"):
        assert torch.equal(predict(bank, name, inputs, autocast), start), name
    nudge(bank)
    assert bank.advance(0) == {}
    moved = predict(bank, "policy", inputs, autocast)
    assert torch.equal(predict(bank, "reference", inputs, autocast), start)
    assert torch.equal(predict(bank, "current", inputs, autocast), moved)
    assert bank.advance(1) == {"reference_copied": 1.0}
    assert torch.equal(predict(bank, "reference", inputs, autocast), moved)  # every margin is 0 again
    assert torch.equal(predict(bank, "origin", inputs, autocast), start)
    nudge(bank)
    assert torch.equal(predict(bank, "reference", inputs, autocast), moved)  # a copy, not a view
    assert all(p.requires_grad and p.grad is None for p in bank.trainable().values())


def test_a_soft_update_mixes_weights(sdxl):
    bank = bank_of(sdxl, reads=("policy", "reference"), rule=Moving(every=1, mix=0.25))
    name = next(iter(bank.trainable()))
    old = bank.trainable()[name].detach().clone()
    nudge(bank)
    bank.advance(0)
    expected = 0.75 * old + 0.25 * bank.trainable()[name].detach()
    torch.testing.assert_close(bank.state()[f"reference/0/{name}"], expected)


@pytest.mark.parametrize("judge, thaw, copied", [
    ("candidate", False, [1, 1, 0, 0]),      # .001 and .003 pass, .006 closes the gate for good (card check 6)
    ("candidate", True, [1, 1, 0, 1]),       # .004 opens it again
])
def test_the_gate(sdxl, judge, thaw, copied):
    bank, asked = bank_of(sdxl, reads=SETS, rule=Moving(every=1, gate=0.005, judge=judge, thaw=thaw)), []
    values = iter([0.001, 0.003, 0.006, 0.004])

    def divergence(bank, name):
        asked.append(name)
        return next(values)

    bank.divergence, seen = divergence, []
    for step in range(4):
        nudge(bank)
        seen.append({n: t.clone() for n, t in bank.state().items() if n.startswith("policy/")})
        assert bank.advance(step)["reference_copied"] == copied[step]
    last = max(i for i in range(4) if copied[i])
    for name, tensor in bank.state().items():
        if name.startswith("reference/0/"):
            assert torch.equal(tensor, seen[last][name.replace("reference/0/", "policy/")])
    assert set(asked) == {"current"} and len(asked) == (4 if thaw else 3)


def test_the_literal_gate_asks_about_the_reference_and_a_negative_divergence_passes(sdxl):
    bank = bank_of(sdxl, reads=SETS, rule=Moving(every=1, gate=0.005, judge="current"))
    asked = []
    bank.divergence = lambda bank, name: asked.append(name) or -0.01
    assert bank.advance(0)["reference_copied"] == 1 and asked == ["reference"]
    bank.divergence = lambda bank, name: float("nan")
    assert bank.advance(1)["reference_copied"] == 0


def test_past_checkpoints_are_drawn_evenly_and_the_base_stays(sdxl):
    bank = bank_of(sdxl, reads=("policy", "reference"), rule=Past(every=1, keep=4))
    start = {n: p.detach().clone() for n, p in bank.trainable().items()}
    picked, weights = [], [start]
    for step in range(400):
        if step < 6:
            nudge(bank)
            weights.append({n: p.detach().clone() for n, p in bank.trainable().items()})
        figures = bank.advance(step)
        assert figures["reference_kept"] == min(step + 2, 4)
        if step >= 3:
            picked.append(int(figures["reference_picked"]))
        if step == 5:  # base, and the last three of six
            for number, kept in enumerate((0, 4, 5, 6)):
                for name, tensor in weights[kept].items():
                    assert torch.equal(bank.state()[f"reference/{number}/{name}"], tensor)
    counts = torch.bincount(torch.tensor(picked), minlength=4)
    assert (counts - 99).abs().max() < 4 * (397 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("pick, stage", [("first", 0), ("latest", 1)])
def test_past_strategies(sdxl, pick, stage):
    bank = bank_of(sdxl, reads=("policy", "reference"), rule=Past(every=1, keep=3, pick=pick))
    inputs = tiny.random_input(bank.denoiser)
    start = predict(bank, "reference", inputs)
    nudge(bank)
    assert bank.advance(0)["reference_picked"] == stage
    assert torch.equal(predict(bank, "reference", inputs), start) == (pick == "first")


@pytest.mark.parametrize("rule", [Moving(every=1, gate=0.1), Past(every=1, keep=3)])
def test_a_checkpoint_holds_the_moving_sets_and_their_marks(sdxl, rule):
    first = bank_of(sdxl, reads=SETS, rule=rule)
    first.divergence = second_divergence = lambda bank, name: 1.0 if name == "current" else 0.0
    for step in range(5):
        nudge(first)
        first.advance(step)
    second = bank_of(sdxl, reads=SETS, rule=rule, seed=1)
    second.divergence = second_divergence
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    second._seed = first._seed
    inputs = tiny.random_input(first.denoiser)
    for name in SETS:
        assert torch.equal(predict(first, name, inputs), predict(second, name, inputs)), name
    assert first.advance(5) == second.advance(5)
    assert first.state().keys() == second.state().keys()
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())


def test_frozen_keeps_what_it_was(sdxl):
    """A rule costs nothing where no reference is read, and the frozen one stores nothing."""
    frozen, unread = bank_of(sdxl), bank_of(sdxl, reads=("policy",), rule=Moving())
    assert all(name.startswith("policy/") for bank in (frozen, unread) for name in bank.state())
    assert frozen.identity.startswith("adapter_off:") and unread.identity == "none" and isinstance(unread.rule, Frozen)
    assert bank_of(sdxl, rule=Moving()).identity.startswith("moving:adapter_off:")


def test_many_full_checkpoints_are_refused(sdxl):
    with pytest.raises(ConfigError, match="model.lora"):
        bank_of(sdxl, None, rule=Past())


@pytest.mark.parametrize("build, words", [
    (lambda: Moving(every=0), "every must"), (lambda: Moving(mix=0), "mix must"),
    (lambda: Moving(origin_share=1), "origin_share"), (lambda: Moving(thaw=True), "thaw"),
    (lambda: Moving(judge="current"), "judge"),
    (lambda: Past(keep=1), "keep must"), (lambda: Past(every=0), "every must")])
def test_bad_rules(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_new_reference_says_so(sdxl):
    """Running means of log-ratios against the old one are void (timestep_aware_dpo.md 8: KTO's baseline starts again at 0)."""
    def told(rule, steps):
        bank, seen = bank_of(sdxl, rule=rule), []
        for step in range(steps):
            nudge(bank)
            bank.advance(step)
            seen.append(bank.renewed)
        return seen

    assert told(Moving(every=2), 4) == [False, True, False, True] and told(Moving(every=1, mix=0.01), 2) == [False, False]
    assert told(Past(every=1, keep=2, pick="latest"), 3) == [True] * 3
    assert told(Past(every=1, keep=2, pick="first"), 3) == [False] * 3 and told(Frozen(), 2) == [False, False]


def test_which_past_checkpoint_is_new(sdxl):
    """By their weights: the same checkpoint may move down one place when the oldest goes."""
    bank = bank_of(sdxl, rule=Past(every=1, keep=3))
    name, seen = next(iter(bank.trainable())), set()
    for step in range(40):
        before = bank._moved[int(bank._mark[1])][name].clone()
        nudge(bank)
        bank.advance(step)
        after = bank._moved[int(bank._mark[1])][name]
        assert bank.renewed == (not torch.equal(before, after))
        seen.add(bank.renewed)
    assert seen == {False, True}
