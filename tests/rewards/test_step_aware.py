"""SPO's step-aware preference model: the numbers of spo.md section 2a, training on predicted pictures, saving and refusing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign.data.columns import Tally
from diffalign.data.spec import DataSpec
from diffalign.errors import DataError, ModelError
from diffalign.models.spec import ModelSpec
from diffalign.reward_training import RewardLora, RewardRecipe, StepSpec, check_recipe, train_reward
from diffalign.reward_training.pairs import read_pairs
from diffalign.reward_training.predicted import Predicted
from diffalign.reward_training.training import Noisy
from diffalign.rewards import judged
from diffalign.rewards.backbone import load_backbone
from diffalign.rewards.heads import BradleyTerry
from diffalign.rewards.learned import Learned, StepAware
from diffalign.rewards.pal import PalAngle
from diffalign.rewards.step_aware import sines
from diffalign.rewards.towers import ClipSource

from .toy_clip import flat, make_clip, write_pairs

MODEL = ModelSpec(pretrained_model_name_or_path=str(Path(__file__).parents[2] / "assets" / "tiny-sdxl"))
LEVELS = torch.tensor([0.001, 0.3, 1.0])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


def backbone(clip, **options):
    return load_backbone(ClipSource(model=str(clip)), torch.device("cpu"), **options)


def pictures(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_time_as_sines():
    """256 numbers, cosines first, of the timestep 1000 t - 1; the period grows from 2 pi to 2 pi * 10,000^(127/128)."""
    found = sines(LEVELS)
    slowest = 10_000 ** (-127 / 128)
    assert found.shape == (3, 256)
    assert found[0].tolist() == pytest.approx([1.0] * 128 + [0.0] * 128, abs=1e-4)  # timestep 0
    assert found[2, [0, 127, 128, 255]].tolist() == pytest.approx(
        [math.cos(999), math.cos(999 * slowest), math.sin(999), math.sin(999 * slowest)], abs=1e-3)


def test_it_starts_as_the_clip_it_is_made_of(clip):
    """Gates 1, shifts and scales 0 (spo.md 7.4: the released constructor has 1 everywhere): no level changes anything."""
    plain, aware = backbone(clip), backbone(clip, step_aware=True)
    block, = aware.time.blocks
    assert block[1].bias.view(6, -1).mean(1).tolist() == [0, 0, 1, 0, 0, 1] and not block[1].weight.any()
    assert not aware.time.last[1].weight.any() and not aware.time.last[1].bias.any()
    assert torch.allclose(aware.images(pictures(), LEVELS), plain.images(pictures()), atol=1e-6)


def test_modulation(clip):
    """(1 + scale) x + shift behind the norm, gates on the branches: without them the block is its input."""
    aware = backbone(clip, step_aware=True)
    tower = aware.clip.vision_model
    x = tower.pre_layrnorm(tower.embeddings(pictures()))
    with torch.no_grad():
        aware.time.blocks[0][1].bias.zero_()
        aware.time.last[1].bias.view(2, -1)[0] = 0.1
        aware.time.last[1].bias.view(2, -1)[1] = 0.5
    expected = aware.clip.visual_projection(1.5 * tower.post_layernorm(x[:, 0]) + 0.1)
    assert torch.allclose(aware.time.pooled(aware.clip, pictures(), LEVELS), expected, atol=1e-6)
    with torch.no_grad():  # one branch alone: shift and scale of its own norm
        rows = aware.time.blocks[0][1].bias.view(6, -1)
        rows[3], rows[4], rows[5] = 0.2, -0.5, 2.0
        layer = tower.encoder.layers[0]
        x = x + 2 * layer.mlp(0.5 * layer.layer_norm2(x) + 0.2)
    expected = aware.clip.visual_projection(1.5 * tower.post_layernorm(x[:, 0]) + 0.1)
    assert torch.allclose(aware.time.pooled(aware.clip, pictures(), LEVELS), expected, atol=1e-5)


def taste(count, start=0):
    return [{"jpg_0": 20 * (i % 12), "jpg_1": 240 - 7 * (i % 30), "label_0": float(20 * (i % 12) > 240 - 7 * (i % 30)),
             "caption": f"picture {start + i}"} for i in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", taste(10))
    write_pairs(folder / "held.jsonl", taste(6, 100))
    return DataSpec(path=str(folder / "train.jsonl"), validation=str(folder / "held.jsonl"))


def recipe_for(folder, clip, data, **options):
    common = {"features": "lora", "lora": RewardLora(rank=2), "steps": StepSpec(model=MODEL), "epochs": 2, "batch_size": 8,
              "learning_rate": 0.01, "stop_share": 0.0, "encode_batch_size": 4, "head": BradleyTerry(hidden=0),
              "device": "cpu"}
    return RewardRecipe(output_dir=str(folder), backbone=str(clip), data=data, **{**common, **options})


@pytest.fixture(scope="module", params=["lora", "whole"])
def trained(request, clip, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    report = train_reward(recipe_for(folder, clip, data, features=request.param), lambda line: None)
    return folder / "reward", report


def test_what_training_leaves(trained, clip):
    folder, report = trained
    assert json.loads((folder / "config.json").read_text())["step_aware"] is True and report["accuracy"]["pairs"] == 6
    reward = StepAware(path=str(folder), device="cpu")
    reward.check()
    images, prompts = [flat(40), flat(200)] * 2, ["a red circle"] * 4
    scores = judged(reward, images, prompts, {"t": [0.1, 0.1, 0.9, 0.9]})
    assert scores.isfinite().all() and not torch.equal(scores[:2], scores[2:])   # the level counts
    alone = torch.cat([judged(reward, [image], ["a red circle"], {"t": [t]})
                       for image, t in zip(images, [0.1, 0.1, 0.9, 0.9], strict=True)])
    assert torch.allclose(scores, alone, atol=1e-5)
    before, after = backbone(clip).clip.state_dict(), reward.trained.backbone.clip.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_gradient_reaches_the_picture(trained):
    image = torch.rand(3, 32, 32, requires_grad=True)
    StepAware(path=str(trained[0]), device="cpu")([image], ["a red circle"], [0.5]).sum().backward()
    assert image.grad.abs().sum() > 0


def test_read_as_what_it_is(trained, clip, data, tmp_path):
    with pytest.raises(ModelError, match="reads the noise level; read it with the reward kind step_aware"):
        Learned(path=str(trained[0])).check()
    train_reward(recipe_for(tmp_path, clip, data, steps=None, epochs=1), lambda line: None)
    with pytest.raises(ModelError, match="is no reward that reads the noise level; .* learned"):
        StepAware(path=str(tmp_path / "reward")).check()
    with pytest.raises(DataError, match='column "t"'):
        judged(StepAware(path=str(trained[0])), [flat(1)], ["x"])
    with pytest.raises(ValueError, match="1 noise levels for 2 prompts"):
        StepAware(path=str(trained[0]))([flat(1), flat(2)], ["x", "y"], [0.5])


def test_pairs_share_level_and_noise_and_nothing_depends_on_the_batch(clip, data):
    """spo.md 2a: one t and one noise for both pictures; both belong to (pair, visit)."""
    seen = []

    class Spy(Predicted):
        def __call__(self, noised, prompts):
            seen.append(noised)
            return super().__call__(noised, prompts)

    aware = backbone(clip, step_aware=True)
    torch.nn.init.normal_(aware.time.last[1].weight, std=0.1)  # so that levels count
    features = Noisy(aware, Spy(MODEL, 1.0, torch.device("cpu")), 0)
    pairs = read_pairs(data, Tally(), part="train", seed=0)
    features.add("train", pairs, recipe_for("x", clip, data), Tally())
    rows = torch.arange(6).numpy()
    with torch.no_grad():
        whole, other = features("train", pairs, rows, 1), features("train", pairs, rows, 2)
        swapped = features("train", pairs, rows[::-1].copy(), 1)
        two = [features("train", pairs, part, 1) for part in (rows[:2], rows[2:])]
    first, second = seen[0].noise.chunk(2)
    assert torch.equal(first, second) and torch.equal(*seen[0].t.chunk(2)) and len(set(seen[0].t.tolist())) == 6
    assert not torch.equal(seen[0].t, seen[1].t) and not torch.allclose(whole[0], other[0])
    for i in range(3):
        assert torch.allclose(whole[i], swapped[i].flip(0), atol=1e-5)
        assert torch.allclose(whole[i], torch.cat([part[i] for part in two]), atol=1e-5)


def test_a_clean_picture_is_predicted_as_itself():
    """At timestep 0 what the pipeline predicts of a picture is its autoencoder's copy; guidance 1 asks it once."""
    predicted = Predicted(MODEL, 1.0, torch.device("cpu"))
    x0 = predicted.latents(torch.full((1, 3, 64, 64), 0.5))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    noised, copy = predicted.noised(x0, torch.tensor([0.001]), noise), predicted.encoders.decode(x0) / 2 + 0.5
    prompt = ["a red ring on a blue background"]
    assert (predicted(noised, prompt) - copy).abs().mean() < 0.05
    assert (predicted(predicted.noised(x0, torch.tensor([1.0]), noise), prompt) - copy).abs().mean() > 0.1
    predicted.scale = 3.0
    assert predicted(noised, prompt).isfinite().all()


@pytest.mark.parametrize("options, words", [({"features": "frozen"}, "learns to see"), ({"head": PalAngle()}, "exclude")])
def test_bad_recipes(clip, data, options, words):
    with pytest.raises(ValueError, match=words):
        recipe_for("x", clip, data, **options)
    with pytest.raises(ModelError, match="no/such/model"):
        nothing = ModelSpec(pretrained_model_name_or_path="no/such/model")
        check_recipe(recipe_for("x", clip, data, steps=StepSpec(model=nothing)))
    with pytest.raises(ValueError, match="guidance_scale"):
        replace(StepSpec(model=MODEL), guidance_scale=-1.0)
