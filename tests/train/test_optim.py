"""Optimizers, schedules, the moving average, and their state by name."""

import sys

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.train.optim import (
    Average,
    build_optimizer,
    learning_rates,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)

from . import toy


def params(seed=0):
    return dict(sorted(toy.Net(seed).named_parameters()))


def walk(p, optimizer, steps, average=None):
    """A few updates with keyed gradients."""
    for step in range(steps):
        torch.manual_seed(step)
        for tensor in p.values():
            tensor.grad = torch.randn_like(tensor)
        optimizer.step()
        if average is not None:
            average.update()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_round_trips_by_name(name):
    """7 updates = 4, saved and loaded into a fresh optimizer, and 3 more (with gradients 4, 5, 6 repeated as 0, 1, 2)."""
    spec = toy.spec(optimizer=name)
    a, b = params(), params()
    first, second = build_optimizer(a, spec), build_optimizer(b, spec)
    walk(a, first, 4)
    tensors, scalars = optimizer_state(first, a)
    assert {path.rsplit("/", 1)[0] for path in tensors} == set(a)
    for tensor_a, tensor_b in zip(a.values(), b.values()):
        tensor_b.data.copy_(tensor_a)
    load_optimizer_state(second, b, {path: t.clone() for path, t in tensors.items()}, scalars)
    walk(a, first, 3)
    walk(b, second, 3)
    assert all(torch.equal(a[name], b[name]) for name in a)
    again, numbers = optimizer_state(second, b)
    assert numbers == optimizer_state(first, a)[1]
    steps = {path: t.item() for path, t in again.items() if path.endswith("/step")} or {
        name: entries["step"] for name, entries in numbers.items()}
    assert set(steps.values()) == {7} and len(steps) == len(a)


class _Nesting(torch.optim.AdamW):
    """As bitsandbytes 0.50: moments lie one dictionary deeper in what it hands out, and are taken back from either place."""

    def state_dict(self):
        found = super().state_dict()
        return {**found, "state": {i: {"step": entries["step"], "hidden": {"exp_avg": entries["exp_avg"],
                                                                           "exp_avg_sq": entries["exp_avg_sq"]}}
                                   for i, entries in found["state"].items()}}


def test_nested_entries_are_stored_beside_the_others():
    a, b = params(), params()
    first, second = _Nesting(a.values(), lr=1e-3), _Nesting(b.values(), lr=1e-3)
    walk(a, first, 2)
    walk(b, second, 1)
    tensors, scalars = optimizer_state(first, a)
    assert scalars == {} and set(tensors) == {f"{name}/{key}" for name in a for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, tensor in b.items():
        tensor.data.copy_(a[name])
    load_optimizer_state(second, b, {path: tensor.clone() for path, tensor in tensors.items()}, scalars)
    walk(a, first, 2)
    walk(b, second, 2)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_adafactor_is_told_not_to_scale():
    """scale_parameter, relative_step and warmup_init off: the first update is lr * sign-like, root mean square 1."""
    p = params()
    optimizer = build_optimizer(p, toy.spec(optimizer="adafactor", adam_weight_decay=0.0))
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("scale_parameter", "relative_step", "warmup_init", "clip_threshold", "lr")] == [
        False, False, False, 1.0, 1e-3]


def test_adamw_takes_the_recipe():
    group = build_optimizer(params(), toy.spec(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
                                               adam_weight_decay=0.1)).param_groups[0]
    assert [group[key] for key in ("betas", "eps", "weight_decay", "lr")] == [(0.8, 0.95), 1e-6, 0.1, 1e-3]


def test_missing_bitsandbytes_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"^train.optimizer: adamw_8bit needs bitsandbytes.*diffalign\[8bit\]"):
        build_optimizer(params(), toy.spec(optimizer="adamw_8bit"))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer({}, toy.spec())


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_rates_are_diffusers_schedules(schedule):
    """The pure function equals stepping diffusers' scheduler."""
    from diffusers.optimization import get_scheduler
    spec = toy.spec(lr_scheduler=schedule, lr_warmup_steps=3, max_train_steps=12)
    rate = learning_rates(spec)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=spec.learning_rate)
    walked = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=12)
    for step in range(12):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        walked.step()


def test_warm_up_arithmetic():
    """lr 1e-3, warm-up 4: 0, 1/4, 2/4, 3/4, 1, 1; a cosine over 4 more steps: (1 + cos(pi k/4))/2."""
    rate = learning_rates(toy.spec(lr_scheduler="constant_with_warmup", lr_warmup_steps=4))
    assert [rate(step) for step in range(6)] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    rate = learning_rates(toy.spec(lr_scheduler="cosine", lr_warmup_steps=4, max_train_steps=8))
    assert [rate(step) for step in range(4, 8)] == pytest.approx([1e-3, 0.85355339e-3, 0.5e-3, 0.14644661e-3])


def test_the_rate_reaches_the_optimizer(tmp_path):
    rates = []

    class Watch:
        def after_step(self, state, report):
            rates.append(state.learning_rate)

    toy.train(tmp_path, hooks=[Watch()], lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=6)
    assert rates == pytest.approx([0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4])
    optimizer = build_optimizer(params(), toy.spec())
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_average_is_the_one_of_the_formula():
    """diffusers' warm-up of the decay: min(0.9, (1 + s)/(10 + s)) with s = update - 1, and 0 for the first update."""
    p = params()
    optimizer, average = build_optimizer(p, toy.spec()), Average(p, 0.9)
    expected = {name: tensor.detach().clone() for name, tensor in p.items()}
    for update in range(1, 6):
        walk(p, optimizer, 1, average)
        decay = 0.0 if update == 1 else min(0.9, update / (9 + update))
        for name, tensor in p.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.detach()
    tensors, numbers = average.state()
    assert numbers == {"optimization_step": 5}
    for name in p:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-5, atol=1e-7)


def test_swapping_in_is_undone_also_on_an_error():
    p = params()
    average = Average(p, 0.9)
    walk(p, build_optimizer(p, toy.spec()), 3, average)
    trained = {name: tensor.detach().clone() for name, tensor in p.items()}
    with pytest.raises(KeyError), average.swapped_in():
        assert all(torch.equal(p[name], shadow) for name, shadow in average.state()[0].items())
        raise KeyError
    assert all(torch.equal(p[name], trained[name]) for name in p)
