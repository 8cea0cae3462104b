"""Step-level alignment as a user runs it: exact resume between rollouts, judges that do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.config import load_recipe
from diffalign.run import LORA_FILE, train

from .conftest import ROOT
from .test_latent_reward import SHORT, refused

SPM = ROOT / "assets" / "tiny-spm"
JUDGES = {"lpo": {"kind": "latent", "path": str(ROOT / "assets" / "tiny-lrm")},
          "spo": {"kind": "predicted_image", "reward": {"kind": "step_aware", "path": str(SPM)}},
          "tailorpo": {"kind": "predicted_image", "reward": "scenes"}}


@pytest.fixture
def step_level(small, tmp_path, monkeypatch):
    """A function (folder, judge, **source) -> path of a recipe with rollouts of four steps that two updates share."""
    monkeypatch.chdir(ROOT)  # the judges name their backbone from the repository's root

    def recipe(folder, judge, **source):
        folder.mkdir(exist_ok=True)
        return small(folder, likelihood="transitions", objective={"kind": "dpo", "beta": 500, "clip": 0.1}, evaluate=None,
                     data={"validation": None}, train={**SHORT, "max_train_steps": 4, "checkpointing_steps": 2},
                     source={"kind": "stepwise", "judge": judge, "sampler": {"solver": "ancestral", "steps": 4},
                             "candidates": 2, "threshold": {"kind": "constant", "gap": 0.0}, "updates": 2, **source})
    return recipe


@pytest.mark.parametrize("name", JUDGES)
def test_resumed_to_the_bit_between_rollouts(step_level, tmp_path, name):
    whole, cut = (step_level(tmp_path / folder, JUDGES[name]) for folder in ("whole", "cut"))
    assert train(load_recipe(whole))["step"] == 4
    train(load_recipe(cut, ["train.max_train_steps=2"]))
    train(load_recipe(cut))
    one, two = (load_file(tmp_path / folder / "run" / LORA_FILE) for folder in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.count_nonzero() for key, value in one.items() if "lora_B" in key or "lora.up" in key)


def test_the_push_of_a_latent_judge(step_level, tmp_path):
    assert train(load_recipe(step_level(tmp_path, JUDGES["lpo"], push=0.2), ["train.max_train_steps=2"]))["step"] == 2


def test_a_run_does_not_go_on_with_another_step_aware_judge(step_level, tmp_path, capsys):
    folder = shutil.copytree(SPM, tmp_path / "judge")
    judge = {"kind": "predicted_image", "reward": {"kind": "step_aware", "path": str(folder)}}
    path = step_level(tmp_path, judge)
    assert main(["train", str(path), "train.max_train_steps=2"]) == 0
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.logit_scale": weights["head.logit_scale"] + 1}, folder / "model.safetensors")
    refused(capsys, main(["train", str(path)]), "judge was")


@pytest.mark.parametrize("reward, words", [
    ({"kind": "step_aware", "path": "nothing"}, ("there is no folder nothing", "train-reward")),
    ({"kind": "learned", "path": str(SPM)}, ("reads the noise level", "step_aware")),
    ({"kind": "pal", "path": "x", "by_row": True}, ("there is no folder x",))])
def test_judges_that_are_refused(step_level, tmp_path, capsys, reward, words):
    refused(capsys, main(["train", str(step_level(tmp_path, {"kind": "predicted_image", "reward": reward}))]), *words)
    assert not (tmp_path / "run").exists()


def test_no_judge_of_finished_pictures(step_level, tmp_path, capsys):
    """Pictures that are drawn have no level."""
    (tmp_path / "p.txt").write_text("a red ring on a blue background\n")
    spec = json.dumps({"prompts": str(tmp_path / "p.txt"), "judge": JUDGES["spo"]["reward"]})
    refused(capsys, main(["train", str(step_level(tmp_path, JUDGES["tailorpo"])), f"evaluate={spec}"]), "evaluate.judge",
            'column "t"')


@pytest.mark.parametrize("source, words", [
    ({"sampler": {"solver": "ancestral", "steps": 4, "eta": 0.0}}, ("source.sampler.eta", "must be above 0")),
    ({"sampler": {"solver": "ancestral", "timesteps": [999, 749, 499, 249]}}, ("timesteps", "was not distilled")),
    ({"sampler": {"solver": "ancestral", "steps": 3}, "block": 4}, ("source", "needs 4 steps")),
    ({"start": 0.1}, ("source", "leave no step"))])
def test_schedules_that_do_not_fit(step_level, tmp_path, capsys, source, words):
    refused(capsys, main(["train", str(step_level(tmp_path, JUDGES["lpo"], **source))]), *words)
    assert not (tmp_path / "run").exists()
