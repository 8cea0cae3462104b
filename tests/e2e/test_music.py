"""Music through ``diffalign train``: codec tokens and audio latents, exact resume, the cut of a step, what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config import load_recipe
from diffalign.data.audio import write_wav
from diffalign.run import train
from tests.data.test_music import codes
from tests.models import tiny_ace_step, tiny_audio, tiny_audioldm2, tiny_music

ROOT = Path(__file__).parents[2]
SHORT = {"max_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler": "constant",
         "mixed_precision": "no", "checkpointing_steps": 2, "logging_steps": 1, "cpu": True}


def recipe(folder, base, **sections):
    tree = {"output_dir": str(folder / "run"), "model": {"pretrained_model_name_or_path": str(base), "lora": None},
            "data": {"path": str(folder / "pairs.jsonl"), "validation": str(folder / "pairs.jsonl")},
            "likelihood": "codes", "train": SHORT,
            "objective": {"kind": "regularized", "origin": 0.01, "objective": {"kind": "dpo", "beta": 0.1}}}
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(tree.get(name), dict) and "kind" not in section else section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "recipe.yaml")


def rows(folder, count=8):
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": "abcd"[i % 4], "chosen": codes(5, i), "rejected": codes(5, 100 + i)}) + "\n" for i in range(count)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_music.make(tmp_path_factory.mktemp("model") / "music")


def weights(folder):
    return load_file(folder / "run" / "model" / "model.safetensors")


def same(one, other):
    return all(torch.allclose(x, other[name], atol=1e-6) for name, x in one.items())


def test_a_run_of_codes_and_its_resume(model, tmp_path):
    whole, cut, halves = (rows(tmp_path / name) for name in ("whole", "cut", "halves"))
    facts = train(load_recipe(recipe(whole, model)))
    assert facts["initial_loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy = reference, and no distance from the base
    assert facts["heldout"]["before"] == 0.5 and facts["heldout"]["after"] > 0.8 and facts["heldout"]["pairs"] == 8
    assert "clips" in json.loads((whole / "run" / "report.json").read_text())["sentence"]
    train(load_recipe(recipe(cut, model), ["train.max_train_steps=2"]))
    train(load_recipe(recipe(cut, model)))
    assert same(weights(whole), weights(cut))
    train(load_recipe(recipe(halves, model), ["train.train_batch_size=2", "train.gradient_accumulation_steps=2"]))
    assert same(weights(whole), weights(halves))
    base = load_file(model / "model.safetensors")
    moved = {name for name, x in weights(whole).items() if not torch.equal(x, base[name])}
    assert moved and not any(name.startswith(("text_encoder", "audio_encoder")) for name in moved)


def test_stable_audio_with_the_keys_of_pictures(tmp_path):
    tiny_audio.make(tmp_path / "pipeline")
    for i in range(4):
        for name, step in (("good", 0.5), ("bad", 2.0)):
            wave = 0.5 * np.sin(step * np.arange(40) + i)
            (tmp_path / f"{name}{i}.wav").write_bytes(write_wav(wave, tiny_audio.RATE))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": "a b", "chosen": f"good{i}.wav", "rejected": f"bad{i}.wav"}) + "\n" for i in range(4)))
    path = recipe(tmp_path, tmp_path / "pipeline", likelihood={"kind": "denoising"}, objective={"kind": "dpo", "beta": 2000},
                  model={"lora": {"rank": 4}})
    facts = train(load_recipe(path))
    assert facts["initial_loss"] == pytest.approx(math.log(2), abs=1e-4) and facts["heldout"]["before"] == 0.5
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file() and (tmp_path / "run" / "report.html").is_file()


def sound_rows(folder, rate, samples, **columns):
    folder.mkdir()
    for i in range(4):
        for name, step in (("good", 0.5), ("bad", 2.0)):
            (folder / f"{name}{i}.wav").write_bytes(write_wav(0.5 * np.sin(step * np.arange(samples) + i), rate))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": "abcd"[i], "chosen": f"good{i}.wav", "rejected": f"bad{i}.wav", **columns}) + "\n" for i in range(4)))
    return folder


@pytest.mark.parametrize(("tiny", "samples", "columns", "lora", "rate", "file"), [
    (tiny_audioldm2, 2560, {}, None, 3e-4, "pipeline/unet/diffusion_pytorch_model.safetensors"),
    (tiny_ace_step, 48, {"lyrics": "c d", "bpm": 9}, {"rank": 4}, 1e-3, "pytorch_lora_weights.safetensors"),
    pytest.param(tiny_audioldm2, 2560, {}, {"rank": 4}, 1e-3, "adapter_model.safetensors", marks=pytest.mark.slow),
    pytest.param(tiny_ace_step, 48, {}, None, 3e-4, "pipeline/transformer/diffusion_pytorch_model.safetensors",
                 marks=pytest.mark.slow),
], ids=lambda value: getattr(value, "__name__", None))
def test_other_sounds_with_the_keys_of_pictures(tmp_path, tiny, samples, columns, lora, rate, file):
    """Three steps move the loss, a run that was stopped goes on as if it had not been, micro-batches change nothing."""
    tiny.make(tmp_path / "pipeline")
    parts = {"likelihood": {"kind": "denoising"}, "objective": {"kind": "dpo", "beta": 2000}, "model": {"lora": lora},
             "train": {**SHORT, "max_train_steps": 3, "checkpointing_steps": 1, "gradient_checkpointing": True,
                       "learning_rate": rate}}
    weights = {}
    for run, overrides in (("whole", ()), ("cut", ("train.max_train_steps=2",)), ("cut", ()),
                           ("halves", ("train.train_batch_size=2", "train.gradient_accumulation_steps=2"))):
        folder = tmp_path / run
        if not folder.is_dir():
            sound_rows(folder, tiny.RATE, samples, **columns)
        facts = train(load_recipe(recipe(folder, tmp_path / "pipeline", **parts), list(overrides)))
        assert facts["heldout"]["before"] == 0.5  # policy = reference
        if (folder / "run" / file).is_file():
            weights[run] = load_file(folder / "run" / file)
    def losses(run):
        lines = [json.loads(line) for line in (tmp_path / run / "run/metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    assert losses("whole")[0] == pytest.approx(math.log(2), abs=1e-3)  # errors near 6, beta 2000: rounding shows
    assert all(abs(loss - losses("whole")[0]) > 0.01 for loss in losses("whole")[1:])
    assert all(torch.equal(x, weights["cut"][name]) for name, x in weights["whole"].items())
    # not the weights: Adam makes full steps of gradients that are zero but for rounding (a bias before a group norm)
    assert losses("halves") == pytest.approx(losses("whole"), rel=1e-3)


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.caption_dropout=0.1"], "data.caption_dropout: is of pictures, and likelihood.kind=codes trains on codec tokens"),
    (["data.max_tokens=5"], "data.max_tokens: is of text"),
    (["source.kind=online"], "source"),
    (["likelihood.kind=masked"], "model_type is 'musicgen'; supported is 'llada'"),
])
def test_what_is_refused(model, tmp_path, capsys, overrides, message):
    assert main(["train", recipe(rows(tmp_path / "run"), model), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["check", "encode"])
def test_commands_for_pictures_say_that_this_is_music(model, tmp_path, capsys, command):
    assert main([command, recipe(rows(tmp_path / "run"), model)]) == 2
    assert f"likelihood.kind: `diffalign {command}` is not for token music" in capsys.readouterr().err


def test_wrong_codebooks_are_one_line(model, tmp_path, capsys):
    folder = rows(tmp_path / "run")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": codes(5)[:2], "rejected": codes(5)}) + "\n")
    assert main(["train", recipe(folder, model)]) == 2
    error = capsys.readouterr().err
    assert "line 1: the codes have 2 codebooks, and the model has 4" in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_one_stream_through_trl(tmp_path, monkeypatch, capsys):
    """The script as a user runs it, with few clips; a folder that is there is not written over."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import flat_music

    options = ["dpo", "--out", str(tmp_path / "run"), "--samples", "4", "--each", "1"]
    assert flat_music.main(options) == 0
    assert "on 18 prompts, difference" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "stage.json").read_text())["rows"] > 10
    assert json.loads((tmp_path / "run" / "music.json").read_text())["prompts"] == 18
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert flat_music.main(options) == 2
    assert "is there; remove it" in capsys.readouterr().err
