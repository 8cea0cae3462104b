"""Pictures while a run trains: what is written, that training doesn't notice, exact resume, and the two ways to end early."""

import json
import math
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffalign.cli import main
from diffalign.rewards import REWARDS

from .. import ranks
from .test_main_job import lora, metrics, same

MONITOR = {"every": 2, "max_prompts": 6, "seeds": 2, "sampler": {"steps": 2}, "grid_prompts": 3}
GARBAGE = {"learning_rate": 0.3, "lr_scheduler": "constant"}  # ruins the pictures within two steps
STILL = {"learning_rate": 1e-6, "lr_scheduler": "constant"}  # moves nothing that anybody could see


@dataclass(frozen=True, kw_only=True)
class Silent:
    name = "silent"
    differentiable = False

    def __call__(self, images, prompts, **columns):
        return torch.full((len(prompts),), math.nan)


@dataclass(frozen=True, kw_only=True)
class Told(Silent):
    name = "told"
    columns = ("user",)


def recipe(small, folder, monitor=None, **sections):
    """``small`` with a monitor."""
    file = small(folder, **{"data": {"validation": None}, **sections})
    tree = yaml.safe_load(file.read_text())
    if monitor is not None:
        tree["monitor"] = {**MONITOR, **monitor}
    file.write_text(yaml.safe_dump(tree))
    return file


def facts(folder):
    return json.loads((folder / "run" / "train.json").read_text())


def seen(folder):
    return [line for line in metrics(folder) if "monitor/alarm" in line]


def test_it_shows_the_pictures_and_training_does_not_notice(small, tmp_path):
    with_it, without = tmp_path / "with", tmp_path / "without"
    for folder, monitor in ((with_it, {}), (without, None)):
        folder.mkdir()
        assert main(["train", str(recipe(small, folder, monitor))]) == 0
    assert same(lora(with_it), lora(without))
    assert [line for line in metrics(with_it) if "monitor/alarm" not in line] == metrics(without)

    lines = seen(with_it)
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["monitor/win_rate"] == 0.5 and lines[0]["monitor/shift"] == 0 and lines[0]["monitor/diversity"] == 1
    for line in lines:
        assert line["monitor/win_rate_low"] <= line["monitor/win_rate"] <= line["monitor/win_rate_high"]
    for step in (2, 4):
        found = json.loads((with_it / "run" / "monitor" / f"step-{step}.json").read_text())
        assert len(found["alarm"]["statistics"]) == 9 and found["alarm"]["fired"] is False and len(found["prompts"]) == 6
        with Image.open(with_it / "run" / "monitor" / f"step-{step}.png") as image:
            assert len(json.loads(image.text["diffalign"])["prompts"]) == 3
    assert facts(with_it)["stopped"] is None


@pytest.mark.parametrize("model", [{}, {"lora": None}], ids=["lora", "full"])
def test_resume_is_exact_and_takes_the_base_from_its_file(small, tmp_path, model, capsys):
    file = recipe(small, tmp_path, {"early_stop": {"patience": 9}}, model=model, objective={"kind": "mapo"})
    assert main(["train", str(file)]) == 0
    run, log = tmp_path / "run", metrics(tmp_path)
    grid, base = (run / "monitor" / "step-4.png").read_bytes(), (run / "monitor" / "base.npz").stat().st_mtime_ns
    shutil.rmtree(run / "checkpoint-4")
    assert main(["train", str(file)]) == 0
    assert metrics(tmp_path) == log and (run / "monitor" / "step-4.png").read_bytes() == grid
    assert (run / "monitor" / "base.npz").stat().st_mtime_ns == base
    # without the file: the base lies under a LoRA, but is gone after two steps of a full fine-tune without a reference
    shutil.rmtree(run / "checkpoint-4")
    (run / "monitor" / "base.npz").write_text("torn")
    capsys.readouterr()
    if not model:
        assert main(["train", str(file)]) == 0 and metrics(tmp_path) == log
    else:
        assert main(["train", str(file)]) == 2
        assert "base.npz is missing or of other options, and step 4 is too late" in capsys.readouterr().err


