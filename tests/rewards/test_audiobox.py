"""Audiobox Aesthetics on 14 thousand random weights under the published names: the authors' own numbers, windows, what is
refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffalign.errors import ModelError, RewardError
from diffalign.rewards import judged
from diffalign.rewards.audiobox import Audiobox
from diffalign.types import Sound

D, INNER, CONV, HEADS, BUCKETS = 16, 24, 6, 2, 32
TARGETS = {"CE": {"mean": 5.0, "std": 2.0}, "CU": {"mean": 5.5, "std": 1.5}, "PC": {"mean": 3.0, "std": 1.0},
           "PQ": {"mean": 6.0, "std": 1.25}}
CONFIG = {"proj_num_layer": 3, "proj_ln": True, "proj_act_fn": "gelu", "proj_dropout": 0, "nth_layer": 3, "output_dim": 1,
          "use_weighted_layer_sum": True, "precision": "32", "normalize_embed": True, "target_transform": TARGETS,
          "freeze_encoder": True}
# of audiobox_aesthetics 0.0.4 (AesMultiOutput and its windows) with these very weights, on the first seconds of ``wave``
THEIRS = {12.0: {"CE": 5.854441205660502, "CU": 4.9469155967235565, "PC": 2.7241531908512115, "PQ": 5.409785450746616},
          3.3: {"CE": 5.847166895866394, "CU": 4.908638000488281, "PC": 2.706142097711563, "PQ": 5.406983703374863},
          0.03: {"CE": 5.869026899337769, "CU": 4.69552943110466, "PC": 2.6765991151332855, "PQ": 5.347083494067192}}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def published_shapes():
    kernels, front, encoder = (10, 3, 3, 3, 3, 2, 2), "wavlm_model.feature_extractor.conv_layers", "wavlm_model.encoder"
    found = {f"{front}.{i}.0.weight": (CONV, CONV if i else 1, size) for i, size in enumerate(kernels)}
    found |= norm(f"{front}.0.2", CONV) | norm("wavlm_model.layer_norm", CONV) | {"wavlm_model.mask_emb": (D,)}
    found |= linear("wavlm_model.post_extract_proj", D, CONV) | norm(f"{encoder}.layer_norm", D)
    found |= {f"{encoder}.pos_conv.0.bias": (D,), f"{encoder}.pos_conv.0.weight_g": (1, 1, 8),
              f"{encoder}.pos_conv.0.weight_v": (D, 4, 8)}
    for i in range(2):
        at = f"{encoder}.layers.{i}"
        for name in "kqv":
            found |= linear(f"{at}.self_attn.{name}_proj", D, D)
        found |= linear(f"{at}.self_attn.out_proj", D, D) | linear(f"{at}.self_attn.grep_linear", 8, D // HEADS)
        found |= linear(f"{at}.fc1", INNER, D) | linear(f"{at}.fc2", D, INNER)
        found |= norm(f"{at}.self_attn_layer_norm", D) | norm(f"{at}.final_layer_norm", D)
        found |= {f"{at}.self_attn.grep_a": (1, HEADS, 1, 1)}
    found |= {f"{encoder}.layers.0.self_attn.relative_attention_bias.weight": (BUCKETS, HEADS)}
    for axis in TARGETS:
        found |= {f"layer_weights.{axis}": (3,)} | linear(f"proj_layer.{axis}.6", 1, D)
        for i in (0, 3):
            found |= linear(f"proj_layer.{axis}.{i}", D, D) | norm(f"proj_layer.{axis}.{i + 1}", D)
    return found


def weights():
    """Drawn in the order of the names; scales lie around 1."""
    random, found = np.random.default_rng(0), {}
    for name, shape in sorted(published_shapes().items()):
        x = 0.3 * random.standard_normal(shape)
        scale = "weight_g" in name or "norm.weight" in name or name.endswith(("grep_a", ".0.2.weight"))
        found[name] = torch.tensor(1 + 0.3 * x if scale else x, dtype=torch.float32)
    return found


def made(folder, state=None, **config):
    folder.mkdir(exist_ok=True)
    save_file(weights() if state is None else state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("audiobox") / "model")


def wave(seconds, rate=16_000):
    t = np.arange(12 * rate) / rate
    return (0.5 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * 1300 * t * (1 + 0.1 * t)))[:int(seconds * rate)]


def sound(samples, rate=16_000):
    return Sound(wave=np.atleast_2d(samples).astype(np.float32), rate=rate)


def reward(folder, **options):
    return Audiobox(pretrained_model_name_or_path=str(folder), **options)


def test_the_scores_are_the_authors(folder):
    """12 s are a window of 10 s and one of 2 s, filled up with zeros that its mean leaves out, weighted 5 to 1."""
    found = reward(folder)([sound(wave(seconds)) for seconds in THEIRS], [""] * 3)
    assert found.tolist() == pytest.approx([scores["PQ"] for scores in THEIRS.values()], abs=1e-5)
    for axis in ("CE", "CU", "PC"):
        assert reward(folder, axis=axis)([sound(wave(3.3))], [""]).item() == pytest.approx(THEIRS[3.3][axis], abs=1e-5)


def test_stereo_and_other_rates_are_brought_to_its_own(folder):
    own = reward(folder)([sound(wave(3.0))], [""]).item()
    stereo = np.stack([wave(3.0, 32_000), wave(3.0, 32_000)])
    assert reward(folder)([sound(stereo, 32_000)], [""]).item() == pytest.approx(own, abs=1e-3)
    assert judged(reward(folder), [sound([[np.nan]])], ["a"]).isnan().all()
    with pytest.raises(RewardError, match="knows its sample rate"):
        judged(reward(folder), [wave(1.0)], ["a"])


def test_its_identity_and_what_is_refused(folder, tmp_path):
    assert len(reward(folder).identity()["weights"]) == 64 and reward(folder).identity()["axis"] == "PQ"
    reward(folder).check()
    for config, message in (({"target_transform": None}, "target_transform has no mean and std of PQ"),
                            ({"normalize_embed": False}, "normalize_embed is False")):
        with pytest.raises(ModelError, match=message):
            reward(made(tmp_path / "odd", **config)).check()
    with pytest.raises(ModelError, match="cannot be loaded"):
        reward(made(tmp_path / "deep", proj_num_layer=4))([sound(wave(1.0))], [""])
    for lost in ("layer_weights.PQ", "wavlm_model.encoder.layers.1.fc1.bias", "wavlm_model.post_extract_proj.weight"):
        cut = {name: x for name, x in weights().items() if name != lost}
        with pytest.raises(ModelError) as caught:
            reward(made(tmp_path / "cut", cut))([sound(wave(1.0))], [""])
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ModelError, match="no such|holds no"):
        reward(tmp_path).check()
