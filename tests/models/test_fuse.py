"""model.fuse_lora: the base is what stock diffusers makes of it with fuse_lora, everywhere, once."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import ModelError
from diffalign.models import (
    LoRA,
    WeightBank,
    attach,
    inspect,
    load_denoiser,
    load_pipeline,
    model_identity,
    save_lora,
    save_pipeline,
)
from diffalign.models.lora import load

from . import tiny

FAMILIES = ["sd", "sdxl", "sd3"]
STOCK, KOHYA = "pytorch_lora_weights.safetensors", "mine_comfy.safetensors"


@pytest.fixture
def lora(folders, tmp_path):
    """lora(family) -> a folder with both files of a LoRA of rank 4 and alpha 6 that changes the denoiser visibly."""
    def make(family: str):
        denoiser = load_denoiser(tiny.spec(folders(family)))
        attach(denoiser, LoRA(rank=4, alpha=6.0), seed=0)
        tiny.perturb(p for p in denoiser.module.parameters() if p.requires_grad)
        save_lora(denoiser, tmp_path / "few", {}, stem="mine")
        return tmp_path / "few"

    return make


def weights(module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def equal(one: dict, other: dict, tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all((x.float() - other[name].float()).abs().max() <= tolerance
                                              for name, x in one.items())


@pytest.mark.parametrize("file", [STOCK, KOHYA])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_denoiser_is_that_of_stock_diffusers(folders, lora, family, file):
    if family == "sd3" and file == KOHYA:
        pytest.skip("diffusers reads no kohya keys for SD3")
    plain = tiny.spec(folders(family))
    folder = lora(family)
    spec = replace(plain, fuse_lora=str(folder / file))
    stock = tiny.load_pipeline(plain)
    base = weights(load_denoiser(plain).module)
    stock.load_lora_weights(folder, weight_name=file)
    stock.fuse_lora()
    stock.unload_lora_weights()
    denoiser, pipe = load_denoiser(spec), load_pipeline(spec)
    theirs = weights(getattr(stock, denoiser.component))
    assert equal(weights(denoiser.module), theirs) and equal(weights(getattr(pipe, denoiser.component)), theirs)
    assert not equal(base, theirs, 1e-3)
    assert all(p.requires_grad for p in denoiser.module.parameters()) and not denoiser.module.training


def test_a_folder_stands_for_its_usual_file(folders, lora):
    spec = tiny.spec(folders("sdxl"), fuse_lora=str(lora("sdxl")))
    file = replace(spec, fuse_lora=f"{spec.fuse_lora}/{STOCK}")
    assert equal(weights(load_denoiser(spec).module), weights(load_denoiser(file).module))


def test_half_precision_rounds_the_sum_once(folders, lora):
    spec = tiny.spec(folders("sdxl"), fuse_lora=str(lora("sdxl")))
    whole, half = load_denoiser(spec), load_denoiser(spec, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert equal(weights(half.module), {name: x.bfloat16() for name, x in weights(whole.module).items()})


def test_a_lora_in_half_precision_is_added_in_float32(folders, lora):
    """Few-step LoRAs are published in float16; the layer's product is formed in float32 all the same."""
    plain, folder = tiny.spec(folders("sdxl")), lora("sdxl")
    tensors = {name: x.half() for name, x in load_file(folder / STOCK).items()}
    save_file(tensors, folder / STOCK)
    module = weights(load_denoiser(replace(plain, fuse_lora=str(folder))).module)
    base = weights(load_denoiser(plain).module)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = (tensors[f"unet.{layer}.lora_{side}.weight"].float() for side in "BA")
    assert (module[f"{layer}.weight"] - base[f"{layer}.weight"] - up @ down).abs().max() < 1e-6


def test_identity(folders, lora, tmp_path):
    plain, folder = tiny.spec(folders("sdxl")), lora("sdxl")
    spec = replace(plain, fuse_lora=str(folder))
    shutil.copytree(folder, tmp_path / "moved")
    moved = replace(plain, fuse_lora=str(tmp_path / "moved"))
    assert model_identity(spec) == load_denoiser(spec).identity == model_identity(moved) != model_identity(plain)
    tensors = load_file(folder / STOCK)
    save_file({name: x * 1.01 for name, x in tensors.items()}, folder / STOCK)
    assert model_identity(spec) != model_identity(moved)


