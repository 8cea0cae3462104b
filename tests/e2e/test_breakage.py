"""What a tired or hostile user does: faults that once ended in a traceback, in silence, or in a spoilt run. One line each."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.cli import main
from diffalign.errors import CheckpointError
from diffalign.train import checkpoint

from .conftest import MODEL


def refused(capsys, code, *words):
    """Exit code 2 and exactly one line of ours, which holds all the words."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("diffalign: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """One finished run: its recipe. Tests that spoil it work on a copy."""
    file = small(tmp_path_factory.mktemp("done"), train={"max_train_steps": 3, "checkpointing_steps": 1})
    assert main(["train", str(file)]) == 0
    return file


@pytest.fixture
def copy(done, tmp_path):
    """(recipe, output_dir) of a copy of the finished run."""
    shutil.copytree(done.parent / "run", tmp_path / "run")
    tree = yaml.safe_load(done.read_text())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**tree, "output_dir": str(tmp_path / "run")}))
    return file, tmp_path / "run"


# --- options ---

@pytest.mark.parametrize("override", [
    "train.adam_beta1=-1", "train.adam_beta2=1", "train.adam_epsilon=0", "train.adam_weight_decay=-1",
    "train.lr_warmup_steps=-1", "train.logging_steps=-1", "train.validation_steps=-1", "train.dataloader_num_workers=-1",
    "train.learning_rate=1e38",
    "train.train_batch_size=100000000000000000000", "train.gradient_accumulation_steps=10000000000",
    "model.lora.rank=100000000000000000000", "model.lora.alpha=0", "model.lora.target_modules=[]",
    "model.pretrained_model_name_or_path=''", "data.path=''", "data.resolution=100000000000", "evaluate.guidance_scale=-1",
    "evaluate.seeds=100000000000", "evaluate.bootstrap_resamples=100000000000"])
def test_numbers_and_texts_that_mean_nothing(small, tmp_path, capsys, override):
    refused(capsys, main(["train", str(small(tmp_path)), override]), override.partition("=")[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["output_dir", "data.path", "data.cache_dir", "evaluate.prompts"])
def test_zeros_and_half_letters_in_paths(small, tmp_path, capsys, key):
    refused(capsys, main(["train", str(small(tmp_path)), f'{key}="a\\0b"']), key)
    refused(capsys, main(["train", str(small(tmp_path)), f'{key}="\\ud800"']), key)


@pytest.mark.parametrize("key", ["output_dir", "data.path", "data.image_root", "model.pretrained_model_name_or_path",
                                 "model.pretrained_vae_model_name_or_path", "evaluate.prompts"])
def test_paths_that_are_too_long(small, tmp_path, capsys, key):
    refused(capsys, main(["train", str(small(tmp_path)), f"{key}=/{'x' * 300}"]), "xxx")


def test_one_misspelt_lora_target_among_good_ones(small, tmp_path, capsys):
    refused(capsys, main(["train", str(small(tmp_path)), "model.lora.target_modules=[to_q, to_kk]"]), "to_kk")


# --- models ---

@pytest.mark.parametrize(("file", "change", "word"), [
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "nope"}, "nope"),
    ("scheduler/scheduler_config.json", {"_class_name": 3, "prediction_type": ["x"]}, "prediction_type"),
    ("unet/config.json", {"sample_size": "x"}, "sample_size"), ("unet/config.json", {"sample_size": [0]}, "sample_size"),
    ("vae/config.json", {"scaling_factor": None}, "scaling_factor"),
    ("model_index.json", {"text_encoder_2": None}, "text_encoder_2"),
    ("model_index.json", {"tokenizer_2": None}, "tokenizer_2")])
def test_damaged_model_folders(small, tmp_path, capsys, file, change, word):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **change}))
    refused(capsys, main(["train", str(small(tmp_path)), f"model.pretrained_model_name_or_path={folder}"]), word)


# --- runs ---

