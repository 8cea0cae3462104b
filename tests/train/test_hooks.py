"""Log lines, the bar, the saturation warning, trackers, validation."""

import io
import json
import math
import sys

import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.train.guard import Start
from diffalign.train.hooks import Progress, Recent, Saturation, truncate_log
from diffalign.train.state import RunState, Window, means
from diffalign.train.tally import Tally
from diffalign.types import Loss
from diffalign.world import Single

from . import toy


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_window_weighs_every_pair_alike():
    """(1 + 1 + 1 over 3 pairs) and (5 over 1 pair): 8/4 = 2, not (1 + 5)/2 = 3."""
    window = Window()
    window.add({"loss": (3.0, 3.0)})
    window.add({"loss": (5.0, 1.0), "rare": (0.0, 0.0)})
    assert window.means() == {"loss": 2.0}
    assert Window(json.loads(json.dumps(window.values))).means() == {"loss": 2.0}
    assert means({"a": (float("inf"), 1.0), "b": (1.0, 2.0)}) == {"b": 0.5}


def test_a_tally_skips_nan_and_counts_lengths():
    tally = Tally("cpu")
    nan = float("nan")
    for per_group, metric in (([1.0, 2.0], [1.0, nan, 3.0]), ([4.0], [])):
        loss = Loss(per_group=torch.tensor(per_group), metrics={"m": torch.tensor(metric), "empty": torch.tensor([nan])},
                    observed={"seen": (torch.tensor(2.0), torch.tensor(1))})
        tally.add(loss, torch.tensor(len(per_group)))
    totals = tally.reduce(Single(), torch.tensor(0.5), stop=False)
    assert totals.report == {"loss": (7.0, 3.0), "m": (4.0, 2.0), "empty": (0.0, 0.0)}
    assert totals.observed == {"seen": (4.0, 2.0)} and totals.grad_norm == 0.5 and not totals.stop
    assert tally.reduce(Single(), torch.tensor(0.5), stop=True).stop


def test_changing_names_are_a_method_fault():
    tally = Tally("cpu")
    tally.add(Loss(per_group=torch.ones(1), metrics={"a": torch.ones(1)}), torch.tensor(1))
    with pytest.raises(ValueError, match="same metrics for every micro-batch"):
        tally.add(Loss(per_group=torch.ones(1), metrics={"b": torch.ones(1)}), torch.tensor(1))


def test_log_lines_hold_means_and_health(tmp_path):
    bank, summary = toy.train(tmp_path, max_train_steps=10, logging_steps=4)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [4, 8, 10] and [line.get("partial") for line in found] == [None, None, True]
    for name in ("loss", "accuracy", "margin", "logit", "saturated", "win_error_change", "lose_error_change", "grad_norm",
                 "clipped", "learning_rate", "update_norm", "samples"):
        assert name in found[0], name
    start = toy.Bank().trainable()
    size = math.sqrt(sum((p - start[name]).double().square().sum().item() for name, p in bank.trainable().items()))
    assert found[-1]["update_norm"] == pytest.approx(size, rel=1e-6)
    timing = lines(tmp_path, "timing.jsonl")
    assert timing and timing[-1]["pairs_per_second"] > 0
    assert summary.metrics["loss"] > 0 and summary.samples == 40 and summary.parameters == 1300


def test_update_size_of_a_large_tensor_is_estimated():
    """200,000 elements, each moved by 0.01: norm 0.01 * sqrt(200000) = 4.4721."""
    p = {"w": torch.nn.Parameter(torch.zeros(200_000))}
    start = Start(p)
    assert start.values["w"].numel() <= 65_536
    p["w"].data += 0.01
    assert start.distance(p) == pytest.approx(4.4721, rel=1e-4)


def test_truncating_drops_later_partial_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 5, "partial": true}\n{"step": 8}\n{"step": 12')
    truncate_log(path, 5)
    assert path.read_text() == '{"step": 4}\n'
    truncate_log(tmp_path / "none.jsonl", 5)


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    progress = Progress(10, 5, stream=stream)
    for step in range(1, 11):
        progress.after_step(RunState(step=step, samples=4 * step), {"loss": (4 * 0.5, 4.0), "accuracy": (3.0, 4.0),
                                                                    "logit": (8.0, 4.0)})
    progress.close()
    said = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in said] == ["step 5/10", "step 10/10"]
    assert "loss 0.5  acc 0.75  logit 2" in said[1] and "pairs/s" in said[1]


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(3, 5, stream=stream)
    for step in range(1, 4):
        progress.after_step(RunState(step=step, samples=step), {"loss": (0.25, 1.0)})
    progress.say("a line")
    progress.close()
    assert "loss 0.25" in stream.getvalue() and "3/3" in stream.getvalue() and "a line" in stream.getvalue()


def test_recent_forgets():
    recent = Recent(steps=2)
    for value in (9.0, 1.0, 3.0):
        recent.add({"loss": (value, 1.0)})
    assert recent.means() == {"loss": 2.0}


def test_saturation_is_announced_once():
    """D4: 4 of 5 steps with all pairs saturated is 80 %, above 60 %; a window of 5 must be full first."""
    said = []
    watch = Saturation(said.append, steps=5)
    for step, share in enumerate([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1):
        watch.after_step(RunState(step=step), {"saturated": (4 * share, 4.0)})
        assert len(said) == (step >= 5)
    assert "step 5: 80% of the pairs" in said[0] and "objective.beta" in said[0]
    quiet = Saturation(said.append, steps=2)
    for step in range(5):
        quiet.after_step(RunState(step=step), {"saturated": (2.4, 4.0)})  # exactly 60 % is not above it
        quiet.after_step(RunState(step=step), {})
    assert len(said) == 1


def test_a_run_with_huge_beta_warns(tmp_path, capsys):
    toy.train(tmp_path, method=toy.method(beta=1e6), max_train_steps=60, progress=True, checkpointing_steps=100)
    assert capsys.readouterr().err.count("Lower objective.beta") == 1


def test_validation_runs_at_both_ends_and_between(tmp_path):
    steps = []

    def validate(bank, step):
        assert not torch.is_grad_enabled() and not bank.denoiser.module.training
        steps.append(step)
        return {"accuracy": step / 10}

    bank, summary = toy.train(tmp_path, validation=validate, validation_steps=4, max_train_steps=10)
    assert steps == [0, 4, 8, 10]
    assert summary.validation_start == {"accuracy": 0.0} and summary.validation_end == {"accuracy": 1.0}
    assert [(line["step"], line["validation/accuracy"]) for line in lines(tmp_path) if "validation/accuracy" in line] == [
        (0, 0.0), (4, 0.4), (8, 0.8), (10, 1.0)]


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    toy.train(tmp_path, report_to=("tensorboard",))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_missing_tracker_names_the_extra(tmp_path):
    with pytest.raises(ConfigError, match="train.report_to: wandb is not installed; run `pip install wandb`"):
        toy.train(tmp_path, report_to=("wandb",))
    with pytest.raises(ConfigError, match="train.report_to: unknown tracker 'tensorbord'"):
        toy.train(tmp_path, report_to=("tensorbord",))


def test_importing_does_not_touch_a_device():
    import subprocess
    code = ("import diffalign.train, torch, sys; assert not torch.cuda.is_initialized(); "
            "assert 'diffusers' not in sys.modules and 'accelerate' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
