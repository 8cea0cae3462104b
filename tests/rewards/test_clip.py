"""CLIP score, PickScore and HPSv2 on small random towers in the true layouts, against sums done here."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.config import load_reward
from diffalign.errors import ConfigError, ModelError
from diffalign.rewards import REWARDS, ClipScore, HPSv2, PickScore, identity, judged
from diffalign.rewards.preprocess import Preprocess
from diffalign.rewards.towers import ClipSource, _open_clip_model

from .tiny_clip import SIZE, broken, clip_folder, open_clip_file, picture, the_open_clip

PROMPTS = ["a red ring", "b", "a red ring", "", "one " * 60]
IMAGES = [*(picture(i, 30 + i, 41 - i) for i in range(4)), picture(4, 31, 28)]   # the last has a crop with an odd rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "model"
    return path, clip_folder(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("open_clip") / "hps.safetensors"
    return path, open_clip_file(path)


def cosines_by_hand(model, middle="round"):
    """One picture and one prompt at a time; the token ids are spelled out, letter by letter, and not padded."""
    found = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        ids = [52]
        for word in prompt.split():
            ids += [ord(c) - 97 for c in word[:-1]] + [26 + ord(word[-1]) - 97]
        ids = (ids + [53])[:77]
        ids[-1] = 53
        text = model.text_model(torch.tensor([ids])).last_hidden_state[0, -1] @ model.text_projection.weight.T
        seen = model.vision_model(Preprocess(size=SIZE, middle=middle)(image)[None]).last_hidden_state[0, 0]
        seen = model.vision_model.post_layernorm(seen) @ model.visual_projection.weight.T
        found.append((text @ seen / (text.norm() * seen.norm())).item())
    return np.array(found)


def clip_reward(kind, folder, **options):
    extra = {"processor": None} if kind is PickScore else {}
    return kind(model=str(folder), device="cpu", **extra, **options)


def test_clip_score_is_the_cosine_and_clipscore_its_positive_part(folder):
    cosines = cosines_by_hand(folder[1])
    np.testing.assert_allclose(clip_reward(ClipScore, folder[0])(IMAGES, PROMPTS), cosines, atol=1e-6)
    assert cosines.min() < 0 < cosines.max()       # both branches of max(., 0) are met
    scores = clip_reward(ClipScore, folder[0], form="clipscore")(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores, 2.5 * np.maximum(cosines, 0), atol=3e-6)


def test_pickscore_is_scaled_and_its_differences_are_logits(folder):
    cosines = cosines_by_hand(folder[1], middle="floor")
    scores = clip_reward(PickScore, folder[0])(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores, math.exp(4.6) * cosines, atol=1e-4)   # 4.6: the tiny model's logit_scale
    assert 1 / (1 + math.exp(-(22.1 - 21.3))) == pytest.approx(0.689974, abs=1e-6)   # the scale on which that holds


def test_hpsv2_is_the_cosine_of_letterboxed_pictures_without_scale(checkpoint):
    path, model = checkpoint
    ids = the_open_clip().tokenize(PROMPTS)
    seen = torch.stack([Preprocess(size=SIZE, fit="letterbox")(image) for image in IMAGES])
    features, text = model.encode_image(seen), model.encode_text(ids)
    expected = (features * text).sum(-1) / (features.norm(dim=-1) * text.norm(dim=-1))
    reward = HPSv2(model=str(path), architecture="tiny", device="cpu")
    np.testing.assert_allclose(reward(IMAGES, PROMPTS), expected, atol=1e-6)
    sharp = HPSv2(model=str(path), architecture="tiny", device="cpu", antialias=False)
    assert (sharp(IMAGES, PROMPTS) - expected).abs().max() > 1e-4
    assert identity(reward)["version"] == "v2.1" and identity(reward)["scale"] == "cosine"


@pytest.mark.parametrize("prefix", ["module.", "state_dict.", "state_dict.module.", "model."])
def test_prefixes_of_wrapped_checkpoints_are_seen_through(tmp_path, checkpoint, prefix):
    save_file({prefix + k: v.half() for k, v in load_file(checkpoint[0]).items()}, tmp_path / "hps.safetensors")
    plain, wrapped = (HPSv2(model=str(path), architecture="tiny", device="cpu")(IMAGES, PROMPTS)
                      for path in (checkpoint[0], tmp_path / "hps.safetensors"))
    assert (plain - wrapped).abs().max() < 2e-3    # half-precision weights, computed in float32


@pytest.fixture(scope="module", params=["clip", "pickscore", "hpsv2"])
def reward(request, folder):
    if request.param == "hpsv2":
        return HPSv2(model=str(request.getfixturevalue("checkpoint")[0]), architecture="tiny", device="cpu")
    return clip_reward(REWARDS[request.param], folder[0])


def test_batched_equals_single(reward):
    together = reward(IMAGES, PROMPTS)
    singles = torch.cat([reward([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    gap = (together - singles).abs() / together.abs().clamp(min=1)
    assert together.shape == (5,) and together.dtype == torch.float32 and gap.max() < 1e-6


def test_an_unreadable_picture_is_nan_and_nothing_else_is(reward):
    scores = reward([*IMAGES[:2], broken(), *IMAGES[3:]], PROMPTS)
    assert scores.isnan().tolist() == [False, False, True, False, False]
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(scores[kept], reward(IMAGES, PROMPTS)[kept], rtol=1e-6, atol=1e-6)
    assert judged(reward, IMAGES, PROMPTS).isfinite().all()


def test_gradients_reach_the_pixels_and_match_finite_differences(reward):
    towers = reward._source.load("cpu", torch.float64)
    g = torch.Generator().manual_seed(0)
    image = 0.2 + 0.6 * torch.rand(3, 34, 29, generator=g, dtype=torch.float64)
    text = towers.text(["a red ring"])[0]
    scale = towers.scale if reward.name == "pickscore" else 1.0
    exact = lambda x: scale * towers.image(reward._preprocess(x)[None])[0] @ text  # noqa: E731

    image.requires_grad_()
    gradient, = torch.autograd.grad(exact(image), image)
    assert (gradient.abs().amax((1, 2)) > 0).all()
    for _ in range(4):
        way = torch.randn(image.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            difference = (exact(image + 1e-5 * way) - exact(image - 1e-5 * way)) / 2e-5
        assert (gradient * way).sum() == pytest.approx(difference.item(), rel=1e-5)

    pixels = image.detach().float().requires_grad_()
    reward([IMAGES[0], pixels], ["b", "a red ring"])[1].backward()
    torch.testing.assert_close(pixels.grad.double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_a_text_is_encoded_once_however_often_it_occurs(folder, monkeypatch):
    reward, seen = clip_reward(ClipScore, folder[0]), []
    towers = reward._towers
    encode = towers.text
    monkeypatch.setitem(towers.__dict__, "text", lambda texts: seen.extend(texts) or encode(texts))
    reward(IMAGES[:4], ["b", "a", "b", "b"])
    assert seen == ["b", "a"]


def test_identity_pins_the_weights(folder, tmp_path):
    import hashlib

    reward = clip_reward(ClipScore, folder[0])
    digest = hashlib.sha256((folder[0] / "model.safetensors").read_bytes()).hexdigest()
    assert identity(reward) == {"name": "clip", "model": str(folder[0]), "revision": None, "sha256": digest, "scale": "cosine"}
    assert json.dumps(identity(reward))
    assert identity(clip_reward(PickScore, folder[0]))["scale"] == "exp(logit_scale) * cosine"
    assert "_towers" not in vars(reward)           # nothing was loaded for it


def altered(source, target, change):
    state = load_file(source)
    change(state)
    target.parent.mkdir(exist_ok=True)
    save_file(state, target)
    return target


def drop(part):
    def change(state):
        for key in [key for key in state if part in key]:
            del state[key]

    return change


def copy_of(folder, target, change):
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    altered(folder / "model.safetensors", target / "model.safetensors", change)
    return str(target)


def test_a_folder_that_cannot_work_is_one_line(folder, tmp_path):
    path = folder[0]
    cases = {
        "no text tower": (drop("text_"), "text tower is missing"),
        "a tensor less": (drop("vision_model.post_layernorm.bias"), "1 of .* the first is vision_model.post_layernorm.bias"),
        "other shape": (lambda s: s.update({"visual_projection.weight": torch.zeros(5, 24)}),
                        r"visual_projection.weight has shape \[5, 24\], expected \[12, 24\]"),
    }
    for name, (change, message) in cases.items():
        reward = clip_reward(ClipScore, copy_of(path, tmp_path / name, change))
        with pytest.raises(ModelError, match=message) as caught:
            reward.check()
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)
        with pytest.raises(ModelError, match=message):
            reward(IMAGES[:1], ["b"])


def test_missing_files_are_one_line(folder, checkpoint, tmp_path):
    def without(name, stem):
        target = copy_of(folder[0], tmp_path / name, lambda s: None)
        for file in (tmp_path / name).glob(stem):
            file.unlink()
        return target

    with pytest.raises(ModelError, match="holds no model.safetensors"):
        clip_reward(ClipScore, without("weights", "*.safetensors")).check()
    with pytest.raises(ModelError, match="config.json is missing"):
        clip_reward(ClipScore, without("config", "config.json")).check()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        clip_reward(ClipScore, without("tokenizer", "[vt]o*")).check()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"only pickle weights \(pytorch_model.bin\)"):
        clip_reward(ClipScore, pickled).check()
    with pytest.raises(ConfigError, match="a revision belongs to a hub id"):
        ClipScore(model=str(folder[0]), revision="main").check()
    other = copy_of(folder[0], tmp_path / "siglip", lambda s: None)
    (tmp_path / "siglip" / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ModelError, match="model_type 'siglip'"):
        clip_reward(ClipScore, other).check()


def test_hub_ids_that_cannot_be_had_are_one_line(monkeypatch):
    import huggingface_hub

    asked = {}

    def offline(name, **options):
        asked.update(options)
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"^a/b: .*at revision abc \(no network\)") as caught:
        ClipScore(model="a/b", revision="abc").check()
    assert "\n" not in str(caught.value) and asked["revision"] == "abc"
    assert not any(pattern.endswith((".bin", "*", ".py")) for pattern in asked["allow_patterns"])
    assert not asked["local_files_only"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: offline("a/b"))
    with pytest.raises(ModelError, match=r"^a/b: .*\(no network\)"):
        ClipScore(model="a/b", revision="abc").check()
    assert asked["local_files_only"], "asked once, then only what is here"


def test_hps_files_that_cannot_work_are_one_line(checkpoint, tmp_path):
    hps = lambda path, **options: HPSv2(**{"model": str(path), "architecture": "tiny", **options})  # noqa: E731
    with pytest.raises(ConfigError, match="hpsv2: model is not set.*docs/rewards.md"):
        HPSv2().check()
    for name in ("HPS_v2.1_compressed.pt", "x.pth", "x.bin"):
        (tmp_path / name).write_bytes(b"\x80\x04canary")
        with pytest.raises(ModelError, match="is a pickle, which can run code; convert it to safetensors"):
            hps(tmp_path / name).check()
    with pytest.raises(ModelError, match="there is no file"):
        hps(tmp_path / "none.safetensors").check()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint[0].read_bytes()[:500_000])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        hps(cut).check()
    with pytest.raises(ModelError, match="text tower is missing"):
        hps(altered(checkpoint[0], tmp_path / "half.safetensors", drop("token_embedding"))).check()
    with pytest.raises(ModelError, match="no tensor visual.class_embedding"):
        hps(altered(checkpoint[0], tmp_path / "other.safetensors", drop("visual."))).check()
    with pytest.raises(ModelError, match="240 of 302 tensors are missing"):   # a network of 12 layers, not of 2
        hps(checkpoint[0], architecture="ViT-B-32").check()
    with pytest.raises(ConfigError, match="'ViT-H-15', which open_clip does not know"):
        hps(checkpoint[0], architecture="ViT-H-15").check()
    with pytest.raises(ConfigError, match="coca_ViT-B-32 is not a plain CLIP"):
        hps(checkpoint[0], architecture="coca_ViT-B-32").check()


def test_without_open_clip_the_line_says_what_to_install(tmp_path, monkeypatch):
    import sys

    save_file({"visual.class_embedding": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "open_clip", None)      # what an absent package looks like to import
    with pytest.raises(ConfigError, match=r"needs open_clip: pip install .diffalign\[clip\]"):
        HPSv2(model=str(tmp_path / "x.safetensors")).check()


def test_hps_versions_are_not_mixed_up_by_name(checkpoint, tmp_path):
    for version, stem in (("v2.0", "HPS_v2_compressed"), ("v2.1", "HPS_v2.1_compressed")):
        file = tmp_path / f"{stem}.safetensors"
        file.write_bytes(checkpoint[0].read_bytes())
        HPSv2(model=str(file), version=version, architecture="tiny").check()
        other = "v2.1" if version == "v2.0" else "v2.0"
        with pytest.raises(ConfigError, match=f"named as version {version}, but version is {other}"):
            HPSv2(model=str(file), version=other, architecture="tiny").check()


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("clip", {"form": "dot"}, "form must be"), ("clip", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ("hpsv2", {"version": "v3"}, "version must be one of v2.0, v2.1, got 'v3'"),
])
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        REWARDS[kind](**options)


def test_the_true_architectures_are_what_the_layouts_say(tmp_path):
    """Tensor names and shapes of ViT-H-14 in open_clip's layout, without memory: what HPSv2's checkpoint must hold."""
    the_open_clip()
    names = {k: tuple(v.shape) for k, v in _open_clip_model("ViT-H-14", "meta").state_dict().items()}
    assert names["visual.conv1.weight"] == (1280, 3, 14, 14) and names["visual.proj"] == (1280, 1024)
    assert names["text_projection"] == (1024, 1024) and names["token_embedding.weight"] == (49408, 1024)
    assert sum("visual.transformer.resblocks" in k for k in names) == 32 * 12
    assert sum(math.prod(shape) for shape in names.values()) == 986_109_441   # the 986.1 M of ViT-H/14
    assert ClipSource(model="x.safetensors").is_file and not ClipSource(model="openai/clip").is_file


def test_a_recipe_names_them(checkpoint):
    options = {"model": str(checkpoint[0]), "architecture": "tiny", "version": "v2.0", "device": "cpu"}
    assert load_reward({"kind": "hpsv2", **options}) == HPSv2(**options)
    with pytest.raises(ConfigError, match="reward.version"):
        load_reward({"kind": "hpsv2", "version": "2.0"})
    with pytest.raises(ConfigError, match="reward.batch_size: must be at least 1, got 0"):
        load_reward({"kind": "pickscore", "batch_size": 0})
