"""scripts/score_curves.py and step_reward_accuracy.py: what their tables say of results that are there."""

import json
import sys

import numpy as np
import pytest
import torch

from diffalign.errors import ConfigError

from .conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import score_curves  # noqa: E402
import step_reward_accuracy  # noqa: E402


def write(out, method, seed, last):
    marks = [{"step": 5 * (i + 1), "seconds": 4.0 * (i + 1), "cpu_seconds": 2.0 * (i + 1) + seed, "passes": 1000 * (i + 1),
              "scores": [last - 0.1 * (1 - i)] * 4} for i in range(2)]
    (out / f"{method}-seed{seed}.json").write_text(json.dumps({"method": method, "seed": seed, "marks": marks}))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"scores": [0.5] * 4, "prompts": "heldout"}))
    for seed, (dpo, lpo) in enumerate([(0.8, 0.7), (0.9, 0.7)]):
        write(tmp_path, "dpo", seed, dpo)
        write(tmp_path, "lpo", seed, lpo)
    return tmp_path


def test_a_row_is_the_mean_of_its_runs(out):
    """CPU seconds of the last mark: 4 and 5, so 4.5 (4); LPO's 0.7 less DPO's mean of 0.8 and 0.9 is -0.15 on every prompt."""
    lines = score_curves.table(out).splitlines()
    assert lines[0] == "Base: 0.500 on 4 prompts (heldout)." and len(lines) == 13
    assert lines[5] == "| dpo | 10 | 2,000 | 4 | 8 | **0.850** (0.800, 0.900) | +0.000 [+0.000, +0.000] |"
    assert lines[7] == "| lpo | 10 | 2,000 | 4 | 8 | **0.700** (0.700, 0.700) | -0.150 [-0.150, -0.150] |"


def test_how_many_passes_reach_the_goal(out):
    """DPO's mean goes 0.5, 0.75, 0.85 and so meets its own last score at 2,000; LPO ends at 0.7. Over its marks LPO has 0.65,
    DPO 0.75 and 0.85: differences -0.1 and -0.2, deviation 0.0707, 12.706 x 0.05 = 0.635 either side of -0.15.
    """
    lines = score_curves.table(out).splitlines()
    assert lines[-2] == "| dpo | 2,000 |  |" and lines[-1] == "| lpo | not in 2,000 | -0.150 [-0.785, +0.485] |"
    lines = score_curves.table(out, "lpo").splitlines()  # 0.7 lies on the line from (0, 0.5) to (1000, 0.75)
    assert lines[-2].startswith("| dpo | 800 |")


def test_the_figure_and_the_place_in_the_docs(out, tmp_path, monkeypatch):
    docs = tmp_path / "docs.md"
    docs.write_text(f"before\n{score_curves.BEGIN}\nold\n{score_curves.END}\nafter\n")
    options = ["--out", str(out), "--docs", str(docs), "--figure", str(tmp_path / "f.png")]
    monkeypatch.setattr(sys, "argv", ["score_curves.py", "table", *options])
    score_curves.main()
    text = docs.read_text()
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG" and "**0.850**" in text and "old" not in text


def test_nothing_to_show(tmp_path):
    with pytest.raises(ConfigError, match="holds no results; run"):
        score_curves.table(tmp_path)


def test_passes_are_counted_where_they_happen():
    """Three latents without a gradient are three passes, with one nine."""
    class Denoiser(torch.nn.Module):
        def forward(self, x, t):
            return x

    module = Denoiser()
    passes = score_curves.Passes(module)
    with torch.no_grad():
        module(torch.zeros(3, 1), 0)
    module(torch.zeros(3, 1), 0)
    passes.close()
    module(torch.zeros(3, 1), 0)
    assert passes.count == 3 + 9


def test_accuracy_table():
    """Two prompts, six levels: the latent model right on the first alone, the other judge on both."""
    half, all_right = np.zeros((2, 6)), np.ones((2, 6))
    half[0] = 1
    text = step_reward_accuracy.table({step_reward_accuracy.LATENT: half, "other": all_right})
    assert "| other | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in text
    assert "latent reward model less other, t > 0.5: -50.0 points [-100.0, +0.0]" in text
