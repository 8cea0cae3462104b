"""How often a step waits for the device, and how many passes it makes: counted on any machine.

``Remote`` stands for a tensor on a device: whatever is made of one is one too, and the host's questions for values are noted.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Preference
from diffalign.objectives import KTO, SFT, AllPairs, MaPO, Pairwise, PlackettLuce
from diffalign.train import trainer
from diffalign.types import pinned

from . import shadow, toy

NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")
ASKS = {getattr(torch.Tensor, name) for name in NAMES} | {torch.nonzero, torch.unique, torch.equal}


class Remote(torch.Tensor):
    asked: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in ASKS or _masked(func, args):
            cls.asked.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def _masked(func, args) -> bool:
    """x[mask]: how many there are decides the shape."""
    if func is not torch.Tensor.__getitem__:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Remote) and part.dtype == torch.bool for part in index)


def remote(value):
    if isinstance(value, torch.Tensor):
        return value.as_subclass(Remote)
    if isinstance(value, dict):
        return {name: remote(item) for name, item in value.items()}
    return replace(value, **{f.name: remote(getattr(value, f.name)) for f in fields(value)}) if hasattr(value, "to") else value


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A function (method, micro-batches) -> what a step in the middle of a run asked for, and its passes by weight set."""
    real = trainer.to_device

    def moved(batch, device):
        moved = real(batch, device)
        far = remote(replace(moved, host=None))
        return replace(far, key=moved.key, place=moved.place, host=moved.host)

    def run(method, micros=1):
        monkeypatch.setattr(trainer, "to_device", moved)
        bank, passes, steps = toy.Bank(), [], []
        predict = bank.predict
        bank.predict = lambda name, *args: passes.append(name) or predict(name, *args)

        class Watch:
            def after_step(self, state, report):
                steps.append((list(Remote.asked), list(passes)))
                Remote.asked.clear()
                passes.clear()
        toy.train(tmp_path, bank=bank, method=method, source=toy.Source((4,) * micros), max_train_steps=6, hooks=[Watch()],
                  gradient_accumulation_steps=micros, logging_steps=100)
        return steps[4]  # not the third: there it is checked that every tensor has moved
    return run


@pytest.mark.parametrize("objective", [Pairwise(beta=100), Pairwise(beta=100, pairs=AllPairs()), MaPO(), SFT(), KTO(),
                                       PlackettLuce(beta=100)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("micros", [1, 3])
def test_a_step_waits_for_the_device_once(counted, objective, micros):
    """When its totals are read. The number of pairs is known on the CPU, metrics are summed on the device."""
    asked, _ = counted(Preference(DenoisingELBO(), objective), micros)
    assert asked == ["tolist"]


@pytest.mark.parametrize("objective, passes", [(Pairwise(beta=100), ["reference", "policy"]), (MaPO(), ["policy"])])
def test_passes_of_a_step(counted, objective, passes):
    """One a weight set and micro-batch, however many draws; none of a reference that nobody reads."""
    assert counted(Preference(DenoisingELBO(draws=3), objective), 2)[1] == 2 * passes


def test_the_count_sees_a_wait(counted):
    class Asks(Preference):
        def loss(self, batch, ctx):
            loss = super().loss(batch, ctx)
            assert loss.per_group.sum() > 0 and len(batch.x0[batch.valid])
            return loss
    asked, _ = counted(Asks(DenoisingELBO(), Pairwise(beta=100)))
    assert asked == ["__bool__", "__getitem__", "tolist"]


def test_expanded_tensors_are_pinned_whole(monkeypatch):
    """torch copies into memory of the same strides, and refuses where elements share it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", shadow._pin)
    rows = torch.arange(6.0).view(2, 3)
    for x in (rows[:, 1:], rows.t(), rows[:1].expand(4, 3)):
        assert torch.equal(pinned(x), x)
    with pytest.raises(RuntimeError, match="more than one element"):
        rows[:1].expand(4, 3).pin_memory()
