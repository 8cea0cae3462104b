"""Averaging reward weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.errors import ModelError
from diffalign.rewards.average import average_files, average_rewards


def write(path, tensors, init="abc"):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"init": init} if init else {"format": "pt"})
    return path


def head(value):
    return {"w": torch.tensor([value, 2.0]), "b": torch.full((2, 2), value, dtype=torch.float16), "n": torch.tensor([3])}


def test_mean_by_hand(tmp_path):
    """(1 + 2 + 6) / 3 = 3; whole numbers and data types stay."""
    files = [write(tmp_path / f"{i}.safetensors", head(value)) for i, value in enumerate((1.0, 2.0, 6.0))]
    target = average_files(files, tmp_path / "mean" / "model.safetensors")
    found = load_file(target)
    assert found["w"].tolist() == [3, 2] and found["b"].tolist() == [[3, 3], [3, 3]] and found["n"].tolist() == [3]
    assert found["b"].dtype == torch.float16
    with safe_open(target, framework="pt") as handle:
        assert handle.metadata() == {"init": "abc", "averaged": "3"}
    assert [p.name for p in target.parent.iterdir()] == ["model.safetensors"]


def test_the_average_of_a_linear_head_scores_the_average(tmp_path):
    """For a linear reward, and only for one, averaging weights is averaging scores."""
    torch.manual_seed(0)
    heads = [torch.randn(5) for _ in range(3)]
    files = [write(tmp_path / f"{i}.safetensors", {"w": w}) for i, w in enumerate(heads)]
    mean, x = load_file(average_files(files, tmp_path / "mean.safetensors"))["w"], torch.randn(7, 5)
    assert torch.allclose(x @ mean, torch.stack([x @ w for w in heads]).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("other", "init", "message"),
    [(head(1.0), "xyz", "started from other weights than"),
     (head(1.0), None, 'says nothing of the weights it started from'),
     ({**head(1.0), "extra": torch.ones(1)}, "abc", "its tensors are not those of .*; extra is in one of them only"),
     ({**head(1.0), "w": torch.ones(3)}, "abc", r"w is \[3\] torch.float32, in .* it is \[2\] torch.float32"),
     ({**head(1.0), "w": torch.ones(2).half()}, "abc", r"w is \[2\] torch.float16"),
     ({**head(1.0), "n": torch.tensor([4])}, "abc", "the whole numbers of n differ")])
def test_what_has_no_average_is_one_line(tmp_path, other, init, message):
    files = [write(tmp_path / "a.safetensors", head(1.0)), write(tmp_path / "b.safetensors", other, init)]
    with pytest.raises(ModelError, match=message) as caught:
        average_files(files, tmp_path / "mean.safetensors")
    assert "\n" not in str(caught.value) and not (tmp_path / "mean.safetensors").exists()


def test_bad_files(tmp_path):
    good = write(tmp_path / "a.safetensors", head(1.0))
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:40])
    (tmp_path / "x.pt").write_bytes(b"\x80\x02")
    for files, message in [([good], "at least two rewards, got 1"), ([good, tmp_path / "x.pt"], "only safetensors are read"),
                           ([good, tmp_path / "cut.safetensors"], "not a complete safetensors file"),
                           ([good, tmp_path / "none.safetensors"], "no such file")]:
        with pytest.raises(ModelError, match=message):
            average_files(files, tmp_path / "mean.safetensors")


def test_folders(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        write(tmp_path / name / "model.safetensors", head(value))
        (tmp_path / name / "config.json").write_text(json.dumps({"head": "mlp", "hidden": 8}))
    output = average_rewards([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    assert load_file(output / "model.safetensors")["w"].tolist() == [2, 2]
    assert json.loads((output / "config.json").read_text()) == {"head": "mlp", "hidden": 8}
    (tmp_path / "b" / "config.json").write_text(json.dumps({"head": "mlp", "hidden": 9}))
    with pytest.raises(ModelError, match="config.json differs from that of .* in hidden"):
        average_rewards([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json is missing"):
        average_rewards([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
