"""A denoiser turned into a reward: features against diffusers' own forward, what is dropped, saving, and what is refused."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import rng
from diffalign.errors import ModelError
from diffalign.models import WeightBank, latent_reward, load_denoiser
from diffalign.models.latent_reward import (
    TAU,
    Facts,
    build,
    check_latents,
    check_texts,
    from_denoiser,
    load_scorer,
    read_facts,
)
from diffalign.models.spec import ModelSpec
from diffalign.types import Cond

from . import tiny

FAMILIES = ("sd", "sdxl", "sd3")
VP = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scorer(folder, **options):
    spec = tiny.spec(folder, lora=None)
    return from_denoiser(load_denoiser(spec), spec, **options)


def inputs(model, n=3):
    facts = model.module.facts
    shape = (n, facts.latent_channels, 8, 8)
    g = torch.Generator().manual_seed(1)
    tokens, pooled = model.module.empty_tokens, model.module.empty_pooled
    return (torch.randn(shape, generator=g), torch.tensor([0.101, 0.5, 0.901])[:n],
            Cond(tokens=torch.randn(n, *tokens.shape[1:], generator=g), pooled=torch.randn(n, *pooled.shape[1:], generator=g)))


def facts_of(config, family, scheduler=VP):
    return Facts(family=family, model={}, base="", vae="", text="", latent_channels=4, spatial_factor=8, scaling_factor=1.0,
                 shift_factor=None, guidance_scale=7.5, scheduler=scheduler, trunk=config)


SD15 = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8}
XL = {"block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
      "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
      "transformer_layers_per_block": [1, 2, 10]}
DIT = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096, "sample_size": 128,
       "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}


@pytest.mark.parametrize("config, family, text, width, scheduler", [
    (SD15, "sd", 768, 4800, VP), (XL, "sdxl", 1280, 3520, VP),
    (DIT, "sd3", 2048, 1536, {"_class_name": "FlowMatchEulerDiscreteScheduler"})])
def test_published_widths(config, family, text, width, scheduler):
    """lpo_lrm.md check 6: 320 + 640 + 1280 + 1280 + 1280 = 4800 -> 768 and 320 + 640 + 1280 + 1280 = 3520 -> 1280."""
    with torch.device("meta"):
        model = build(facts_of(config, family, scheduler), Cond(tokens=torch.zeros(1, 77, 8), pooled=torch.zeros(1, text)))
    assert (model.visual.in_features, model.visual.out_features, model.visual.bias) == (width, text, None)
    assert isinstance(model.text, torch.nn.Linear) == (family == "sd")
    if family == "sd3":
        assert len(model.trunk.transformer_blocks) == 18   # of 24, as the paper has it
    else:
        dropped = ("trunk.up_blocks", "trunk.conv_out", "trunk.conv_norm")
        assert not any(name.startswith(dropped) for name in model.state_dict())


@pytest.mark.parametrize("family", ("sd", "sdxl"))
def test_unet_features_are_the_forwards_own(folders, family):
    """By hand from the full UNet: the residuals it hands to the up blocks, each block's last before the downsampler, and what
    enters the first up block."""
    whole, model = load_denoiser(tiny.spec(folders(family))), scorer(folders(family), guidance_scale=1)
    xt, t, cond = inputs(model)
    seen = {}
    whole.module.up_blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    downs = []
    for block in whole.module.down_blocks:
        block.resnets[-1].register_forward_hook(lambda *_: None)
        block.register_forward_hook(lambda _, __, out: downs.append(out[1]))
    pixels = 8. * model.module.facts.spatial_factor
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * 3)
    with torch.no_grad():
        whole(xt, t, replace(cond, extra={"time_ids": sizes}))
        found = model.module.features(xt, t, cond.tokens, cond.pooled)
    # one layer a block: the first residual of a block is its layer's, the second its downsampler's
    expected = torch.cat([*(out[0].mean((2, 3)) for out in downs), seen["hidden_states"].mean((2, 3))], 1)
    assert found.shape == (3, 8 + 16 + 16)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_dit_feature_is_the_kept_layers(folders):
    """Two layers, of which one is kept: its picture tokens, averaged."""
    whole, model = load_denoiser(tiny.spec(folders("sd3"))), scorer(folders("sd3"), guidance_scale=1)
    xt, t, cond = inputs(model)
    seen = []
    whole.module.transformer_blocks[0].register_forward_hook(lambda _, __, out: seen.append(out[1]))
    with torch.no_grad():
        whole(xt, t, cond)
        found = model.module.features(xt, t, cond.tokens, cond.pooled)
    torch.testing.assert_close(found, seen[0].mean(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_feature_enhancement(folders, family):
    """gs = 1 is the plain last feature; gs = g moves only that, along (with prompt) - (without), which is linear in g."""
    found = {}
    for scale in (0.0, 1.0, 7.5):
        model = scorer(folders(family), guidance_scale=scale)
        xt, t, cond = inputs(model)
        with torch.no_grad():
            found[scale] = model.module.features(xt, t, cond.tokens, cond.pooled)
    plain, empty, last = found[1.0], found[0.0], model.module._run(xt, t, cond.tokens, cond.pooled)[-1]
    width = last.shape[1]
    torch.testing.assert_close(plain[:, -width:], last, atol=1e-6, rtol=1e-5)
    enhanced = empty + 7.5 * (plain - empty)
    torch.testing.assert_close(found[7.5][:, -width:], enhanced[:, -width:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[7.5][:, :-width], plain[:, :-width], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain[:, -width:], empty[:, -width:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_by_hand(folders, family):
    model = scorer(folders(family))
    xt, t, cond = inputs(model)
    net = model.module
    assert float(net.tau.detach().exp()) == pytest.approx(14.285, abs=1e-3)
    assert float(net.visual.weight.detach().std()) == pytest.approx(0.02, rel=0.1) and net.visual.bias is None
    with torch.no_grad():
        v = net.features(xt, t, cond.tokens, cond.pooled) @ net.visual.weight.T
        w = cond.pooled @ net.text.weight.T if family == "sd" else cond.pooled
        expected = torch.exp(torch.tensor(TAU)) * (v * w).sum(1) / (v.norm(dim=1) * w.norm(dim=1))
        torch.testing.assert_close(model(xt, t, cond), expected, atol=1e-5, rtol=1e-5)
    if family == "sd":
        assert torch.equal(net.text.weight, torch.eye(8))


def test_the_empty_prompt_is_the_encoded_one(folders):
    """SDXL's pipeline has zeros in its place; the reward has the encoding of ""."""
    encoders, model = tiny.load_encoders(tiny.spec(folders("sdxl"))), scorer(folders("sdxl"))
    tokens, pooled = encoders.encode_prompts([""])
    torch.testing.assert_close(model.module.empty_tokens, tokens)
    torch.testing.assert_close(model.module.empty_pooled, pooled)
    assert pooled.any() and not encoders.unconditional()[1].any()


