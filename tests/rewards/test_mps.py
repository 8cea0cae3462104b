"""MPS on a small random model in the layout of the published checkpoint, against the formula written out for one picture."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import ConfigError, ModelError
from diffalign.rewards import MPS, identity
from diffalign.rewards.mps import CONDITION, load_network
from diffalign.rewards.preprocess import Preprocess

from .tiny_clip import LENGTH, SIZE, broken, clip_folder, mps_file, picture

PROMPTS = ["a red ring", "zz q", "a red ring", "one " * 60]
IMAGES = [*(picture(i, 30 + i, 41 - i) for i in range(3)), picture(4, 31, 28)]   # the last has a crop with an odd rest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("mps")
    state = mps_file(path / "mps.safetensors", path / "clip")
    return path / "mps.safetensors", path / "clip", state


@pytest.fixture(scope="module")
def reward(files):
    return mps(files)


def mps(files, **options):
    return MPS(**{"model": str(files[0]), "backbone": str(files[1]), "device": "cpu", "threshold": 0.5, **options})


def token_ids(text):
    """Letter by letter: the tiny vocabulary has a..z, then a..z at a word's end; punctuation is unknown, which is the end."""
    ids = [52]
    for word in text.replace(",", " ,").replace(".", " .").split():
        ids += [53] if word in ",." else [*(ord(c) - 97 for c in word[:-1]), 26 + ord(word[-1]) - 97]
    ids = (ids + [53])[:LENGTH]
    ids[-1] = 53
    return torch.tensor([ids + [53] * (LENGTH - len(ids))])


