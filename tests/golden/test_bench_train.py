"""Figures of scripts/bench_train.py by hand, its full-size parts without weights, and once a whole run."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from diffalign import _compat  # noqa: F401  (before diffusers)

from ..e2e.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import bench_train  # noqa: E402
from bench import work, worker  # noqa: E402


def test_ratios_are_taken_inside_a_round():
    """A round in which the machine is three times slower changes no ratio. Seconds a pair: usual 6, live 4, measured 2,
    encoding 3 counted once over 3 epochs = 1: ratios 6/5 and 6/3. In a sweep of two the measured reference, 3 s, is shared
    too: 6 / (2 + (1 + 3)/2)."""
    one = {"usual": 6.0, "live": 4.0, "measured": 2.0, "encode": 3.0, "reference": 3.0}
    rounds = [{**one, "matrix_flop_per_s": 100.0}] * 2
    rounds.insert(1, {**{name: 3 * s for name, s in one.items()}, "matrix_flop_per_s": 100 / 3})
    stages = {path: {"seconds": 10.0, "stages": {"policy": 4.0, "data": 1.0}} for path in ("usual", "live", "measured")}
    found = bench_train.summary(SimpleNamespace(epochs=3, precision="no"), rounds, stages, dict.fromkeys(stages, 1), 60, 40)
    ratios = {path: one["ratio"] for path, one in found["paths"].items()}
    assert ratios["live"] == pytest.approx({"median": 1.2, "low": 1.2, "high": 1.2})
    assert found["ratio"] == pytest.approx(2.0) and found["best"] == "measured"
    assert found["usual_pairs_per_s"] == pytest.approx(1 / 6) and found["diffalign_pairs_per_s"] == pytest.approx(1 / 3)
    assert found["sweeps"]["2"]["measured"] == pytest.approx(6 / 4) and found["sweeps"]["1"]["live"] == pytest.approx(6 / 5)
    # 100 operations in 4 s of a machine of 100 a second; the measured reference needs 60 in 2 s
    assert found["paths"]["live"]["mfu"] == pytest.approx(0.25) and found["paths"]["measured"]["mfu"] == pytest.approx(0.3)
    assert found["paths"]["usual"]["stages"]["rest"] == pytest.approx(0.5)
    assert bench_train.table(found).count("\n") == 12


def test_full_size_parts_without_weights(tmp_path):
    """SDXL base: UNet 2,567.5 M, VAE 83.7 M, CLIP-L 123.1 M and bigG 694.7 M."""
    parts = work.sdxl(tmp_path, "meta")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if hasattr(part, "parameters")}
    assert count["unet"] == 2_567_463_684 and count["vae"] == 83_653_863
    assert count["text_encoder"] == 123_060_480 and count["text_encoder_2"] == 694_659_840
    assert len(parts["tokenizer"]("a b").input_ids) == 4


def test_the_clock_counts_stages_only_while_it_is_on():
    clock = worker.Clock(torch.device("cpu"))
    owner = SimpleNamespace(act=lambda x: x + 1)
    clock.watch(owner, "act", "work")
    assert owner.act(1) == 2 and clock.seconds == {}
    clock.on = True
    assert owner.act(1) == 2 and clock.seconds["work"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "narrow"])
def test_a_whole_run(tmp_path, model):
    file = tmp_path / "figures.json"
    command = [sys.executable, "scripts/bench_train.py", "--model", model, "--rounds", "1", "--steps", "2", "--batch", "2"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["ratio"] > 0 and {"usual_pairs_per_s", "diffalign_pairs_per_s"} <= found.keys()
    assert "reference" in found["paths"]["live"]["stages"] and "reference" not in found["paths"]["measured"]["stages"]