def test_an_alarm_ends_the_run_and_it_stays_ended(small, tmp_path, capsys):
    file = recipe(small, tmp_path, {"on_alarm": "stop"}, train=GARBAGE)
    assert main(["train", str(file)]) == 0
    run = tmp_path / "run"
    assert facts(tmp_path)["step"] == 2 and facts(tmp_path)["stopped"].startswith("Reward hacking: ")
    assert (run / "checkpoint-2").is_dir() and (run / "pytorch_lora_weights.safetensors").is_file()
    assert seen(tmp_path)[-1]["monitor/alarm"] == 1
    assert "the run ends at step 2 of 4: Reward hacking" in capsys.readouterr().err
    weights = lora(tmp_path)
    assert main(["train", str(file)]) == 0
    assert facts(tmp_path)["step"] == 2 and same(lora(tmp_path), weights), "asked again, it doesn't train on"
    assert main(["train", str(file), "monitor.on_alarm=warn", "train.allow_change=[monitor.on_alarm]"]) == 0
    assert facts(tmp_path)["step"] == 4 and facts(tmp_path)["stopped"] is None, "unless it is told to"


def test_a_warning_goes_on(small, tmp_path, capsys):
    assert main(["train", str(recipe(small, tmp_path, {}, train=GARBAGE))]) == 0
    assert facts(tmp_path)["step"] == 4 and "Reward hacking: " in capsys.readouterr().err


def test_patience_ends_a_run_whose_judge_does_not_rise(small, tmp_path):
    """Checks at 0, 1, 2, 3 with one figure: none of them exceeds the base's, so the second after it is the last."""
    file = recipe(small, tmp_path, {"every": 1, "early_stop": {"patience": 2}}, train=STILL)
    assert main(["train", str(file)]) == 0
    assert facts(tmp_path)["step"] == 2 and "of step 0, in the last 2 checks" in facts(tmp_path)["stopped"]


def test_patience_is_counted_over_a_resume(small, tmp_path):
    file = recipe(small, tmp_path, {"every": 1, "early_stop": {"patience": 3}}, train={**STILL, "checkpointing_steps": 1})
    assert main(["train", str(file)]) == 0 and facts(tmp_path)["step"] == 3
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    assert main(["train", str(file)]) == 0
    assert facts(tmp_path)["step"] == 3 and "in the last 3 checks" in facts(tmp_path)["stopped"]


def test_two_processes_see_what_one_sees(small, tmp_path):
    """Each draws half of the prompts; with weights that stand still the figures are equal."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert main(["train", str(recipe(small, one, {}, train={**STILL, "max_train_steps": 2}))]) == 0
    file = recipe(small, two, {}, train={**STILL, "max_train_steps": 2, "train_batch_size": 2})
    ranks.together(main, ["train", str(file)], folder=two)
    assert len(seen(two)) == len(seen(one)) == 2
    for a, b in zip(seen(one), seen(two), strict=True):
        assert a == pytest.approx(b, abs=0.01)
    grids = [np.asarray(Image.open(folder / "run" / "monitor" / "step-2.png"), np.int16) for folder in (one, two)]
    assert grids[0].shape == grids[1].shape and abs(grids[0] - grids[1]).mean() < 1


@pytest.mark.parametrize("monitor, evaluate, message", [
    ({}, None, "monitor.prompts: is missing, and there is no evaluate.prompts to take"),
    ({"prompts": "nowhere.txt"}, {}, "diffalign: monitor.prompts: cannot read nowhere.txt"),
    ({"judge": "told"}, {}, 'monitor.judge: reads a column "user" beside picture and prompt'),
    ({"judge": "silent"}, {}, 'monitor.judge: reward "silent" could score none of 12 pictures of the base'),
    ({"reward": "silent"}, {}, 'monitor.reward: reward "silent" could score none of 12'),
    ({}, {"judge": "told"}, 'evaluate.judge: reads a column "user" beside picture and prompt'),
    ({"early_stop": {}}, {"judge": None}, "monitor.early_stop: watches the held-out judge, and there is none"),
    ({"early_stop": {"patience": 0}}, {}, "monitor.early_stop.patience: must be at least 1"),
    ({"every": 0}, {}, "monitor.every: must be at least 1"),
    ({"judge": "nobody"}, {}, "monitor.judge.kind: no reward called 'nobody'"),
    ({"limits": {"shift": 0.1}}, {}, "monitor.limits.doubted_shift: must not exceed shift 0.1, got 0.5"),
    ({"on_alarm": "shout"}, {}, "monitor.on_alarm: "),
    ({"evry": 3}, {}, 'Did you mean "every"?'),
])
def test_bad_options_are_one_line(small, tmp_path, capsys, monkeypatch, monitor, evaluate, message):
    for kind in (Silent, Told):
        monkeypatch.setitem(REWARDS, kind.name, kind)
    file = recipe(small, tmp_path, monitor, evaluate=evaluate)
    assert main(["train", str(file)]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "run" / "checkpoint-2").exists()
