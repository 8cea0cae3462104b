"""``diffalign evaluate`` on token music: a trained model beside its base, full and LoRA, players, the same report twice, and
everything that is refused."""

import base64
import io
import json
import re

import numpy as np
import pytest
from scipy.io import wavfile

from diffalign.cli import main
from diffalign.config import load_recipe, rewards_from
from diffalign.data.audio import write_wav
from diffalign.rewards import REWARDS
from diffalign.run import evaluate, grid, train
from tests.e2e.test_music import recipe, rows
from tests.models import tiny_audio, tiny_music

EVALUATE = {"judge": "signal", "seconds": 0.32, "seeds": 2, "batch_size": 4, "grid_prompts": 2, "bootstrap_resamples": 200}


LOUDNESS = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True, kw_only=True)
class Loudness:
    name = "loudness"
    subject = "clips"
    differentiable = False

    def __call__(self, clips, prompts):
        return torch.tensor([float((clip.wave ** 2).mean()) for clip in clips])
"""


@pytest.fixture(scope="module")
def loudness(tmp_path_factory):
    """A user's own reward of clips, known by its name."""
    path = tmp_path_factory.mktemp("own") / "loudness.py"
    path.write_text(LOUDNESS)
    assert rewards_from(path) == ["loudness"]
    yield
    REWARDS.pop("loudness")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_music.make(tmp_path_factory.mktemp("model") / "music")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    folder = rows(tmp_path_factory.mktemp("full"))
    (folder / "captions.txt").write_text("a\nb c\nd\na b\nc\nd d\n")
    path = recipe(folder, model, evaluate={**EVALUATE, "prompts": str(folder / "captions.txt")})
    train(load_recipe(path))
    return folder, path


def stable(report):
    return {name: value for name, value in report.items() if name not in ("created", "total_seconds")}


def waves(html):
    found = re.findall(r'<audio[^>]* src="data:audio/wav;base64,([^"]*)"', html)
    return [wavfile.read(io.BytesIO(base64.b64decode(data.replace("&#43;", "+")))) for data in found]


def test_a_report_to_listen_to_and_the_same_again(trained):
    folder, path = trained
    lines = []
    report = evaluate(load_recipe(path), lines.append)
    run = folder / "run"
    assert json.loads((run / "report.json").read_text())["comparison"]["prompts"][1]["prompt"] == "b c"
    assert report["judge"] == "signal" and report["comparison"]["statistics"]["pairs"] == 12
    assert report["comparison"]["sampling"] == {"seconds": 0.32, "temperature": 1.0, "seeds": 2, "seed": 0, "batch_size": 4}
    assert report["comparison"]["statistics"]["difference"] != 0, "training moved the clips"
    heard = waves((run / "report.html").read_text())
    assert len(heard) >= 4 and all(rate == 400 and wave.shape == (128,) and wave.dtype == np.int16 for rate, wave in heard)
    assert (run / "grid.png").is_file() and "aligned model" in lines[0] and lines[-1].endswith("report.html")
    assert stable(evaluate(load_recipe(path))) == stable(report)
    whole = evaluate(load_recipe(path, ["evaluate.batch_size=100"]))
    assert whole["comparison"]["prompts"] == report["comparison"]["prompts"], "blocks of another size"


def test_further_models_and_the_grid_alone(trained, model):
    folder, path = trained
    more = ["evaluate.models={half: {checkpoint: 2}, other: {pretrained_model_name_or_path: " + str(model) + "}}"]
    report = evaluate(load_recipe(path, more))
    assert set(report["models"]) == {"aligned", "half", "other"}
    assert report["models"]["other"]["ties"] == 12, "the base itself"
    assert report["models"]["half"]["difference"] not in (0, report["models"]["aligned"]["difference"])
    written = grid(load_recipe(path))
    assert set(written) == {"grid.png", "grid.webp", "grid.html"}
    assert len(waves((folder / "run" / "grid.html").read_text())) == 2 * 2 * 2  # rows, seeds, models


def test_a_lora_is_merged_from_its_files(model, tmp_path):
    folder = rows(tmp_path / "lora")
    (folder / "captions.txt").write_text("a\nb\n")
    path = recipe(folder, model, model={"lora": {"rank": 2}}, evaluate={**EVALUATE, "prompts": str(folder / "captions.txt")})
    train(load_recipe(path))
    report = evaluate(load_recipe(path, ["evaluate.models={same: {lora: " + str(folder / "run") + "}}"]))
    scores = [one["scores"] for one in report["comparison"]["prompts"]]
    assert any(one["aligned"] != one["base"] for one in scores) and all(one["same"] == one["aligned"] for one in scores)


