"""Timesteps and time ids reach the sines in float32, under autocast and with bf16 weights.

bf16 keeps 8 bits: 999 becomes 1000 and 1023 becomes 1024, so a cast too early feeds the neighbour's embedding.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from diffalign.config import load_recipe
from diffalign.models import narrow_norms
from diffalign.run import parts
from diffalign.types import Cond

from . import tiny


class WideNorms(TorchFunctionMode):
    """What autocast does to norms on CUDA, and not on the CPU: float32 in and out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.group_norm, F.layer_norm) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)


IDS = [1023.0, 767, 0, 13, 1023, 1023]


def test_what_bf16_would_do():
    assert torch.tensor([999.0, 1023.0]).bfloat16().float().tolist() == [1000.0, 1024.0]


def _sines(denoiser, run) -> dict[str, Tensor]:
    """Inputs of the modules that turn numbers into sines, and what comes out of them."""
    seen, handles = {}, []
    for name, module in denoiser.module.named_modules():
        if name.split(".")[-1] in ("time_proj", "add_time_proj"):
            handles.append(module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: args[0].clone(), name + ".out": out.clone()})))
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_numbers_are_not_rounded(folders, family, autocast, weights):
    denoiser = tiny.load_denoiser(tiny.spec(folders(family)), dtype=weights)
    xt, _, cond = tiny.random_input(denoiser)
    t = torch.full((2,), 0.999 if family == "sd3" else 1.0)   # sd3: 1000 t = 999; else the last index, 999
    if family == "sdxl":
        cond = Cond(tokens=cond.tokens, pooled=cond.pooled, extra={"time_ids": torch.tensor([IDS] * 2)})

    def run():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            denoiser(xt, t, cond)

    seen = _sines(denoiser, run)
    step = seen["time_text_embed.time_proj" if family == "sd3" else "time_proj"]
    assert step.dtype == torch.float32
    torch.testing.assert_close(step, torch.full((2,), 999.0), atol=1e-3, rtol=0)
    if family == "sdxl":
        assert seen["add_time_proj"].dtype == torch.float32
        assert seen["add_time_proj"].tolist() == IDS * 2
        # golden: the sine of the highest frequency (1) is sin(1023) = -0.9169, of the neighbour sin(1024) = -0.1585
        sines = seen["add_time_proj.out"]
        assert sines.dtype == torch.float32
        expected = torch.tensor(1023.0).sin()
        assert (sines[0] - expected).abs().min() < 1e-5 and abs(float(expected) + 0.9169) < 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_bf16_base_is_near_float32(folders, family):
    exact = tiny.load_denoiser(tiny.spec(folders(family)))
    half = tiny.load_denoiser(tiny.spec(folders(family)), dtype=torch.bfloat16)
    inputs = tiny.random_input(exact)
    with torch.no_grad():
        one, other = exact(*inputs), half(*inputs).float()
    assert (one - other).norm() / one.norm() < 0.05


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_narrow_norms_are_those_of_the_stock_model_in_bfloat16(folders, family):
    """Without autocast stock bfloat16 norms take bfloat16. Under CUDA's rules they would become float32; these do not."""
    denoiser = tiny.load_denoiser(tiny.spec(folders(family)), dtype=torch.bfloat16)
    xt, t, cond = tiny.random_input(denoiser)
    with torch.no_grad():
        stock = denoiser(xt, t, cond)
        narrow_norms(denoiser)
        seen = []
        for layer in denoiser.module.modules():
            if isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                layer.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
        with torch.autocast("cpu", torch.bfloat16), WideNorms():
            narrow = denoiser(xt, t, cond)
    assert seen and {out for _, out in seen} == {torch.bfloat16}
    torch.testing.assert_close(narrow.float(), stock.float(), atol=0.02, rtol=0.02)
    assert denoiser.module.state_dict().keys() == tiny.load_denoiser(tiny.spec(folders(family))).module.state_dict().keys()


def test_the_base_is_measured_as_the_policy_computes(monkeypatch):
    """Read again after training, where it was not kept: else "before" and "after" would differ by their norms."""
    train = importlib.import_module("diffalign.run.train")
    recipe = load_recipe("configs/quickstart.yaml", ["train.mixed_precision=bf16", "objective={kind: mapo}", "train.cpu=true"])
    monkeypatch.setattr(train, "_measure", lambda recipe, method, bank, cache, accelerator: bank)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    base = train._likelihood_before(recipe, None, accelerator).denoiser
    kinds = torch.nn.GroupNorm, torch.nn.LayerNorm
    norms = [[type(layer) for layer in denoiser.module.modules() if isinstance(layer, kinds)]
             for denoiser in (base, parts.base_of(recipe, accelerator))]
    assert norms[0] == norms[1] and torch.nn.GroupNorm not in norms[0] and base.dtype == torch.bfloat16
