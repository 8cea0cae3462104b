"""The main job from recipe to report, through the command line and through Python."""

import json
import math
import os
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import diffalign
from diffalign.cli import main

from .. import ranks
from .conftest import MODEL

FIELDS = ("base_score", "aligned_score", "win_rate", "win_rate_low", "win_rate_high", "heldout_preference_accuracy", "pairs",
          "steps", "train_seconds", "total_seconds", "versions", "seed")


def lora(folder):
    return load_file(folder / "run" / "pytorch_lora_weights.safetensors")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(a, b) -> float:
    """Norm of the difference over the norm. AdamW's first steps are nearly the gradient's sign, so where a gradient is about 0
    rounding decides; the bound on the gradients themselves, 1e-6, is in tests/train."""
    difference = sum((a[name] - b[name]).square().sum() for name in b)
    return (difference / sum(tensor.square().sum() for tensor in b.values())).sqrt().item()


def metrics(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """One finished run with its evaluation."""
    folder = tmp_path_factory.mktemp("done")
    file = small(folder)
    assert main(["train", str(file)]) == 0
    assert main(["evaluate", str(file)]) == 0
    return folder


def test_it_writes_what_people_use(done):
    run = done / "run"
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_comfy.safetensors", "config.resolved.yaml",
                 "metrics.jsonl", "report.json", "report.html", "grid.png", "README.md", "checkpoint-4"):
        assert (run / name).exists(), name
    report = json.loads((run / "report.json").read_text())
    assert all(name in report for name in FIELDS)
    assert report["pairs"] == 24 - ties_in(done) and report["steps"] == 4
    assert report["win_rate_low"] <= report["win_rate"] <= report["win_rate_high"]
    assert report["heldout_preference_accuracy"]["before"] == 0.5
    page = (run / "report.html").read_text().split("<body")[0]
    assert "http://" not in page and "https://" not in page, "the page asks nobody for anything"


def ties_in(folder) -> int:
    import pyarrow.parquet as pq
    import yaml
    path = yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["path"]
    return sum(label == 0.5 for label in pq.read_table(path)["label_0"].to_pylist())


def test_it_begins_at_ln_2_and_the_health_metrics_are_there(done):
    first = metrics(done)
    losses = [line["loss"] for line in first if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    names = set().union(*first)
    assert {"accuracy", "win_error_change", "lose_error_change", "margin", "saturated", "grad_norm", "update_norm",
            "validation/accuracy"} <= names
    assert any(name.startswith("accuracy_t") for name in names)


def test_stock_diffusers_loads_the_lora_and_draws_what_we_drew(done):
    """The stock pipeline with the file gives the aligned column's picture, and not the base's."""
    from diffusers import StableDiffusionXLPipeline

    from diffalign.sampling import generate
    pipe = StableDiffusionXLPipeline.from_pretrained(MODEL)
    draw = {"prompts": ["a red ring on a blue background"], "seeds": [7], "num_inference_steps": 4, "guidance_scale": 2.0,
            "progress": None}
    base = generate(pipe, **draw)[0].tobytes()
    pipe.load_lora_weights(str(done / "run"))
    aligned = generate(pipe, **draw)[0].tobytes()
    assert aligned != base
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(done / "run"), weight_name="pytorch_lora_weights_comfy.safetensors")
    comfy = generate(pipe, **draw)[0].tobytes()
    assert max(abs(a - b) for a, b in zip(aligned, comfy)) <= 1


def test_the_python_api_does_the_same(done, small, tmp_path):
    recipe = diffalign.load_recipe(small(tmp_path))
    lines = []
    facts = diffalign.run.train(recipe, printer=lines.append)
    assert same(lora(tmp_path), lora(done))
    assert facts["step"] == 4 and any("kappa" in line for line in lines)


def test_heldout_figures_are_the_validations(small, tmp_path, monkeypatch):
    """Nothing is measured twice; where the run was over before, both ends are measured anew and are the same."""
    module, steps = import_module("diffalign.run.train"), []
    real = module._measure
    monkeypatch.setattr(module, "_measure", lambda *args: steps.append(1) or real(*args))
    recipe = diffalign.load_recipe(small(tmp_path, objective={"kind": "mapo"},
                                         train={"max_train_steps": 2, "validation_steps": 1}))
    first = diffalign.run.train(recipe)
    assert len(steps) == 3  # at steps 0, 1 and 2
    again = diffalign.run.train(recipe)
    assert len(steps) == 3 + 2
    assert again["heldout"] == first["heldout"] and first["heldout"]["before"] is not None


def test_accumulation_does_not_matter(done, small, tmp_path):
    file = small(tmp_path, train={"train_batch_size": 1, "gradient_accumulation_steps": 4})
    assert main(["train", str(file)]) == 0
    a, b = ([line["loss"] for line in metrics(folder) if "loss" in line] for folder in (tmp_path, done))
    assert a == pytest.approx(b, abs=1e-4)
    assert apart(lora(tmp_path), lora(done)) < 0.02


