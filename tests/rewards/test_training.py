"""Training a Bradley-Terry reward: losses by hand, a few dozen pairs end to end, the embedded proof (slow)."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.config import _build, load_reward, parse_yaml
from diffalign.data.columns import Tally
from diffalign.data.spec import DataSpec
from diffalign.errors import ConfigError, DataError, ModelError, ResourceError
from diffalign.reward_training import RewardLora, RewardRecipe, train_reward
from diffalign.reward_training.accuracy import accuracy, calibration
from diffalign.reward_training.pairs import balanced, read_pairs, set_apart
from diffalign.reward_training.training import Trainer
from diffalign.rewards.average import average_rewards
from diffalign.rewards.backbone import load_backbone
from diffalign.rewards.heads import BradleyTerry, hinge, logistic
from diffalign.rewards.learned import Learned
from diffalign.rewards.rules import Brightness, Compressibility
from diffalign.rewards.towers import ClipSource

from .toy_clip import flat, make_clip, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip")))


def taste(seed: int, count: int, **more) -> list[dict]:
    """Pairs of levels; the redder is preferred, on a random side."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        a, b = random.choice(np.arange(0, 256, 15), 2, replace=False).tolist()
        rows.append({"jpg_0": a, "jpg_1": b, "label_0": float(a > b), "caption": f"picture {i}", **more})
    return rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl", taste(0, 60))
    write_pairs(folder / "held.jsonl", [*taste(1, 40), {"jpg_0": 0, "jpg_1": 255, "label_0": 0.5, "caption": "tie"}])
    return folder


def recipe_for(folder, clip, pairs, **options) -> RewardRecipe:
    data = DataSpec(path=str(pairs / "train.jsonl"), validation=str(pairs / "held.jsonl"))
    options = {"head": BradleyTerry(hidden=16), "epochs": 30, "batch_size": 16, "learning_rate": 0.01, **options}
    return RewardRecipe(output_dir=str(folder), backbone=clip, data=data, **options)


# Losses.


def test_losses_by_hand():
    """Equal scores under a tie cost 0; a margin of 0.8 costs 0.771101 - 0.693147 = 0.077953 (PickScore's tie loss). Margin 1
    for sure: -log sigmoid(1) = 0.313262. Hinge: max(0, 1 - 0.4) = 0.6; mirrored 1.4; a tie in the middle, 1.
    """
    found = logistic(torch.tensor([0.0, 0.8, 1.0, -1.0]), torch.tensor([0.5, 0.5, 1.0, 0.0]))
    assert found.tolist() == pytest.approx([0, 0.077953, 0.313262, 0.313262], abs=1e-6)
    assert hinge(torch.tensor([0.4] * 3), torch.tensor([1.0, 0.0, 0.5])).tolist() == pytest.approx([0.6, 1.4, 1.0])
    extreme = logistic(torch.tensor([1e4, -1e4]), torch.tensor([1.0, 1.0]))
    assert extreme.tolist() == [0, 1e4]


@pytest.mark.parametrize("loss", [logistic, hinge])
def test_swapping_the_sides_changes_nothing(loss):
    margin, target = torch.randn(50), torch.rand(50)
    assert torch.allclose(loss(margin, target), loss(-margin, 1 - target), atol=1e-6)


def test_a_soft_label_is_best_predicted_by_itself():
    """p = 0.7: the least loss, 0, is at log(0.7 / 0.3) = 0.847298."""
    margins = torch.linspace(-3, 3, 601)
    losses = logistic(margins, torch.full((601,), 0.7))
    assert margins[losses.argmin()] == pytest.approx(math.log(0.7 / 0.3), abs=0.01) and losses.min() < 1e-4


def test_balanced_weights_by_hand():
    """Two users with 1 and 9 pairs: raw weights 1 and 1/9, sum 2, so 0.5 and 0.055556 of the whole; here with mean 1, so
    times 10. Three pairs of a group of three count as one.
    """
    weights = balanced(["a"] + ["b"] * 9)
    assert weights.mean() == pytest.approx(1)
    assert (weights / 10).tolist() == pytest.approx([0.5] + [0.5 / 9] * 9)
    assert balanced([0, 1, 1, 1], np.array([1, 1 / 3, 1 / 3, 1 / 3])).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])


# What is measured.


def test_accuracy_by_hand():
    """Prompt 0: right and a tie (0.75); prompt 1: wrong and NaN (0.25); prompt 2: a labelled tie, left out. Mean 0.5."""
    found = accuracy([2, 0, 1, math.nan, 5], [1, 0, 0, 1, 0.5], [0, 0, 1, 1, 2])
    assert (found.value, found.pairs, found.prompts, found.labelled_ties) == (0.5, 4, 2, 1)
    sweep = accuracy([1] * 20, [1] * 20, list(range(20)))
    assert sweep.value == sweep.high == 1 and sweep.low == pytest.approx(0.8389, abs=1e-3)  # Wilson: 1 / (1 + 3.8415 / 20)
    with pytest.raises(ValueError, match="no ties"):
        accuracy([1], [0.5], [0])