def test_sizes_of_the_pictures_are_not_read(folders):
    """The two pictures of a pair come in sizes of their own, which would tell them apart."""
    model = scorer(folders("sdxl"))
    xt, t, cond = inputs(model)
    with torch.no_grad():
        other = replace(cond, extra={"time_ids": torch.full((3, 6), 999.)})
        assert torch.equal(model(xt, t, cond), model(xt, t, other))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_tensor_gets_a_gradient(folders, family):
    model = scorer(folders(family))
    bank = WeightBank.build(model, None, reads=("policy",), seed=0)
    xt, t, cond = inputs(model)
    bank.predict("policy", xt, t, cond).sum().backward()
    dead = [name for name, p in bank.trainable().items() if p.grad is None or not p.grad.any()]
    # a tiny block's key biases are shifted out by the softmax
    assert not [name for name in dead if not name.endswith(("k_proj.bias", "to_k.bias"))], dead
    assert "tau" in bank.trainable() and "visual.weight" in bank.trainable()


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_read_again(folders, tmp_path, family):
    model = scorer(folders(family), seed=3)
    xt, t, cond = inputs(model)
    with torch.no_grad():
        before = model(xt, t, cond)
        model.module.save_pretrained(tmp_path / "whole")
        again = load_scorer(tmp_path / "whole")
        assert torch.equal(again(xt, t, cond), before)
        model.module.save_pretrained(tmp_path / "half", dtype=torch.float16)
        torch.testing.assert_close(load_scorer(tmp_path / "half")(xt, t, cond), before, atol=0.05, rtol=0)
    assert not any(p.requires_grad for p in again.module.parameters())
    assert {v.dtype for v in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    spec = tiny.spec(folders(family))
    check_latents(tmp_path / "whole", spec)
    check_texts(tmp_path / "whole", spec)
    assert latent_reward.identity(tmp_path / "whole") != latent_reward.identity(tmp_path / "half")


def test_the_projection_is_drawn_from_the_seed(folders):
    state = torch.get_rng_state()
    a, b, c = (scorer(folders("sdxl"), seed=seed).module.visual.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), state)


