"""Compiled blocks: the same numbers, names and files; and never a reason to stop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.models import LoRA, WeightBank
from diffalign.models.base import compile_blocks
from diffalign.run import parts

from . import tiny


@pytest.fixture
def bank(folders):
    """SDXL with a LoRA that does something, and what its two sets predict."""
    denoiser = tiny.load_denoiser(tiny.spec(folders("sdxl")))
    bank = WeightBank.build(denoiser, LoRA(rank=2), reads=("policy", "reference"), seed=0)
    tiny.perturb(bank.trainable().values())
    bank.denoiser.module.train()
    yield bank
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False


def passes(bank):
    xt, t, cond = tiny.random_input(bank.denoiser)
    reference = bank.predict("reference", xt, t, cond)
    policy = bank.predict("policy", xt, t, cond)
    policy.square().mean().backward()
    gradients = [p.grad.clone() for p in bank.trainable().values()]
    for p in bank.trainable().values():
        p.grad = None
    return [reference, policy.detach(), *gradients]


def compiled(bank) -> int:
    return sum(layer._compiled_call_impl is not None for layer in bank.denoiser.module.modules())


def test_the_same_numbers_and_names(bank):
    """Traced, not translated: torch's own kernels in the same order, with the adapters on and off."""
    before, names = passes(bank), list(bank.state())
    assert compile_blocks(bank.denoiser, lambda: passes(bank), backend="eager") is None and compiled(bank)
    for a, b in zip(passes(bank), before):
        assert torch.allclose(a, b, atol=1e-6)
    assert list(bank.state()) == names


def test_a_compiler_that_fails_is_a_note(bank):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nat all")

    before = passes(bank)
    said = compile_blocks(bank.denoiser, lambda: passes(bank), backend=broken)
    assert "no compiler here" in said and "\n" not in said and not compiled(bank)
    assert all(torch.equal(a, b) for a, b in zip(passes(bank), before))


def test_a_model_that_names_no_blocks_is_a_note(folders):
    denoiser = tiny.load_denoiser(tiny.spec(folders("sd3")))
    assert "_repeated_blocks" in compile_blocks(denoiser, lambda: None)


@pytest.mark.parametrize(("others", "said"), [(["", ""], None), (["", "2 s a pass compiled, 1 s as they are"],
                                                                "2 s a pass compiled, 1 s as they are")])
def test_one_process_that_does_not_compile_decides_for_all(bank, monkeypatch, others, said):
    monkeypatch.setattr(parts, "compile_blocks", lambda denoiser, attempt, race: (
        denoiser.module.compile_repeated_blocks(backend="eager")))
    monkeypatch.setattr(parts, "world_of", lambda accelerator: SimpleNamespace(gather=lambda own: others))
    recipe = SimpleNamespace(train=SimpleNamespace(compile="auto"))
    assert parts.compiled(recipe, bank, None, None) == said and bool(compiled(bank)) is (said is None)


@pytest.mark.parametrize("slower", ["compiled", "plain"])
def test_a_race_keeps_the_faster(bank, monkeypatch, slower):
    """A clock that only attempts move: 2 s where the blocks run as named, 1 s otherwise."""
    clock, runs = [0.0], []

    def attempt():
        kind = "compiled" if compiled(bank) else "plain"
        runs.append(kind)
        clock[0] += 2.0 if kind == slower else 1.0

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    said = compile_blocks(bank.denoiser, attempt, race=3, backend="eager")
    assert runs == ["compiled", *3 * ["plain", "compiled"]]
    if slower == "compiled":
        assert said == "2 s a pass compiled, 1 s as they are" and not compiled(bank)
    else:
        assert said is None and compiled(bank)


@pytest.mark.parametrize("error", [ImportError("no xformers"), NotImplementedError("no operator found\nfor cutlassF")])
def test_xformers_that_cannot_run_here_is_one_line(error):
    def refuse():
        raise error

    denoiser = SimpleNamespace(module=SimpleNamespace(enable_xformers_memory_efficient_attention=refuse))
    recipe = SimpleNamespace(train=SimpleNamespace(enable_xformers_memory_efficient_attention=True))
    with pytest.raises(ConfigError, match=r"xformers cannot be used here \(no [a-z ]+\); run `pip"):
        parts._attention(denoiser, recipe)