def test_calibration_of_true_probabilities_is_close():
    random = np.random.default_rng(0)
    margins = random.normal(scale=2, size=20_000)
    target = (random.random(20_000) < 1 / (1 + np.exp(-margins))).astype(float)
    assert calibration(margins, target).error < 0.02 < 0.1 < calibration(3 * margins, target).error


# Reading.


def test_groups_become_all_their_pairs(tmp_path):
    lines = [{"prompt": "p", "images": ["pictures/0.png", "pictures/15.png", "pictures/30.png"], "scores": [3, 1, 1]},
             {"prompt": "p", "images": ["pictures/15.png", "pictures/0.png"], "ranks": [2, 1]}]
    write_pairs(tmp_path / "x.jsonl", [{"jpg_0": 0, "jpg_1": 15, "label_0": 1}, {"jpg_0": 30, "jpg_1": 15, "label_0": 1}])
    (tmp_path / "groups.jsonl").write_text("\n".join(json.dumps(line) for line in lines[:1]))
    found = read_pairs(DataSpec(path=str(tmp_path / "groups.jsonl")), Tally(), part="train", seed=0)
    assert list(zip(found.first, found.second, found.target)) == [(0, 1, 1), (0, 2, 1)] and found.weight.tolist() == [0.5, 0.5]
    soft = read_pairs(DataSpec(path=str(tmp_path / "groups.jsonl"), ties="soft"), Tally(), part="train", seed=0)
    assert soft.target.tolist() == [1, 1, 0.5] and soft.ties == 1
    twice = read_pairs(DataSpec(path=str(tmp_path / "x.jsonl")), Tally(), part="train", seed=0)
    assert len(twice.pictures) == 3 and twice.prompt.tolist() == [0, 0]  # 15.png is one picture


def test_soft_labels_keep_their_sides(tmp_path):
    rows = [{"jpg_0": 0, "jpg_1": 15, "label_0": label} for label in (0.3, 0.8, 0.0)]
    found = read_pairs(DataSpec(path=str(write_pairs(tmp_path / "x.jsonl", rows))), Tally(), part="train", seed=0)
    assert found.target.tolist() == pytest.approx([0.3, 0.8, 0])


def test_prompts_are_set_apart_whole(pairs):
    found = read_pairs(DataSpec(path=str(pairs / "train.jsonl")), Tally(), part="train", seed=0)
    train, stop = set_apart(found, 0.3, 0)
    assert 8 < len(stop) < 30 and len(train) + len(stop) == 60 and not set(train.prompt) & set(stop.prompt)
    assert len(set_apart(found, 0.0, 0)[1]) == 0


# End to end.


@pytest.mark.parametrize("features", ["frozen", "lora"])
def test_a_taste_is_learned_from_a_few_dozen_pairs(tmp_path, clip, pairs, features):
    """The redder picture is preferred. The reward in memory and the one read from its folder score alike."""
    lines = []
    options = {"features": features, "compare": (Brightness(),)}
    if features == "lora":
        options |= {"epochs": 15, "head": BradleyTerry(hidden=0), "lora": RewardLora(learning_rate=0.02)}
    report = train_reward(recipe_for(tmp_path, clip, pairs, **options), lines.append)
    assert report["accuracy"]["value"] >= 0.9 and report["accuracy"]["low"] > 0.75
    assert report["accuracy"]["pairs"] == 40 and report["accuracy"]["labelled_ties"] == 1
    assert report["compare"]["brightness"]["value"] > 0.5  # red is brighter than blue
    assert lines[-1] == report["sentence"] and "set apart" in lines[0]
    assert json.loads((tmp_path / "reward" / "reward.json").read_text()) == report

    reward = load_reward({"kind": "learned", "path": str(tmp_path / "reward")})
    images = [flat(level) for level in range(0, 256, 5)]
    scores = reward(images, ["a red circle"] * len(images))
    assert scores.dtype == torch.float32 and np.corrcoef(scores, np.arange(len(images)))[0, 1] > 0.8
    assert reward.identity()["head"]["kind"] == "bradley_terry"


def test_the_same_recipe_gives_the_same_files(tmp_path, clip, pairs):
    for name in "ab":
        train_reward(recipe_for(tmp_path / name, clip, pairs, features="lora", epochs=2), lambda _: None)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / "reward" / file).read_bytes() == (tmp_path / "b" / "reward" / file).read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clip, pairs):
    folder = tmp_path_factory.mktemp("trained")
    train_reward(recipe_for(folder, clip, pairs, features="lora", epochs=3), lambda _: None)
    return folder / "reward"