def test_a_lora_is_trained_on_top(folders, lora):
    """The adapter switched off is the fused base, and the trained file holds nothing of what was fused."""
    spec = tiny.spec(folders("sdxl"), fuse_lora=str(lora("sdxl")))
    denoiser = load_denoiser(spec)
    inputs = tiny.random_input(denoiser)
    with torch.no_grad():
        fused = denoiser(*inputs)
    bank = WeightBank.build(denoiser, LoRA(rank=2), reads=("reference", "policy"), seed=0)
    assert list(denoiser.module.peft_config) == ["policy"]
    tiny.perturb(bank.trainable().values())
    with torch.no_grad():
        assert torch.equal(bank.predict("reference", *inputs), fused)
        assert (bank.predict("policy", *inputs) - fused).abs().max() > 1e-3


def test_a_full_fine_tune_holds_the_fused_weights_once(folders, lora, tmp_path):
    spec = tiny.spec(folders("sdxl"), fuse_lora=str(lora("sdxl")))
    denoiser = load_denoiser(spec)
    shutil.rmtree(spec.fuse_lora)  # what was fused is in the weights: saving needs the file no more
    saved = save_pipeline(spec, denoiser, tmp_path / "mine")
    assert equal(weights(load_denoiser(tiny.spec(saved)).module), weights(denoiser.module))


# what is refused, from headers alone


def damaged(folder, change):
    """The folder after ``change(tensors) -> tensors`` on its file."""
    save_file(change(load_file(folder / STOCK)), folder / STOCK)
    return folder


@pytest.mark.parametrize("name", ["/no/such/file", "missing.safetensors", "a/b", "x" * 5000])
def test_missing(folders, name):
    with pytest.raises(ModelError, match="model.fuse_lora: .*no such file"):
        inspect(tiny.spec(folders("sdxl"), fuse_lora=name))


def test_a_folder_without_one(folders, tmp_path):
    with pytest.raises(ModelError, match=f"{STOCK}: no such file"):
        inspect(tiny.spec(folders("sdxl"), fuse_lora=str(tmp_path)))


@pytest.mark.parametrize("name, words", [("lora.bin", "only .safetensors"), (STOCK, "not a complete safetensors file")])
def test_pickles_and_broken_files(folders, tmp_path, name, words):
    torch.save({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ModelError, match=f"model.fuse_lora.*{words}") as raised:
        inspect(tiny.spec(folders("sdxl"), fuse_lora=str(tmp_path / name)))
    assert "\n" not in str(raised.value)


def renamed(tensors, old, new):
    return {name.replace(old, new): x for name, x in tensors.items()}


@pytest.mark.parametrize("change, words", [
    (lambda t: {"conv_in.weight": torch.zeros(2)}, "holds no LoRA"),
    (lambda t: {}, "holds no LoRA"),
    (lambda t: t | {"text_encoder.layer.lora_A.weight": torch.zeros(2, 2)}, "changes a text encoder"),
    (lambda t: t | {"lora_te1_layer.lora_down.weight": torch.zeros(2, 2)}, "changes a text encoder"),
    (lambda t: renamed(t, "mid_block", "middle"), "no such layer"),
    (lambda t: {name: torch.cat([x, x], 1) if "lora_A" in name else x for name, x in t.items()}, "is not for this model"),
    (lambda t: {name: torch.cat([x, x], 0) if "lora_B" in name else x for name, x in t.items()}, "is not for this model"),
])
def test_not_for_this_model(folders, lora, change, words):
    folder = damaged(lora("sdxl"), change)
    with pytest.raises(ModelError, match=words) as raised:
        inspect(tiny.spec(folders("sdxl"), fuse_lora=str(folder)))
    assert "\n" not in str(raised.value) and "model.fuse_lora" in str(raised.value)


@pytest.mark.parametrize("change, words", [
    (lambda t: {name: x * float("nan") for name, x in t.items()}, "cannot be fused"),
    (lambda t: renamed(t, "unet.", "another."), "holds nothing for this model"),
    (lambda t: {name: x for name, x in t.items() if "lora_A" in name}, "cannot be fused"),
])
def test_found_while_fusing(folders, lora, change, words):
    folder = damaged(lora("sdxl"), change)
    with pytest.raises(ModelError, match=words) as raised:
        load_denoiser(tiny.spec(folders("sdxl"), fuse_lora=str(folder)))
    assert "\n" not in str(raised.value)


def test_a_lora_of_another_shape_is_one_line(folders, lora, caplog):
    """diffusers logs a line a layer before it raises."""
    folder = damaged(lora("sdxl"), lambda t: {name: torch.zeros(x.shape[0] + 1, x.shape[1] + 1) for name, x in t.items()})
    with pytest.raises(ModelError, match="does not fit this model .size mismatch") as raised:
        load(load_pipeline(tiny.spec(folders("sdxl"))), folder / "pytorch_lora_weights.safetensors")
    assert "\n" not in str(raised.value) and not caplog.records


def test_empty_name():
    with pytest.raises(ValueError, match="fuse_lora is empty"):
        tiny.spec("somewhere", fuse_lora=" ")