def by_hand(state, clip, image, prompt, threshold):
    """The score of one picture, head by head and query by query, with plain sums."""
    w = lambda i, part, name: state[f"cross_model.layers.{i}.{part}.fn.{name}"]  # noqa: E731
    text_states = clip.text_model(token_ids(prompt)).last_hidden_state[0]
    text = text_states @ clip.text_projection.weight.T
    condition = clip.text_model(token_ids(CONDITION)).last_hidden_state[0] @ clip.text_projection.weight.T
    likeness = torch.stack([max(t @ c for c in condition) for t in text])
    kept = [j for j in range(LENGTH) if likeness[j] / likeness.max() > threshold]
    pixels = Preprocess(size=SIZE, middle="floor")(image)[None]
    x = clip.vision_model(pixels).last_hidden_state[0] @ clip.visual_projection.weight.T

    def normed(x, weight):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight

    def gated(y):
        value, gate = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
        return value * gate * torch.sigmoid(gate)

    def attended(q, k, v, heads, d):
        out = torch.zeros(len(q), heads * d)
        for n in range(len(q)):
            for h in range(heads):
                one = q[n, h * d : (h + 1) * d]
                weights = torch.tensor([math.exp(one @ key / math.sqrt(d)) for key in k])
                out[n, h * d : (h + 1) * d] = (weights / weights.sum()) @ v
        return out

    def turned(y, d):
        out = y.clone()
        for n in range(len(y)):
            for start in range(0, y.shape[1], d):
                for j in range(d // 2):
                    angle = n / 10000 ** (2 * j / d)
                    a, b = y[n, start + j], y[n, start + j + d // 2]
                    out[n, start + j] = a * math.cos(angle) - b * math.sin(angle)
                    out[n, start + j + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    heads, d = 2, 6
    for i in range(2):
        y = normed(x, w(i, 0, "norm.weight"))
        kv = text[kept] @ w(i, 0, "to_kv.weight").T
        seen = attended(y @ w(i, 0, "to_q.weight").T, kv[:, :d], kv[:, d:], heads, d)
        x = x + seen @ w(i, 0, "to_out.weight").T + gated(y @ w(i, 0, "ff.0.weight").T) @ w(i, 0, "ff.2.weight").T
        fused = normed(x, w(i, 1, "norm.weight")) @ w(i, 1, "fused_attn_ff_proj.weight").T
        q, k, v, ff = fused[:, :12], fused[:, 12:18], fused[:, 18:24], fused[:, 24:]
        seen = attended(turned(q, d), turned(k, d), v, heads, d)
        x = x + seen @ w(i, 1, "attn_out.weight").T + gated(ff) @ w(i, 1, "ff_out.1.weight").T
    end = token_ids(prompt)[0].tolist().index(53)
    return (math.exp(4.6) * torch.cosine_similarity(x[0], text[end], dim=0)).item(), len(kept)


def test_the_score_is_the_published_formula(files, reward, tmp_path):
    clip = clip_folder(tmp_path / "same")            # the same seed, hence the same weights as in the file
    expected, kept = zip(*(by_hand(files[2], clip, image, prompt, 0.5) for image, prompt in zip(IMAGES, PROMPTS, strict=True)),
                         strict=True)
    np.testing.assert_allclose(reward(IMAGES, PROMPTS), expected, rtol=1e-5, atol=2e-4)
    assert 0 < min(kept) < LENGTH                    # the mask does hide tokens


def test_the_threshold_matters_and_is_part_of_the_identity(files, reward):
    other = mps(files, threshold=0.9)
    assert (other(IMAGES, PROMPTS) - reward(IMAGES, PROMPTS)).abs().max() > 0.01
    assert identity(other)["threshold"] == 0.9 and identity(other)["condition"] == CONDITION
    assert MPS().threshold == 0.3


def test_a_score_does_not_depend_on_its_batch_mates(reward):
    together = reward(IMAGES, PROMPTS)
    singles = torch.cat([reward([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    assert ((together - singles).abs() / together.abs().clamp(min=1)).max() < 1e-6
    assert reward(IMAGES[::-1], PROMPTS[::-1]).flip(0) == pytest.approx(together, rel=1e-6)


def test_an_unreadable_picture_is_nan_and_nothing_else_is(reward):
    scores = reward([*IMAGES[:3], broken()], PROMPTS)
    assert scores.isnan().tolist() == [False, False, False, True]


def test_gradients_reach_the_pixels_and_match_finite_differences(files, reward):
    network = load_network(files[0], files[1], CONDITION, 0.5, torch.device("cpu"), torch.float64)
    words = list(network.read(["a red ring"]))
    g = torch.Generator().manual_seed(0)
    image = (0.2 + 0.6 * torch.rand(3, 29, 34, generator=g, dtype=torch.float64)).requires_grad_()
    exact = lambda x: network.score(Preprocess(size=SIZE, middle="floor")(x)[None], words)[0]  # noqa: E731
    gradient, = torch.autograd.grad(exact(image), image)
    for _ in range(4):
        way = torch.randn(image.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            difference = (exact(image + 1e-5 * way) - exact(image - 1e-5 * way)) / 2e-5
        assert (gradient * way).sum() == pytest.approx(difference.item(), rel=1e-4)
    pixels = image.detach().float().requires_grad_()
    reward([pixels], ["a red ring"]).sum().backward()
    torch.testing.assert_close(pixels.grad.double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("prefix", ["module.", "state_dict."])
def test_prefixes_of_wrapped_checkpoints_are_seen_through(files, reward, tmp_path, prefix):
    save_file({prefix + k: v for k, v in load_file(files[0]).items()}, tmp_path / "mps.safetensors")
    wrapped = mps((tmp_path / "mps.safetensors", files[1]))
    assert torch.equal(wrapped(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))


def test_files_that_cannot_work_are_one_line(files, tmp_path):
    def without(*parts, **changes):
        state = {k: v for k, v in load_file(files[0]).items() if not any(part in k for part in parts)}
        save_file(state | changes, tmp_path / "x.safetensors")
        return mps((tmp_path / "x.safetensors", files[1]))

    with pytest.raises(ConfigError, match="mps: model is not set"):
        MPS(backbone=str(files[1])).check()
    (tmp_path / "MPS_overall_checkpoint.pth").write_bytes(b"canary")
    with pytest.raises(ModelError, match="is a pickle, which can run code"):
        mps((tmp_path / "MPS_overall_checkpoint.pth", files[1])).check()
    with pytest.raises(ModelError, match="no tensor cross_model.layers.0.0.fn.to_q.weight"):
        without("cross_model").check()
    with pytest.raises(ModelError, match="text tower is missing"):
        without("text_").check()
    with pytest.raises(ModelError, match="the first is cross_model.layers.1.1.fn.attn_out.weight"):
        without("layers.1.1.fn.attn_out").check()
    with pytest.raises(ModelError, match=r"layers.1.0.fn.to_kv.weight has shape \[10, 12\], expected \[12, 12\]"):
        without(**{"cross_model.layers.1.0.fn.to_kv.weight": torch.zeros(10, 12)}).check()
    with pytest.raises(ModelError, match="cross_model.layers.0.0.fn.ff.2.weight"):
        without("layers.0.0.fn.ff.2").check()
    for options, message in (({"threshold": 1.0}, "threshold must lie in"), ({"batch_size": 0}, "batch_size must be")):
        with pytest.raises(ValueError, match=message):
            MPS(**options)


def test_the_buffers_of_the_norms_may_be_left_out(files, reward, tmp_path):
    save_file({k: v for k, v in load_file(files[0]).items() if not k.endswith(("fn.norm.bias", "inv_freq", "position_ids"))},
              tmp_path / "x.safetensors")
    lean = mps((tmp_path / "x.safetensors", files[1]))
    torch.testing.assert_close(lean(IMAGES, PROMPTS), reward(IMAGES, PROMPTS), rtol=1e-6, atol=1e-6)