def test_a_run_shorter_than_its_warm_up(small, tmp_path):
    """The first learning rate of a warm-up is zero: that step moves nothing, and the guard must not call it a fault."""
    assert main(["train", str(small(tmp_path)), "train.max_train_steps=2", "train.lr_warmup_steps=10"]) == 0


def test_a_refused_run_leaves_the_files_of_the_one_before(copy, capsys):
    file, run = copy
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(capsys, main(["train", str(file), "train.learning_rate=0.5"]), "train.learning_rate")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_two_runs_in_one_folder(copy, capsys):
    file, run = copy
    holder = subprocess.Popen([sys.executable, "-c", "import sys, pathlib; from diffalign.train import checkpoint\n"
                               "lock = checkpoint.claim(pathlib.Path(sys.argv[1])); print('held', flush=True); input()",
                               str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        refused(capsys, main(["train", str(file), "train.max_train_steps=4"]), "another run")
    finally:
        holder.kill()
        holder.wait()
    assert main(["train", str(file), "train.max_train_steps=4"]) == 0, "a killed run holds nothing"


def test_the_folder_is_free_again_after_a_run(tmp_path):
    os.close(checkpoint.claim(tmp_path))
    descriptor = checkpoint.claim(tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        checkpoint.claim(tmp_path)
    os.close(descriptor)


def test_garbage_in_the_log(copy):
    file, run = copy
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(b"\xff\xfe{torn\n[]\n3\n{}\n")
    assert main(["train", str(file), "train.max_train_steps=4"]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 4 and steps == sorted(steps)
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(b"\xff\xfe{torn\n")
    assert main(["evaluate", str(file)]) == 0


def test_disk_full_for_the_log(copy, capsys, monkeypatch):
    file, run = copy
    from diffalign.train import hooks

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hooks, "open", full, raising=False)
    refused(capsys, main(["train", str(file), "train.max_train_steps=4"]), "metrics.jsonl", "No space left")
    assert (run / "checkpoint-3").is_dir()


def test_disk_full_for_the_pipeline_folder(small, tmp_path, capsys, monkeypatch):
    from diffusers import DiffusionPipeline

    def full(self, folder, **kwargs):
        Path(folder).mkdir()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", full)
    file = small(tmp_path, model={"lora": None}, train={"learning_rate": 1e-4, "max_train_steps": 2})
    refused(capsys, main(["train", str(file)]), "pipeline", "No space left")
    assert not list((tmp_path / "run").glob(".pipeline*")) and not (tmp_path / "run" / "pipeline").exists()


# --- data ---

def test_a_csv_file(small, tmp_path):
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na red ring,0.png,1.png\na ball,2.png,3.png\n")
    file = small(tmp_path, data={"path": str(tmp_path / "pairs.csv"), "validation": None})
    assert main(["check", str(file)]) == 0
    assert json.loads((tmp_path / "run" / "check.json").read_text())["groups"] == 2


@pytest.mark.parametrize("labels", ["dcg", "soft_margin", {"kind": "offset", "alpha": 1.0}])
def test_scores_that_the_data_lacks(small, tmp_path, capsys, labels):
    file = small(tmp_path, objective={"kind": "dpo", "beta": 500, "labels": labels})
    refused(capsys, main(["train", str(file), "data.layout=pickapic"]), "data.layout")
    refused(capsys, main(["train", str(file)]), "data.layout")  # known from the data only


# --- evaluation ---

def _truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def _narrow(path):
    save_file({name: x[..., :-1].contiguous() for name, x in load_file(path).items()}, path)


def _rename(path):
    save_file({name.replace("unet.", "elsewhere."): x for name, x in load_file(path).items()}, path)


@pytest.mark.parametrize("spoil", [_truncate, _narrow, _rename, lambda path: path.unlink()])
def test_a_lora_file_that_was_spoilt_before_evaluation(copy, capsys, spoil):
    file, run = copy
    spoil(run / "pytorch_lora_weights.safetensors")
    refused(capsys, main(["evaluate", str(file)]), "pytorch_lora_weights.safetensors")
    assert not (run / "grid.png").exists()


@pytest.mark.parametrize("content", ["[]", "{}", "null", "3"])
def test_a_summary_that_is_none(copy, capsys, content):
    file, run = copy
    (run / "train.json").write_text(content)
    refused(capsys, main(["evaluate", str(file)]), "train.json")


def test_evaluation_on_another_base_model(copy, capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(MODEL, other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.013}))
    refused(capsys, main(["evaluate", str(copy[0]), f"model.pretrained_model_name_or_path={other}"]), "other")


def test_evaluating_a_lora_run_as_a_full_fine_tune(copy, capsys):
    refused(capsys, main(["evaluate", str(copy[0]), "model.lora=null"]), "pipeline", "is missing")


def test_pictures_larger_than_any_memory(copy, capsys):
    refused(capsys, main(["evaluate", str(copy[0]), "evaluate.height=100000000000"]), "evaluate.height: is in pixels")


# --- output ---

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("command, redirection", [("check", ">&- 2>&-"), ("train", "2>&1 | true"),
                                                  ("check", ">/dev/full 2>/dev/full")])
def test_nobody_listens(copy, command, redirection):
    """A closed terminal, a reader that left, a full disk behind a redirection: the run goes on to its end."""
    file, run = copy
    words = f"{sys.executable} -m diffalign {command} {file} train.max_train_steps=4 {redirection}; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", words], env=ENVIRONMENT, timeout=120).returncode == 0
    assert (run / "check.html").exists() if command == "check" else json.loads((run / "train.json").read_text())["step"] == 4


