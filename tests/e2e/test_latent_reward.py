"""A latent reward model from its recipe to its uses: trained, stopped and resumed, read as a reward, judging a rollout."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.config import load_recipe
from diffalign.models.spec import LATENT_REWARD
from diffalign.rewards import judged
from diffalign.rewards.latent import Latent
from diffalign.run import train

from .conftest import MODEL

LRM = {"model": {"pretrained_model_name_or_path": str(MODEL), "lora": None}, "likelihood": {"kind": "latent_reward"},
       "objective": {"kind": "dpo", "beta": 1, "reference_free": True, "less_entropy": True}, "evaluate": None}
SHORT = {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 0, "cpu": True}


def lpo(path, **judge):
    return {"likelihood": "transitions", "objective": {"kind": "dpo", "beta": 500, "clip": 0.1}, "evaluate": None,
            "data": {"validation": None}, "train": SHORT,
            "source": {"kind": "stepwise", "judge": {"kind": "latent", "path": str(path), **judge},
                       "sampler": {"solver": "ancestral", "steps": 4}, "threshold": {"kind": "constant", "gap": 0.0}}}


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """(folder of the run, what train.json holds): four steps without a stop."""
    folder = tmp_path_factory.mktemp("lrm")
    facts = train(load_recipe(small(folder, **LRM)))
    return folder / "run", facts


def test_what_a_run_leaves(trained):
    run, facts = trained
    heldout = json.loads((run / "train.json").read_text())["heldout"]
    assert heldout["of"] == "scores of the latent reward" and heldout["pairs"] == 4 and heldout["draws"] == 10
    assert heldout["after_low"] <= heldout["after"] <= heldout["after_high"]
    for share, low, high in zip(*(heldout[name] for name in ("by_time", "by_time_low", "by_time_high")), strict=True):
        assert low <= share <= high and high - low > 0.3   # eight pairs, however many draws
    assert facts["initial_loss"] == pytest.approx(math.log(2), abs=0.3) and set(facts["validation_start"]) >= {"accuracy_t0"}
    assert sorted(p.name for p in (run / LATENT_REWARD).iterdir()) == ["config.json", "model.safetensors"]
    assert not (run / "pipeline").exists() and not list(run.glob("pytorch_lora*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("accuracy_t4" in line for line in lines) and not any("win_error" in line for line in lines)
    page = (run / "report.html").read_text()
    assert "Latent Reward Model" in page and "load_reward" in page and "DiffusionPipeline" not in page


def test_resumed_to_the_bit(trained, small, tmp_path):
    run, _ = trained
    path = small(tmp_path, **LRM)
    train(load_recipe(path, ["train.max_train_steps=2"]))
    train(load_recipe(path))
    whole, cut = (load_file(folder / LATENT_REWARD / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_reward_of_pictures(trained):
    run, _ = trained
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    scores = judged(Latent(path=str(run / LATENT_REWARD), device="cpu"), images, ["a red ring on a blue background"] * 2)
    assert scores.isfinite().all() and scores[0] != scores[1]


def test_a_judge_of_a_rollout(trained, small, tmp_path):
    run, _ = trained
    facts = train(load_recipe(small(tmp_path, **lpo(run / LATENT_REWARD))))
    assert facts["step"] == 2
    identity = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())["identity"]
    assert len(identity["judge"]) == 64


def refused(capsys, code, *words):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffalign: ")]
    assert code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def test_a_run_does_not_go_on_with_another_judge(trained, small, tmp_path, capsys):
    run, _ = trained
    folder = tmp_path / "judge"
    folder.mkdir()
    for file in (run / LATENT_REWARD).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = small(tmp_path, **lpo(folder))
    assert main(["train", str(path)]) == 0
    state = load_file(folder / "model.safetensors")
    save_file({**state, "tau": state["tau"] + 1}, folder / "model.safetensors")
    refused(capsys, main(["train", str(path), "train.max_train_steps=3"]), "judge was")


@pytest.mark.parametrize("spoil, words", [
    ({"vae": "0" * 64}, ("another VAE", "same_latents")), ({"latent_channels": 16}, ("latent_channels 16", "have 4")),
    ({"text": "0" * 64}, ("other text encoders",))])
def test_a_judge_of_another_base_is_refused_before_anything_is_loaded(trained, small, tmp_path, capsys, spoil, words):
    run, _ = trained
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(run / LATENT_REWARD / "model.safetensors")
    tree = json.loads((run / LATENT_REWARD / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **spoil}))
    refused(capsys, main(["train", str(small(tmp_path, **lpo(folder)))]), str(folder), *words)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_is_not_there(small, tmp_path, capsys):
    refused(capsys, main(["train", str(small(tmp_path, **lpo(tmp_path / "nothing")))]), "nothing", "no such folder")
