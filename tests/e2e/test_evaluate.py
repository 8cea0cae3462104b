"""``diffalign evaluate`` and ``grid`` of many models: checkpoints, LoRAs, strengths, pipelines; recipes without training."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.config import Evaluation, load_evaluation, load_recipe
from diffalign.errors import ConfigError
from diffalign.evaluate.monitor import MonitorSpec
from diffalign.rewards.rules import Brightness
from diffalign.run.entrants import Entrants
from diffalign.run.evaluate import _as_trained
from diffalign.run.optimised import training_rewards
from diffalign.run.parts import monitored_rewards
from diffalign.run.words import method_name, title

from .. import ranks
from .conftest import MODEL, ROOT

LCM = ROOT / "assets" / "tiny-sdxl-lcm"


def scores(report: dict) -> dict[str, list]:
    return {name: [row["scores"][name] for row in report["comparison"]["prompts"]]
            for name in report["comparison"]["prompts"][0]["scores"]}


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """A run of four steps with checkpoints 2 and 4, and its evaluation with everything in it."""
    folder = tmp_path_factory.mktemp("entrants")
    shutil.copytree(MODEL, folder / "copy")
    models = {"half-way": {"checkpoint": 2}, "last": {"checkpoint": 4}, "lcm": {"lora": str(LCM)},
              "none": {"lora": str(folder / "run"), "lora_scale": 0},
              "copy": {"pretrained_model_name_or_path": str(folder / "copy")}}
    file = small(folder, train={"learning_rate": 1e-2}, data={"validation": None}, evaluate={
        "batch_size": 2, "judge": "brightness", "rewards": {"scenes": "scenes"}, "training_reward": "brightness",
        "strengths": [0, 0.5, 1], "models": models})
    assert main(["train", str(file)]) == 0
    assert main(["evaluate", str(file)]) == 0
    return folder


def test_every_model_is_what_it_says(done):
    report = json.loads((done / "run" / "report.json").read_text())
    found = scores(report)
    assert list(found) == ["base", "aligned", "copy", "half-way", "last", "lcm", "none", "strength 0.5"]
    assert found["base"] == found["copy"] == found["none"]  # another folder, and a LoRA of no strength
    assert found["aligned"] == found["last"] != found["half-way"]  # the last checkpoint is the result
    assert len({str(found[name]) for name in ("base", "aligned", "half-way", "lcm", "strength 0.5")}) == 5
    assert report["models"]["copy"]["ties"] == 6 and report["holm"]["copy"] == 1.0
    assert report["held_out"] is False and "was trained on: not held out" in report["sentence"]
    assert [row["side"] for row in report["strengths"]["strengths"]] == ["base", "strength 0.5", "aligned"]
    assert set(report["rewards"]) == {"brightness", "scenes"}


def test_the_report_pins_what_was_compared(done):
    report = json.loads((done / "run" / "report.json").read_text())
    models = report["identity"]["models"]
    file = done / "run" / "pytorch_lora_weights.safetensors"
    assert models["aligned"]["lora"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert models["strength 0.5"]["lora"] == {**models["aligned"]["lora"], "scale": 0.5}
    assert models["base"]["lora"] is None and models["base"]["denoiser"] == models["copy"]["denoiser"]
    assert models["base"]["precision"] == "float32" and models["base"]["scheduler"]["_class_name"] and models["base"]["vae"]
    assert report["identity"]["prompts"]["count"] == 6 and len(report["identity"]["prompts"]["sha256"]) == 64
    assert report["identity"]["judge"] == {"name": "brightness"}
    assert report["comparison"]["sampling"]["seed"] == 0 and report["evaluate_command"].endswith("evaluation.resolved.yaml")


def test_the_method_is_that_of_the_run_and_not_of_the_recipe_given(done):
    given = load_recipe(done / "recipe.yaml", ["objective={kind: mapo, beta: 0.1}", "evaluate.seeds=3"])
    trained = _as_trained(given)
    assert title(given).startswith("MaPO") and title(trained).startswith("Diffusion-DPO, LoRA")
    assert trained.evaluate == given.evaluate and trained.output_dir == given.output_dir


@pytest.mark.parametrize("name, called", [
    ("lpo", "LPO"), ("spo", "SPO"), ("tailorpo", "TailorPO"), ("online", "Diffusion-DPO on its own samples"),
    ("lrm", "Latent Reward Model"), ("mapo", "MaPO")])
def test_what_a_run_is_called(name, called):
    assert method_name(load_recipe(ROOT / "configs" / "tiny" / f"{name}.yaml")) == called


def test_two_processes_and_its_own_command_make_the_same_report(done, tmp_path):
    """To the last bit: the report's command, on two gloo processes that share the prompts, against one process before."""
    before, grid = json.loads((done / "run" / "report.json").read_text()), (done / "run" / "grid.png").read_bytes()
    program, *words = before["evaluate_command"].split()
    said = ranks.together(main, words, folder=tmp_path)
    after = json.loads((done / "run" / "report.json").read_text())
    assert program == "diffalign" and "".join(said).count("report: ") == 1 and after["created"] != before["created"]
    for name in ("comparison", "models", "rewards", "strengths", "identity", "sentence"):
        assert after[name] == before[name], name
    assert (done / "run" / "grid.png").read_bytes() == grid