@pytest.mark.parametrize(("overrides", "message"), [
    (["evaluate.judge=scenes"], 'evaluate.judge: reward "scenes" scores pictures, and this model makes clips'),
    (["evaluate.rewards={a: colourfulness}"], 'evaluate.rewards.a: reward "colourfulness" scores pictures'),
    (["evaluate.judge=clips"], 'evaluate.judge: reward "clips" could score none of 12 pairs of clips'),
    (["evaluate.judge={kind: clap, pretrained_model_name_or_path: /nowhere}"], "/nowhere"),
    (["evaluate.judge=signals"], "Did you mean \"signal\"?"),
    (["evaluate.seconds=9"], "evaluate.seconds: 9 s are 450 frames of"),
    (["evaluate.seconds=0"], "evaluate.seconds: must be above 0"),
    (["evaluate.guidance_scale=3"], "evaluate.guidance_scale: is of pipelines, and likelihood.kind=codes draws code by code"),
    (["evaluate.strengths=[0, 1]"], "evaluate.strengths: is of pipelines"),
    (["evaluate.models={a: {checkpoint: 3}}"], "evaluate.models.a.checkpoint: there is no"),
    (["evaluate.models={a: {lora: /nowhere}}"], "evaluate.models.a.lora: no adapter_model.safetensors in /nowhere"),
    (["evaluate.models={a: {checkpoint: 2, lora_scale: 0.5}}"], "evaluate.models.a.lora_scale: a LoRA of token music"),
    (["evaluate.prompts=nowhere.txt"], "evaluate.prompts: cannot read nowhere.txt"),
    (["model.lora={rank: 2}"], "adapter_model.safetensors: is missing; run `diffalign train` first, with a model.lora"),
    (["output_dir=elsewhere"], "no finished training run here"),
])
def test_what_is_refused(trained, capsys, overrides, message):
    assert main(["evaluate", trained[1], *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_a_prompt_that_is_too_long_is_one_line(trained, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("a b c d a b c d\n")
    assert main(["evaluate", trained[1], f"evaluate.prompts={tmp_path / 'long.txt'}"]) == 2
    error = capsys.readouterr().err
    assert "long.txt: the prompt has 9 tokens" in error and len(error.strip().splitlines()) == 1


def test_a_judge_of_clips_is_refused_for_pictures(capsys):
    assert main(["evaluate", "configs/quickstart.yaml", "evaluate.judge=signal"]) == 2
    assert 'reward "signal" scores clips, and this model makes pictures' in capsys.readouterr().err
    assert main(["evaluate", "configs/quickstart.yaml", "evaluate.seconds=3"]) == 2
    assert "evaluate.seconds: is of clips, and this model makes pictures" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sounds(tmp_path_factory, loudness):
    """A Stable Audio of random weights with a LoRA of two steps."""
    pytest.importorskip("torchsde")  # the solver of Stable Audio
    folder = tmp_path_factory.mktemp("sounds")
    tiny_audio.make(folder / "pipeline")
    for i in range(4):
        for name, step in (("good", 0.5), ("bad", 2.0)):
            (folder / f"{name}{i}.wav").write_bytes(write_wav(0.5 * np.sin(step * np.arange(40) + i), tiny_audio.RATE))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": "a b", "chosen": f"good{i}.wav", "rejected": f"bad{i}.wav"}) + "\n" for i in range(4)))
    (folder / "captions.txt").write_text("a b\nc\nd\na\nb c\nd b\n")
    options = {**EVALUATE, "judge": "loudness", "rewards": {"signal": "signal"}, "seconds": 0.5, "seeds": 1,
               "num_inference_steps": 2, "guidance_scale": 1.0, "prompts": str(folder / "captions.txt")}
    path = recipe(folder, folder / "pipeline", likelihood={"kind": "denoising"}, objective={"kind": "dpo", "beta": 2000},
                  model={"lora": {"rank": 4}}, evaluate=options)
    train(load_recipe(path, ["train.max_train_steps=2", "data.validation=null"]))
    return folder, path


def test_audio_latents_through_the_same_command(sounds):
    folder, path = sounds
    report = evaluate(load_recipe(path, ["evaluate.strengths=[0, 0.5, 1]"]))
    scores = [one["scores"] for one in report["comparison"]["prompts"]]
    assert report["comparison"]["sampling"]["seconds"] == 0.5 and len(scores) == 6 and report["judge"] == "loudness"
    assert all(len({one[name][0] for name in ("base", "strength 0.5", "aligned")}) == 3 for one in scores)
    heard = waves((folder / "run" / "report.html").read_text())
    assert len(heard) >= 4 and all(rate == tiny_audio.RATE and wave.shape == (32,) for rate, wave in heard)
    assert stable(evaluate(load_recipe(path, ["evaluate.strengths=[0, 0.5, 1]"]))) == stable(report)


def test_a_whole_pipeline_of_sounds(sounds):
    path = sounds[1]
    whole = ["model.lora=null", f"output_dir={sounds[0] / 'whole'}", "train.max_train_steps=2", "data.validation=null"]
    train(load_recipe(path, whole))
    card, page = ((sounds[0] / "whole" / name).read_text() for name in ("README.md", "report.html"))
    assert "pipeline_tag: text-to-audio" in card and 'clip = pipe("a prompt").audios[0]' in card and "image" not in card
    assert "No judge has compared clips" in card and "No judge has compared clips" in page
    report = evaluate(load_recipe(path, whole))
    assert report["comparison"]["statistics"]["difference"] != 0 and report["strengths"] is None


@pytest.mark.parametrize(("overrides", "message"), [
    (["evaluate.judge=scenes"], 'evaluate.judge: reward "scenes" scores pictures, and this model makes clips'),
    (["evaluate.seconds=3"], "evaluate.seconds: this model makes clips of up to 0.75 s, got 3"),
    (["evaluate.height=64"], "evaluate.height: is of pictures, and this model makes sounds"),
    (["evaluate.negative_prompt=noise"], "evaluate.negative_prompt: is of pictures"),
    (["monitor={}"], "monitor: draws pictures, and this model makes sounds"),
])
def test_what_is_refused_for_audio_latents(sounds, capsys, overrides, message):
    command = "train" if "monitor" in overrides[0] else "evaluate"
    assert main([command, sounds[1], *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
