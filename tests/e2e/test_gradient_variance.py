"""scripts/gradient_variance.py, small: it trains, measures, and writes its table between the markers."""

import json
import sys

from .conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import gradient_variance  # noqa: E402


def test_a_small_measurement_writes_its_table(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradient_variance, "DRAWS", (2, 8))
    out, docs = tmp_path / "out", tmp_path / "methods.md"
    docs.write_text(f"before\n{gradient_variance.BEGIN}\nstale\n{gradient_variance.END}\nafter\n")
    command = ["--config", str(small(tmp_path)), "--out", str(out), "--steps", "2", "--repeats", "2", "--pairs", "4"]
    for _ in range(2):  # what was measured is kept
        assert gradient_variance.main([*command, "--docs", str(docs)]) == 0
    assert "measured.json: kept" in capsys.readouterr().out
    text, rows = docs.read_text(), json.loads((out / "measured.json").read_text())["rows"]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text and "--repeats 2" in text
    table = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| step")]
    assert [line.split(" | ")[0].strip("| ") for line in table] == [row["name"] for row in rows]
    assert len(rows) == 12 + 2 + 4, "8 draws do not fit into 4 pairs"
    assert {line.count("|") for line in table} == {6, 7, 3} and all(row["trace"] > 0 for row in rows)
    by = {row["name"]: row for row in rows}
    assert by["reference with draws of its own"]["logit_ratio"][0] > 100 > by["2 draws, random"]["logit_ratio"][0]
    docs.write_text("no place")
    assert gradient_variance.main([*command, "--docs", str(docs)]) == 2
    assert "needs the lines" in capsys.readouterr().err