def test_grid_draws_models_prompts_and_seeds(done, capsys):
    assert main(["grid", str(done / "recipe.yaml"), "evaluate.seeds=2"]) == 0
    out = capsys.readouterr().out
    run = done / "run"
    for name in ("grid.png", "grid.webp", "grid.html", "strengths.png", "strengths.webp"):
        assert str(run / name) in out and (run / name).exists()
    with Image.open(run / "grid.png") as png, Image.open(run / "grid.webp") as webp:
        assert png.convert("RGB").tobytes() == webp.convert("RGB").tobytes()
        facts = json.loads(png.text["diffalign"])
    assert len(facts["prompts"]) == 4 and len(set(facts["seeds"])) == 4 and len(set(facts["prompts"])) == 2
    page = (run / "grid.html").read_text()
    assert page.count("<article") == 2 * 4 and "http://" not in page and "https://" not in page


def evaluation(folder, **evaluate):
    tree = {"output_dir": str(folder / "out"), "model": {"pretrained_model_name_or_path": str(MODEL)},
            "evaluate": {"prompts": str(folder / "p.txt"), "judge": "scenes", "num_inference_steps": 2, "guidance_scale": 1.0,
                         "bootstrap_resamples": 100, "grid_prompts": 2, "models": {"lcm": {"lora": str(LCM)}}, **evaluate}}
    (folder / "p.txt").write_text("a red ring on a blue background\ntwo green squares on a white background\n")
    (folder / "e.yaml").write_text(yaml.safe_dump(tree))
    return folder / "e.yaml"


def test_a_recipe_without_training(tmp_path, capsys):
    file = evaluation(tmp_path, strengths=[0, 1, 1.2])
    assert isinstance(load_evaluation(file), Evaluation)
    assert main(["evaluate", str(file)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(scores(report)) == ["base", "lcm", "strength 1.2"]
    assert report["win_rate"] == report["models"]["lcm"]["win_rate"]
    assert report["title"] == "lcm beside tiny-sdxl" and not (tmp_path / "out" / "README.md").exists()
    assert 'model "lcm"' in report["sentence"] and report["method"] is None and report["held_out"] is None
    assert "Use it" not in (tmp_path / "out" / "report.html").read_text()
    assert main(["grid", str(file)]) == 0
    for command in ("train", "encode", "check"):
        assert main([command, str(file)]) == 2
    assert "data: is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "words"), [
    ("evaluate.models={}", "diffalign: evaluate.models is empty"),
    ("output_dir=/dev/null/out", "output_dir: cannot write in /dev/null/out"),
    ("evaluate.models.x={lora: nowhere}", "evaluate.models.x.lora: nowhere: no such file"),
    ("evaluate.models.x={checkpoint: 7}", "evaluate.models.x.checkpoint: there is no"),
    ("evaluate.models.x={pretrained_model_name_or_path: /nowhere}", 
     "evaluate.models.x.pretrained_model_name_or_path: /nowhere: no such folder"),
    ("evaluate.models.x={}", "evaluate.models.x.lora: is missing"),
    ("evaluate.models.x={lora_scale: a}", "evaluate.models.x.lora_scale"),
    (f"evaluate.models.lcm={{pretrained_model_name_or_path: {MODEL}}}", "no strength to vary"),
    ("evaluate.rewards.vivid=colorfulness", 'Did you mean "colourfulness"?'),
    ("evaluate.training_reward=nothing", "evaluate.training_reward.kind: no reward called"),
    ("evaluate.strengths=[1, 11]", "evaluate.strengths: must lie in 0..10"),
    ("data={path: x}", "objective: is missing"),
    ("evaluate=null", "evaluate: expected options")])