def test_what_is_printed_steers_no_terminal(small, tmp_path, monkeypatch, capsys):
    """Prompts and names of files may hold escape sequences; \x9b begins one, too."""
    from diffalign import run
    monkeypatch.setattr(run, "check", lambda spec, printer: printer("a \x1b[2Jprompt \x9b31m\u202e\r\nof \u00e9"))
    assert main(["check", str(small(tmp_path))]) == 0
    assert capsys.readouterr().out == "a \ufffd[2Jprompt \ufffd31m\ufffd\ufffd\nof \u00e9\n"


def test_no_disk_for_temporary_files(small, tmp_path, monkeypatch, capsys):
    """torch asks for the folder when it is imported."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    refused(capsys, main(["check", str(small(tmp_path))]), "temporary files", "gone", "TMPDIR")


def test_other_processes_stay_silent_about_a_shared_error(tmp_path, monkeypatch, capsys):
    """Rank 0 says it; another rank waits for the launcher to end it, and speaks only if it is still there."""
    from diffalign import cli
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    refused(capsys, main(["train", str(tmp_path / "none.yaml")]), "none.yaml")
    assert waits == [cli.GRACE]


# --- what a command does not need, it does not wait for ---

IMPORTED = """
import sys
from diffalign.cli import main
def first(names): return sorted({name.split(".")[0] for name in sys.modules} & set(names))
try: main(["--help"])
except SystemExit: pass
assert not first(["torch", "numpy", "diffusers", "yaml"])
heavy = ["diffusers", "transformers", "accelerate", "peft", "datasets", "pandas", "sklearn", "matplotlib", "httpx"]
for words, code in ((["train", sys.argv[1], "train.stepz=3"], 2), (["check", sys.argv[1]], 0)):
    assert main(words) == code
    assert not first(heavy), (words, first(heavy))
    slow = [f"scipy.{part}" for part in ("stats", "optimize", "ndimage", "sparse", "special", "io", "signal")]
    assert not set(slow) & set(sys.modules), words
"""


def test_help_a_wrong_option_and_check_import_no_heavy_library(small, tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORTED, str(small(tmp_path))], env=ENVIRONMENT, timeout=60, text=True,
                          stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr[-2000:]
