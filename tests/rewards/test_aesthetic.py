"""LAION's heads in their published layouts: a linear layer, five without activations, five with ReLUs."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import ConfigError, ModelError
from diffalign.rewards import Aesthetic, identity
from diffalign.rewards.aesthetic import LAYERS
from diffalign.rewards.preprocess import Preprocess

from .tiny_clip import SIZE, WIDTH, broken, clip_folder, picture

IMAGES = [picture(i, 30 + i, 41 - i) for i in range(4)]
PROMPTS = [""] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "model"
    return path, clip_folder(path)


def head_file(file, version, width=WIDTH, sizes=(1024, 128, 64, 16, 1)):
    """The published layers with random numbers; the true hidden sizes."""
    g, state = torch.Generator().manual_seed(5), {}
    for name, out in zip(LAYERS[version], sizes if version != "v1" else (1,), strict=True):
        state[name + "weight"] = torch.randn(out, width, generator=g) / width**0.5
        state[name + "bias"] = torch.randn(out, generator=g)
        width = out
    save_file(state, file)
    return file


def rewards(folder, tmp_path, version, **options):
    file = head_file(tmp_path / f"{version}.safetensors", version)
    return Aesthetic(head=str(file), version=version, model=str(folder), device="cpu", **options), load_file(file)


def features_by_hand(model):
    rows = []
    for image in IMAGES:
        states = model.vision_model(Preprocess(size=SIZE)(image)[None]).last_hidden_state[0, 0]
        feature = model.visual_projection.weight @ model.vision_model.post_layernorm(states)
        rows.append(feature / feature.square().sum().sqrt())
    return torch.stack(rows)


def test_v1_is_one_linear_layer(folder, tmp_path):
    reward, head = rewards(folder[0], tmp_path, "v1")
    expected = features_by_hand(folder[1]) @ head["weight"][0] + head["bias"]
    np.testing.assert_allclose(reward(IMAGES, PROMPTS), expected, atol=1e-6)


def test_v2_collapses_to_one_affine_function_and_is_the_same_twice(folder, tmp_path):
    reward, head = rewards(folder[0], tmp_path, "v2")
    weight, bias = torch.eye(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    for i in (0, 2, 4, 6, 7):
        layer, shift = (head[f"layers.{i}.{part}"].double() for part in ("weight", "bias"))
        weight, bias = layer @ weight, layer @ bias + shift
    collapsed = features_by_hand(folder[1]).double() @ weight[0] + bias
    scores = reward(IMAGES, PROMPTS)
    np.testing.assert_allclose(scores, collapsed, atol=2e-6)
    assert torch.equal(scores, reward(IMAGES, PROMPTS))          # no dropout
    e0 = torch.eye(WIDTH)[:1]
    assert reward.rate(e0).item() == pytest.approx((weight[0, 0] + bias[0]).item(), abs=2e-6)


def test_v2_relu_is_not_affine(folder, tmp_path):
    reward, head = rewards(folder[0], tmp_path, "v2_relu")
    x = features_by_hand(folder[1])
    for i in (0, 3, 6, 9, 11):
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
        x = x.clamp(min=0) if i < 11 else x
    np.testing.assert_allclose(reward(IMAGES, PROMPTS), x[:, 0], atol=2e-6)


@pytest.mark.parametrize("version", list(LAYERS))
def test_batched_equals_single_and_only_the_unreadable_is_nan(folder, tmp_path, version):
    reward, _ = rewards(folder[0], tmp_path, version, batch_size=3)
    together = reward(IMAGES, PROMPTS)
    singles = torch.cat([reward([image], ["whatever"]) for image in IMAGES])     # the prompt is not read
    assert ((together - singles).abs() / together.abs().clamp(min=1)).max() < 1e-6
    scores = reward([IMAGES[0], broken(), *IMAGES[2:]], PROMPTS)
    assert scores.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(scores[[0, 2, 3]], together[[0, 2, 3]], rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_pixels_and_match_finite_differences(folder, tmp_path):
    reward, head = rewards(folder[0], tmp_path, "v2_relu")
    towers = reward._source.load("cpu", torch.float64)
    layers = [(head[name + "weight"].double(), head[name + "bias"].double()) for name in LAYERS["v2_relu"]]
    exact_reward = Aesthetic(version="v2_relu")
    exact_reward.__dict__["_layers"] = layers
    g = torch.Generator().manual_seed(0)
    image = (0.2 + 0.6 * torch.rand(3, 29, 34, generator=g, dtype=torch.float64)).requires_grad_()
    exact = lambda x: exact_reward.rate(towers.image(Preprocess(size=SIZE)(x)[None]))[0]  # noqa: E731
    gradient, = torch.autograd.grad(exact(image), image)
    for _ in range(4):
        way = torch.randn(image.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            difference = (exact(image + 1e-6 * way) - exact(image - 1e-6 * way)) / 2e-6
        assert (gradient * way).sum() == pytest.approx(difference.item(), rel=1e-4)
    pixels = image.detach().float().requires_grad_()
    reward([pixels], [""]).sum().backward()
    torch.testing.assert_close(pixels.grad.double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_identity_pins_both_files(folder, tmp_path):
    reward, _ = rewards(folder[0], tmp_path, "v1")
    facts = identity(reward)
    assert facts["version"] == "v1" and facts["scale"] == "rating" and len({facts["sha256"], facts["head_sha256"]}) == 2


def test_heads_that_cannot_work_are_one_line(folder, tmp_path):
    head = lambda file, version="v2": Aesthetic(head=str(file), version=version, model=str(folder[0]))  # noqa: E731
    with pytest.raises(ConfigError, match="aesthetic: head is not set"):
        Aesthetic(model=str(folder[0])).check()
    (tmp_path / "head.pth").write_bytes(b"canary")
    with pytest.raises(ModelError, match="is a pickle"):
        head(tmp_path / "head.pth").check()
    with pytest.raises(ModelError, match="reads features of 768 numbers, but .* gives 12"):
        head(head_file(tmp_path / "l14.safetensors", "v2", width=768)).check()
    relu = head_file(tmp_path / "relu.safetensors", "v2_relu")
    with pytest.raises(ModelError, match=r"\(version v2\): 6 of 10 tensors are missing"):
        head(relu).check()
    with pytest.raises(ModelError, match=r"\(version v1\): 2 of 2 tensors are missing"):
        head(relu, "v1").check()
    broken_chain = load_file(relu) | {"layers.6.weight": torch.zeros(64, 127)}
    save_file(broken_chain, tmp_path / "chain.safetensors")
    with pytest.raises(ModelError, match=r"layers.6.weight has shape \[64, 127\], expected \[64, 128\]"):
        head(tmp_path / "chain.safetensors", "v2_relu").check()
    with pytest.raises(ModelError, match="there is no file"):
        head(tmp_path / "none.safetensors").check()
    for options, message in (({"version": "v3"}, "version must be one of"), ({"batch_size": 0}, "batch_size must")):
        with pytest.raises(ValueError, match=message):
            Aesthetic(**options)