def test_what_is_wrong_is_one_line(tmp_path, capsys, override, words):
    file = evaluation(tmp_path, strengths=[0.5])
    assert main(["evaluate", str(file), override]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and "Traceback" not in error


def test_a_broken_lora_is_one_line(tmp_path, capsys):
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    assert main(["evaluate", str(evaluation(tmp_path, models={"odd": {"lora": str(tmp_path / "odd.safetensors")}}))]) == 2
    error = capsys.readouterr().err
    assert "odd.safetensors: " in error and error.count("\n") == 1


def test_checkpoints_of_a_full_fine_tune(small, tmp_path):
    """The exported folder, and the loop's own file where weights are too large for both."""
    file = small(tmp_path, model={"lora": None}, train={"learning_rate": 1e-4}, data={"validation": None},
                 evaluate={"models": {"last": {"checkpoint": 4}, "early": {"checkpoint": 2}}, "judge": "brightness"})
    assert main(["train", str(file)]) == 0
    assert main(["evaluate", str(file)]) == 0
    exported = scores(json.loads((tmp_path / "run" / "report.json").read_text()))
    assert exported["aligned"] == exported["last"] != exported["early"] != exported["base"]
    assert (tmp_path / "run" / "checkpoint-4" / "unet").is_dir()
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name / "unet")
    assert main(["evaluate", str(file)]) == 0
    assert scores(json.loads((tmp_path / "run" / "report.json").read_text())) == exported
    weights = tmp_path / "run" / "checkpoint-4" / "weights.safetensors"
    save_file({f"another.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(ConfigError, match="its weights are not for"):
        recipe = load_recipe(file)
        stage = [stage for stage in Entrants.of(recipe).stages(recipe.evaluate, "cpu") if "last" in stage.names][0]
        with stage.open():
            pass


def named_of(rewards):
    return [(reward.name, weight) for reward, weight in rewards]


def test_what_training_optimised_is_found_out(small, tmp_path):
    recipe = load_recipe(small(tmp_path))
    assert training_rewards(recipe) is None
    named = load_recipe(small(tmp_path, evaluate={"training_reward": "brightness"}))
    assert named_of(training_rewards(named)) == [("brightness", 1)]
    online = load_recipe(ROOT / "configs" / "tiny" / "online.yaml")
    assert training_rewards(online) == ((online.source.reward, 1.0),)
    table = tmp_path / "built" / "train.parquet"
    table.parent.mkdir()
    built = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(table)))
    assert training_rewards(built) is None
    rewards = {"a": {"kind": "scenes"}, "b": {"kind": "compressibility", "quality": 80}}
    (table.parent / "build.json").write_text(json.dumps({"recipe": {"rewards": rewards}}))
    assert named_of(training_rewards(built)) == [("scenes", 1), ("compressibility", 1)]
    # what was only written down beside the labels was not trained on, unless a filter asked it
    for utility, filters, expected in (
            ({"kind": "reward", "reward": "b"}, [], [("compressibility", 1)]),
            ({"kind": "votes"}, [], [("scenes", 1), ("compressibility", 1)]),
            ({"kind": "mean", "weights": {"b": 0}}, [{"kind": "margin"}], [("scenes", 1)]),
            ({"kind": "mean", "weights": {"b": -0.5}}, [], [("scenes", 1), ("compressibility", -0.5)]),
            ({"kind": "reward", "reward": "b"}, [{"kind": "margin", "reward": "a"}], [("scenes", 0), ("compressibility", 1)])):
        made = {"rewards": rewards, "utility": utility, "filters": filters}
        (table.parent / "build.json").write_text(json.dumps({"recipe": made}))
        assert named_of(training_rewards(built)) == expected
        watched = dataclasses.replace(built, monitor=MonitorSpec())
        assert named_of(monitored_rewards(watched)) == expected  # the monitor knows as much
        assert named_of(monitored_rewards(dataclasses.replace(watched, monitor=MonitorSpec(reward=Brightness())))) == [
            ("brightness", 1)]
    for content in ("{", "{}", '{"recipe": {"rewards": {"a": {"kind": "gone"}}}}', '{"recipe": 3}'):
        (table.parent / "build.json").write_text(content)
        with pytest.raises(ConfigError, match="build.json: cannot tell which rewards .* evaluate.training_reward"):
            training_rewards(built)
