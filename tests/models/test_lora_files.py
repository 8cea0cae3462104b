"""The files that users load: stock diffusers draws the same picture with them as our policy does."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.models import LoRA, WeightBank, attach, load_denoiser, save_lora, save_pipeline
from diffalign.models.folder import digest

from . import tiny

FAMILIES = ["sd", "sdxl", "sd3"]
METADATA = {"base_model": "tiny", "objective": "dpo", "beta": "2000", "steps": "5"}


@pytest.fixture
def trained(folders, tmp_path):
    """trained(family, alpha) -> a denoiser whose LoRA of rank 4 has moved, and the folder of its files."""
    def make(family: str, alpha: float | None):
        denoiser = load_denoiser(tiny.spec(folders(family)))
        attach(denoiser, LoRA(rank=4, alpha=alpha), seed=0)
        tiny.perturb(p for p in denoiser.module.parameters() if p.requires_grad)
        save_lora(denoiser, tmp_path / "lora", METADATA, stem="mine")
        return denoiser, tmp_path / "lora"

    return make


def picture(pipe, encoders):
    return pipe(tiny.PROMPT, latents=tiny.noise(encoders), num_inference_steps=3, guidance_scale=5.0,
                output_type="latent").images


# kohya's names for SD3 are read by ComfyUI, not by diffusers
@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "mine_comfy.safetensors"])
@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_draws_what_our_policy_draws(folders, trained, family, alpha, file):
    if family == "sd3" and "comfy" in file:
        pytest.skip("diffusers reads no kohya keys for SD3")
    denoiser, folder = trained(family, alpha)
    spec = tiny.spec(folders(family))
    pipe, encoders = tiny.load_pipeline(spec), tiny.load_encoders(spec)
    base = picture(pipe, encoders)
    ours = tiny.sample(denoiser, tiny.cond_of(encoders, tiny.PROMPT), pipe.scheduler, tiny.noise(encoders), steps=3)
    # without a name for the diffusers file: it must be the one that the folder offers first
    pipe.load_lora_weights(folder, **({"weight_name": file} if "comfy" in file else {}))
    theirs = picture(pipe, encoders)
    assert (theirs - ours).abs().max() < 1e-4
    assert (theirs - base).abs().max() > 1e-2


def test_alpha_changes_the_picture(folders, trained):
    """alpha 6 of rank 4 is 1.5 times the update; a reader that ignored it would draw the picture of alpha 4."""
    denoiser, _ = trained("sd", 6.0)
    inputs = tiny.random_input(denoiser)
    with torch.no_grad():
        with_alpha = denoiser(*inputs)
        for module in denoiser.module.modules():
            if hasattr(module, "scaling"):
                assert module.scaling == {"policy": 1.5}
                module.scaling["policy"] = 1.0
        assert (denoiser(*inputs) - with_alpha).abs().max() > 1e-3


def layers(file) -> list[str]:
    return sorted({name.split(".")[0] for name in load_file(file)})


def test_keys_of_sdxl(trained):
    """Snapshot: kohya's names are lora_unet_ and the diffusers path with underscores."""
    _, folder = trained("sdxl", 6.0)
    tensors = load_file(folder / "mine_comfy.safetensors")
    blocks = ["down_blocks_1_attentions_0", "mid_block_attentions_0", "up_blocks_0_attentions_0", "up_blocks_0_attentions_1"]
    expected = sorted(f"lora_unet_{b}_transformer_blocks_0_attn{i}_to_{part}"
                      for b in blocks for i in (1, 2) for part in ("q", "k", "v", "out_0"))
    assert layers(folder / "mine_comfy.safetensors") == expected
    assert sorted(tensors) == sorted(f"{layer}.{end}" for layer in expected
                                     for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    first = expected[0]
    assert tensors[f"{first}.lora_down.weight"].shape[0] == tensors[f"{first}.lora_up.weight"].shape[1] == 4
    assert all(x == 6.0 and x.shape == () for name, x in tensors.items() if name.endswith(".alpha"))

    stock = sorted(load_file(folder / "pytorch_lora_weights.safetensors"))
    assert stock[:2] == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight",
                         "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.weight"]
    assert len(stock) == 2 * len(expected)


def test_keys_of_sd3(trained):
    """Snapshot: lora_transformer_ and the diffusers path, the form in ComfyUI's key map for SD3 (comfy/lora.py)."""
    _, folder = trained("sd3", None)
    joint = ["to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj"]
    expected = [f"lora_transformer_transformer_blocks_{i}_attn_{part}" for i in (0, 1) for part in joint]
    expected.remove("lora_transformer_transformer_blocks_1_attn_add_q_proj")    # no effect in the last block
    expected += ["lora_transformer_transformer_blocks_0_attn_to_add_out"]    # the last block drops its text stream
    expected += [f"lora_transformer_transformer_blocks_0_attn2_{part}" for part in joint[:4]]
    assert layers(folder / "mine_comfy.safetensors") == sorted(expected)
    assert all(name.startswith("transformer.transformer_blocks.")
               for name in load_file(folder / "pytorch_lora_weights.safetensors"))


def test_metadata(trained):
    _, folder = trained("sdxl", 6.0)
    with safe_open(folder / "mine_comfy.safetensors", framework="pt") as file:
        comfy = file.metadata()
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        stock = file.metadata()
    assert METADATA.items() <= comfy.items() and METADATA.items() <= stock.items()
    assert {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "4", "ss_network_alpha": "6", "rank": "4",
            "alpha": "6", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}.items() <= comfy.items()
    # the stock file has 6/4 multiplied in
    assert (stock["rank"], stock["alpha"], stock["trained_alpha"]) == ("4", "4", "6")


def test_files_are_float32_and_nothing_else_is_left(trained):
    _, folder = trained("sd", None)
    assert sorted(f.name for f in folder.iterdir()) == ["mine_comfy.safetensors", "pytorch_lora_weights.safetensors"]
    for file in folder.iterdir():
        assert {x.dtype for x in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tune_becomes_a_pipeline_folder(folders, tmp_path, family):
    spec = tiny.spec(folders(family))
    bank = WeightBank.build(load_denoiser(spec), None, reads=("policy",), seed=0)
    tiny.perturb(bank.trainable().values(), scale=0.02)
    saved = save_pipeline(spec, bank.denoiser, tmp_path / "mine")
    again = load_denoiser(tiny.spec(saved))
    inputs = tiny.random_input(again)
    with torch.no_grad():
        assert torch.equal(again(*inputs), bank.predict("policy", *inputs))
    encoders = tiny.load_encoders(tiny.spec(saved))
    drawn = tiny.sample(bank.denoiser, tiny.cond_of(encoders, tiny.PROMPT), tiny.load_pipeline(spec).scheduler,
                        tiny.noise(encoders), steps=3)
    assert (picture(tiny.load_pipeline(tiny.spec(saved)), encoders) - drawn).abs().max() < 1e-4
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mine"]
    with pytest.raises(FileExistsError):
        save_pipeline(spec, bank.denoiser, saved)
    lora = copy.deepcopy(bank.denoiser)
    attach(lora, LoRA(rank=2), seed=0)
    with pytest.raises(ValueError, match="LoRA"):
        save_pipeline(spec, lora, tmp_path / "other")


def test_digest_is_of_names_and_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_text("{}")
    one = digest([tmp_path / "a" / "x.json"])
    assert one == digest([tmp_path / "a" / "x.json"]) != digest([tmp_path / "b" / "x.json"])
    (tmp_path / "a" / "x.json").write_text("{ }")
    assert digest([tmp_path / "a" / "x.json"]) != one
