"""Masked text through ``diffalign train``: what a run leaves, exact resume, invariance to the cut of a step, refusals."""

import json
import math
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config import load_recipe
from diffalign.run import train
from tests.data.test_text import PAIRS, written
from tests.models.test_masked_lm import make

from .conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import text_accuracy  # noqa: E402
import text_variance  # noqa: E402

SHORT = {"max_train_steps": 4, "train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler": "constant",
         "mixed_precision": "no", "checkpointing_steps": 2, "validation_steps": 2, "logging_steps": 1, "cpu": True}


def recipe(folder, lora=None, **sections):
    model = folder / "model"
    if not model.exists():
        make(model)
        written(folder / "train.jsonl", PAIRS * 4)
        written(folder / "held.jsonl", PAIRS)
    tree = {"output_dir": str(folder / "run"), "model": {"pretrained_model_name_or_path": str(model), "lora": lora},
            "data": {"path": str(folder / "train.jsonl"), "validation": str(folder / "held.jsonl")},
            "likelihood": {"kind": "masked", "draws": 4},
            "objective": {"kind": "regularized", "sft": 0.05, "objective": {"kind": "dpo", "beta": 0.2}}, "train": SHORT}
    for name, section in sections.items():
        tree[name] = {**tree[name], **section} if isinstance(tree.get(name), dict) and "kind" not in section else section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "recipe.yaml")


def trained(folder, *overrides, **sections):
    return train(load_recipe(recipe(folder, **sections), overrides))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return folder, trained(folder)


def test_what_a_run_leaves(whole):
    folder, facts = whole
    run = folder / "run"
    # policy = reference at the start, so DPO's part is ln 2, and the SFT term 0.05 of about ln 9 nats a token
    assert facts["initial_loss"] == pytest.approx(math.log(2) + 0.05 * math.log(9), abs=0.02)
    assert facts["heldout"]["pairs"] == 3 and facts["heldout"]["draws"] == 8 and facts["heldout"]["before"] == 0.5
    assert facts["validation_start"]["accuracy"] == 0.5 and facts["validation_start"]["margin"] == 0
    assert sorted(p.name for p in (run / "model").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json",
                                                                 "tokenizer_config.json"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"margin", "accuracy", "logit", "win_error"} <= lines[1].keys()
    assert (run / "report.html").is_file() and not (run / "grid.png").exists() and not (run / "README.md").exists()
    assert "picture" not in json.loads((run / "report.json").read_text())["sentence"]
    assert "DiffusionPipeline" not in (run / "report.html").read_text()
    # what was trained is a model that can be trained
    again = load_recipe(recipe(folder), [f"model.pretrained_model_name_or_path={run / 'model'}",
                                         f"output_dir={folder / 'next'}", "train.max_train_steps=1"])
    assert train(again)["step"] == 1


def weights(folder, name="model/model.safetensors"):
    return load_file(folder / "run" / name)


def test_resumed_to_the_bit(whole, tmp_path):
    trained(tmp_path, "train.max_train_steps=2")
    facts = trained(tmp_path)
    assert all(torch.equal(x, weights(whole[0])[name]) for name, x in weights(tmp_path).items())
    logs = [(folder / "run" / "metrics.jsonl").read_text() for folder in (whole[0], tmp_path)]
    assert logs[0] == logs[1] and facts["heldout"] == whole[1]["heldout"]


def test_the_cut_of_a_step_changes_nothing(whole, tmp_path):
    trained(tmp_path, train={**SHORT, "train_batch_size": 2, "gradient_accumulation_steps": 2})
    for name, x in weights(tmp_path).items():
        assert torch.allclose(x, weights(whole[0])[name], atol=2e-6), name


def test_lora(tmp_path):
    facts = trained(tmp_path, lora={"rank": 2}, train={**SHORT, "gradient_checkpointing": True})
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "train.json"} <= names and "model" not in names
    assert facts["heldout"]["before"] == 0.5 and len(weights(tmp_path, "adapter_model.safetensors")) == 16


def test_a_moving_reference(tmp_path):
    facts = trained(tmp_path, reference={"kind": "moving", "every": 2})
    assert facts["step"] == 4


def refused(capsys, path, *overrides, command="train"):
    assert main([command, path, *overrides]) == 2
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1 and "Traceback" not in text
    return text


@pytest.mark.parametrize("override, words", [
    ("data.random_flip=true", "data.random_flip: is of pictures"), ("model.fuse_lora=x", "model.fuse_lora: is of pictures"),
    ("evaluate={prompts: x.txt}", "evaluate: draws pictures"), ("monitor={every: 1}", "monitor: draws pictures"),
    ("source={kind: semi_policy}", "source.kind"), ("likelihood.masks_per_time=3", "likelihood.masks_per_time: must divide"),
    ("likelihood.kind=denoising", "likelihood.draws=4"), ("data.max_tokens=3", "longer than the 3"),
    ("data.chat_template=true", "no chat template"),
    ("model.pretrained_model_name_or_path=assets/tiny-sdxl", "diffusers pipeline"),
    ("reference={kind: moving, every: 2, gate: 0.1}", "reference.gate")])
def test_refusals(tmp_path, capsys, override, words):
    path = recipe(tmp_path)
    if words == "likelihood.draws=4":  # pictures asked of a language model
        assert "likelihood.kind=masked" in refused(capsys, path, override)
    else:
        assert words in refused(capsys, path, override)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("command", ["check", "encode", "evaluate", "grid"])
def test_commands_for_pictures(tmp_path, capsys, command):
    assert refused(capsys, recipe(tmp_path), command=command)


def test_text_options_are_refused_for_pictures():
    with pytest.raises(Exception, match="data.max_tokens: is of text"):
        load_recipe("configs/quickstart.yaml", ["data.max_tokens=3"])


@pytest.mark.slow
def test_the_scripts_for_text(whole, tmp_path, capsys):
    """Exact accuracy of answers, and the study of variance, small."""
    folder = whole[0]
    path = recipe(folder)
    written(folder / "asked.jsonl", [{"prompt": "a b", "answer": "c"}, {"prompt": "a", "answer": "f f f"}])
    assert text_accuracy.main([path, "--prompts", str(folder / "asked.jsonl"), "--length", "4"]) == 0
    rows = [json.loads(line) for line in (folder / "run" / "answers.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["c", "f f f"] and capsys.readouterr().out.count("right [") == 4
    docs = tmp_path / "docs.md"
    docs.write_text("before\n<!-- gradient variance -->\n<!-- end -->\nafter\n")
    command = [path, "--out", str(tmp_path), "--pairs", "1", "--repeats", "4", "--gradient-pairs", "2",
               "--gradient-repeats", "4", "--docs", str(docs), "--figure", str(tmp_path / "figure.png")]
    assert text_variance.main(command) == 0 and (tmp_path / "figure.png").stat().st_size > 10_000
    text = docs.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and text.count("| n = ") == 23 * 2 + 9
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert {len(measured[kind]) for kind in ("chains", "model")} == {23}
    assert text_variance.main(command) == 0 and "kept" in capsys.readouterr().out
    asked = ["--prompts", str(folder / "asked.jsonl")]
    for script, wrong in ((text_accuracy, [path, "--prompts", "nowhere"]), (text_variance, [*command, "--repeats", "1"]),
                          (text_accuracy, [path, f"output_dir={tmp_path / 'none'}", *asked])):
        assert script.main(wrong) == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