def test_batch_equals_singles_and_gradients_reach_the_pixels(trained):
    """Prompts of different lengths: padding must not count."""
    random = torch.Generator().manual_seed(0)
    images = list(torch.rand(7, 3, 32, 32, generator=random))
    prompts = ["a red circle", "ring", "two green squares on a white background", "", "a", "red red red", "x"]
    batch = Learned(path=str(trained), batch_size=4)(images, prompts)
    singles = torch.cat([Learned(path=str(trained))([i], [p]) for i, p in zip(images, prompts)])
    assert torch.allclose(batch, singles, atol=1e-6)
    pixels = images[0].clone().requires_grad_()
    Learned(path=str(trained))([pixels], ["a red circle"]).sum().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
    eps, place = 1e-2, (0, 5, 5)
    moved = [pixels.detach().clone() for _ in range(2)]
    moved[0][place] += eps
    moved[1][place] -= eps
    up, down = Learned(path=str(trained))(moved, ["a red circle"] * 2).tolist()
    assert (up - down) / (2 * eps) == pytest.approx(float(pixels.grad[place]), rel=0.05, abs=1e-4)


def test_rewards_of_one_start_average_and_others_do_not(tmp_path, clip, pairs):
    for name, options in {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"head": BradleyTerry(hidden=16, init_seed=9)}}.items():
        train_reward(recipe_for(tmp_path / name, clip, pairs, epochs=5, **options), lambda _: None)
    average_rewards([tmp_path / "a" / "reward", tmp_path / "b" / "reward"], tmp_path / "mean")
    images = [flat(level) for level in range(0, 256, 15)]
    one, other, mean = (Learned(path=str(p))(images, ["p"] * len(images))
                        for p in (tmp_path / "a" / "reward", tmp_path / "b" / "reward", tmp_path / "mean"))
    assert not torch.allclose(one, other) and np.corrcoef(mean, one + other)[0, 1] > 0.9
    with pytest.raises(ModelError, match="differs from that of .* in head"):
        average_rewards([tmp_path / "a" / "reward", tmp_path / "c" / "reward"], tmp_path / "none")


def test_pairs_set_apart_that_are_scored_alike_count_one_half(tmp_path, clip, pairs):
    """Both pictures the same, the second preferred: nobody is right, on whichever side the label lies."""
    rows = [{"jpg_0": 40, "jpg_1": 40, "label_0": 0.0, "caption": f"picture {i}"} for i in range(20)]
    write_pairs(tmp_path / "same.jsonl", rows)
    recipe = recipe_for(tmp_path / "out", clip, pairs, epochs=1, stop_share=0.5)
    report = train_reward(replace(recipe, data=replace(recipe.data, path=str(tmp_path / "same.jsonl"))))
    assert [epoch["stop_accuracy"] for epoch in report["epochs"]] == [0.5]


def test_rewards_of_one_kind_are_compared_apart(tmp_path, clip, pairs):
    twice = (Brightness(), Compressibility(quality=90), Compressibility(quality=10))
    report = train_reward(recipe_for(tmp_path, clip, pairs, epochs=1, compare=twice))
    assert list(report["compare"]) == ["brightness", "compressibility", "compressibility 2"]


@pytest.mark.parametrize("name", ["reward", "reward/config.json", "reward/model.safetensors"])
def test_what_cannot_be_written_is_one_line(tmp_path, clip, pairs, name):
    """A file where the folder should be, or a folder where a file should be."""
    if name == "reward":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ResourceError, match=f"cannot write .*{name}"):
        train_reward(recipe_for(tmp_path, clip, pairs, epochs=1))
    assert not list(tmp_path.rglob("*.tmp"))


def test_early_stopping_keeps_the_best_epoch(tmp_path, clip, pairs):
    """A learning rate that overshoots: what stays is the epoch with the least loss on the prompts set apart."""
    recipe = recipe_for(tmp_path, clip, pairs, learning_rate=0.3, patience=3, stop_share=0.3)
    trainer = Trainer(recipe, load_backbone(ClipSource(model=clip), torch.device("cpu")), lambda _: None)
    trainer.fit()
    losses = [epoch.stop_loss for epoch in trainer.epochs]
    assert len(losses) < 30 and losses.index(min(losses)) == len(losses) - 4
    margins, target = trainer.margins(trainer.stop, "train"), trainer.stop.target
    assert logistic(torch.from_numpy(margins), torch.from_numpy(target)).mean() == pytest.approx(min(losses), abs=1e-6)