def test_text_projection_of_another_clip(folders, tmp_path):
    weight = rng.normal(0, "w", torch.tensor([[0]]), (8, 8))[0]
    (tmp_path / "clip").mkdir()
    save_file({"text_projection.weight": weight, "other": torch.zeros(1)}, tmp_path / "clip" / "model.safetensors")
    assert torch.equal(scorer(folders("sd"), text_projection=str(tmp_path / "clip")).module.text.weight, weight)
    save_file({"other": torch.zeros(1)}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(ModelError, match="text_projection.weight"):
        scorer(folders("sd"), text_projection=str(tmp_path / "clip"))


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "latent_reward"
    scorer(folders("sdxl")).module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family, spoil, words", [
    ("sd3", {}, "latent_channels 4, those of .* have 8"),
    ("sdxl", {"vae": "another"}, "another VAE"),
    ("sdxl", {"scaling_factor": 0.5}, "scaling_factor 0.5"),
    ("sdxl", {"scheduler": {**VP, "beta_end": 0.02}}, "another noise schedule"),
    ("sdxl", {"scheduler": {**VP, "num_train_timesteps": 500}}, "another noise schedule")])
def test_another_latent_space_is_refused(folders, saved, tmp_path, family, spoil, words):
    folder = spoiled(saved, tmp_path, **spoil)
    with pytest.raises(ModelError, match=words) as found:
        check_latents(folder, tiny.spec(folders(family)))
    assert "\n" not in str(found.value)


def test_the_users_word_for_another_vae_file(folders, saved, tmp_path):
    check_latents(spoiled(saved, tmp_path, vae="another"), tiny.spec(folders("sdxl")), same_latents=True)
    with pytest.raises(ModelError, match="scaling_factor"):   # which no word can mend
        check_latents(spoiled(saved, tmp_path, scaling_factor=0.5), tiny.spec(folders("sdxl")), same_latents=True)


def test_other_text_encoders_are_refused(folders, saved, tmp_path):
    with pytest.raises(ModelError, match="other text encoders"):
        check_texts(spoiled(saved, tmp_path, text="another"), tiny.spec(folders("sdxl")))


def spoiled(saved, tmp_path, **changes):
    folder = tmp_path / "spoiled"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **changes}))
    return folder


@pytest.mark.parametrize("change, words", [
    ({"_class_name": "UNet2DConditionModel"}, "not that of a latent reward"), ({"format": 9}, "not that of a latent reward"),
    ({"family": "flux"}, "family flux"), ({"more": 1}, r"\(more\)")])
def test_what_is_no_latent_reward(saved, tmp_path, change, words):
    with pytest.raises(ModelError, match=words):
        read_facts(spoiled(saved, tmp_path, **change))


def test_damaged_files(saved, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        read_facts(tmp_path / "nothing")
    folder = spoiled(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ModelError, match="pickle"):
        read_facts(folder)
    folder = spoiled(saved, tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match="complete safetensors"):
        read_facts(folder)
    folder = spoiled(saved, tmp_path)
    state = load_file(folder / "model.safetensors")
    state.pop("visual.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match="visual.weight") as found:
        load_scorer(folder)
    assert "\n" not in str(found.value)
    assert copy.copy(read_facts(folder)).spec == ModelSpec(**read_facts(folder).model, lora=None)