def test_kill_and_the_same_command_again(done, small, tmp_path):
    """SIGKILL somewhere in the run; the second command ends with the weights of the run that was never cut."""
    file = small(tmp_path, train={"checkpointing_steps": 1})
    process = ranks.start(main, ["train", str(file)], said=tmp_path / "said.txt")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-[123]")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert main(["train", str(file)]) == 0
    assert same(lora(tmp_path), lora(done))
    assert [line for line in metrics(tmp_path) if "loss" in line] == [line for line in metrics(done) if "loss" in line]


@pytest.mark.parametrize("objective", [{"kind": "mapo"}, {"kind": "mapo_aaai"}, {"kind": "sft"},
                                       {"kind": "dpo", "beta": 500, "link": "ipo"},
                                       {"kind": "dpo", "beta": 500, "link": "hinge"},
                                       {"kind": "dpo", "beta": 500, "link": {"kind": "robust", "flip": 0.1}},
                                       {"kind": "regularized", "sft": 0.1, "objective": {"kind": "dpo", "beta": 500}}],
                         ids=lambda o: "-".join(str(v if isinstance(v, str) else v.get("kind")) for v in o.values()
                                                if isinstance(v, str | dict)))
def test_every_objective_trains(small, tmp_path, objective):
    file = small(tmp_path, objective=objective, train={"max_train_steps": 2}, data={"validation": None})
    assert main(["train", str(file)]) == 0
    assert all(tensor.isfinite().all() for tensor in lora(tmp_path).values())


def test_weightings_draws_and_dropout(small, tmp_path):
    file = small(tmp_path, train={"max_train_steps": 2})
    assert main(["train", str(file), "likelihood={weighting: {kind: min_snr}, draws: 2}", "data.caption_dropout=0.5",
                 "train.ema_decay=0.9", "train.gradient_checkpointing=true", "data.ties=soft"]) == 0
    assert main(["train", str(file), "likelihood.weighting.kind=elbo", "train.mixed_precision=bf16",
                 f"output_dir={tmp_path}/bf16"]) == 0


def test_a_full_fine_tune_is_a_pipeline_folder(small, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    file = small(tmp_path, model={"lora": None}, train={"learning_rate": 1e-4, "max_train_steps": 2})
    assert main(["train", str(file)]) == 0
    assert main(["grid", str(file)]) == 0
    tuned = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    base = StableDiffusionXLPipeline.from_pretrained(MODEL)
    changed = [not torch.equal(a, b) for a, b in zip(tuned.unet.parameters(), base.unet.parameters())]
    assert all(changed)
    assert torch.equal(next(tuned.vae.parameters()), next(base.vae.parameters()))
    assert not (tmp_path / "run" / "unet").exists()
    assert main(["train", str(file)]) == 0, "the finished run can be asked for again"


def test_two_processes_equal_one(done, small, tmp_path):
    """Two gloo processes, two pairs each, against one process with four."""
    file = small(tmp_path, train={"train_batch_size": 2})
    # `accelerate launch --multi_gpu` needs CUDA; on the CPU torch's own launcher sets the same variables
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "diffalign",
               "train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert apart(lora(tmp_path), lora(done)) < 0.02
    a, b = ([line["loss"] for line in metrics(folder) if "loss" in line] for folder in (tmp_path, done))
    assert a == pytest.approx(b, abs=1e-4)


def test_encode_and_check(small, tmp_path, capsys):
    file = small(tmp_path, data={"cache_dir": str(tmp_path / "fresh")})
    assert main(["check", str(file)]) == 0
    assert main(["encode", str(file)]) == 0
    assert main(["encode", str(file)]) == 0
    out = capsys.readouterr().out
    assert "groups a step" in out and "0 encoded now" in out
    assert (tmp_path / "run" / "check.png").exists() and not (tmp_path / "run" / "checkpoint-1").exists()


def test_check_names_a_file_whose_name_is_no_unicode(small, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"prompt": "a", "chosen": "a.png", "rejected": name} for name in ("a.png", "gone\udce9.png")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = small(tmp_path, data={"path": str(tmp_path / "pairs.jsonl"), "validation": None, "bad_rows": "skip"})
    assert main(["check", str(file)]) == 0
    found = json.loads((tmp_path / "run" / "check.json").read_text())
    assert "gone\udce9.png" in found["bad_rows"]["named"][0] and (tmp_path / "run" / "check.html").is_file()


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit(small, tmp_path, capsys):
    """With the real compiler: 4 steps = 2 + resume + 2, and the first loss is ln 2."""
    for name, steps in (("whole", (4,)), ("cut", (2, 4))):
        (tmp_path / name).mkdir()
        file = small(tmp_path / name)
        for count in steps:
            assert main(["train", str(file), "train.compile=on", f"train.max_train_steps={count}"]) == 0
    assert "compile: the repeated blocks are compiled" in capsys.readouterr().out
    assert same(lora(tmp_path / "cut"), lora(tmp_path / "whole"))
    assert next(line["loss"] for line in metrics(tmp_path / "whole") if "loss" in line) == pytest.approx(math.log(2), abs=1e-5)