# What goes wrong.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"backbone": "nowhere"}, ModelError, "nowhere"),
     ({"data": {"path": "x.jsonl"}}, ConfigError, "data.validation: a reward's accuracy"),
     ({"data": {"layout": "unpaired"}}, ConfigError, "'unpaired' compares no pictures"),
     ({"learning_rate": 0}, ConfigError, "learning_rate: must be above 0, got 0"),
     ({"features": "lora", "lora": {"target_modules": ["nonsense"]}}, ConfigError, r"lora.target_modules: \['nonsense'\]"),
     ({"balance": "users"}, DataError, "60 of 60 pairs name no user"),
     ({"head": {"kind": "pal_angle"}}, DataError, "60 of 60 pairs name no user"),
     ({"head": {"kind": "bradley"}}, ConfigError, "no head called 'bradley'. Did you mean"),
     ({"learning_rate": 1e30, "epochs": 3}, ModelError, "the loss is not finite; lower learning_rate")])
def test_a_bad_recipe_is_one_line(tmp_path, clip, pairs, change, error, message):
    data = {"path": str(pairs / "train.jsonl"), "validation": str(pairs / "held.jsonl")}
    if "path" in change.get("data", {}):
        data = {}
    tree = {"output_dir": str(tmp_path / "out"), "backbone": clip, **change, "data": {**data, **change.get("data", {})}}
    with pytest.raises(error, match=message) as caught:
        train_reward(_build(RewardRecipe, tree, ""), lambda _: None)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "reward").exists()


def test_a_broken_picture_is_refused_or_skipped(tmp_path, clip):
    write_pairs(tmp_path / "held.jsonl", taste(1, 10))
    write_pairs(tmp_path / "train.jsonl", taste(0, 30))
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["jpg_0"]
    (tmp_path / first).write_bytes(b"broken")
    for features in ("frozen", "lora"):
        with pytest.raises(DataError, match="train.jsonl line 1, jpg_0"):
            train_reward(recipe_for(tmp_path / "out", clip, tmp_path, features=features, epochs=1), lambda _: None)
        data = DataSpec(path=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "held.jsonl"), bad_rows="skip")
        recipe = RewardRecipe(output_dir=str(tmp_path / "out"), backbone=clip, data=data, features=features, epochs=1)
        report = train_reward(recipe, lambda _: None)
        assert report["bad_rows"] >= 1 and report["pairs"]["train"] + report["pairs"]["stop"] < 30


def test_a_bad_folder_is_one_line(tmp_path, trained, clip):
    def broken(change):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained, folder)
        change(folder)
        with pytest.raises((ModelError, ConfigError)) as caught:
            Learned(path=str(folder)).check()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit(**facts):
        def change(folder):
            content = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**content, **facts}))
        return change

    def cut(folder):
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])

    assert "config.json is missing" in broken(lambda folder: (folder / "config.json").unlink())
    assert "is not readable JSON" in broken(lambda folder: (folder / "config.json").write_text("{"))
    assert "is of format 9" in broken(edit(format=9))
    assert "names a head 'odd'" in broken(edit(head={"kind": "odd"}))
    assert "head that cannot be made" in broken(edit(head={"kind": "bradley_terry", "hidden": -1}))
    assert "does not fit config.json" in broken(edit(head={"kind": "bradley_terry", "hidden": 7}))
    assert "trained on other weights" in broken(edit(backbone_sha256="0" * 64))
    assert "with the reward kind pal" in broken(edit(head={"kind": "pal_angle"}, users=["a"]))
    assert "no complete safetensors" in broken(cut) or "not a complete safetensors" in broken(cut)
    assert "there is no folder" in broken(lambda folder: shutil.rmtree(folder))
    with pytest.raises(ModelError, match="other weights"):
        Learned(path=str(trained), backbone=str(make_clip(tmp_path / "other", seed=5))).check()
    moved = shutil.copytree(clip, tmp_path / "moved")
    Learned(path=str(trained), backbone=str(moved)).check()


def test_the_shipped_recipe_builds():
    tree = parse_yaml((ROOT / "configs" / "rewards" / "tiny.yaml").read_text(), "tiny.yaml")
    recipe = _build(RewardRecipe, tree, "")
    assert recipe.backbone == "assets/tiny-clip" and recipe.compare


@pytest.mark.slow
def test_on_the_committed_pairs_it_comes_within_three_points_of_the_exact_checker(tmp_path, monkeypatch):
    """The labels are the checker's own, so its agreement is 1. A guard for these 91 pairs, on which settings were compared;
    fresh pairs give less, 95.6 % (docs/reward_training.md), so this passing does not show the three points.
    """
    monkeypatch.chdir(ROOT)
    tree = parse_yaml((ROOT / "configs" / "rewards" / "tiny.yaml").read_text(), "tiny.yaml")
    report = train_reward(_build(RewardRecipe, {**tree, "output_dir": str(tmp_path)}, ""), lambda _: None)
    assert report["compare"]["scenes"]["value"] == 1
    assert report["accuracy"]["value"] >= report["compare"]["scenes"]["value"] - 0.03
