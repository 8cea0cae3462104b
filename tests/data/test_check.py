from __future__ import annotations

import json

import datasets
import pytest
from PIL import Image

from diffalign.data.check import check
from diffalign.errors import DataError

from .toy import jsonl, pairs, picture, spec


def test_a_clean_data_set(tmp_path):
    result = check(spec(pairs(tmp_path, 6, sizes=((16, 16), (40, 20)))), resolution=16, spatial_factor=4,
                   sample_path=tmp_path / "out" / "sample.png", samples=4)
    assert (result["rows"], result["groups"], result["prompts"], result["images"]) == (6, 6, 3, 12)
    assert result["candidates"] == {"2": 6} and result["sizes"] == {"16x16": 6, "40x20": 6}
    assert result["buckets"] == {"16x16": 6} and result["unlike_sizes"] == 0
    assert result["problems"] == [] and result["leakage"] == {} and result["groups_per_prompt"] == 2
    assert json.loads(json.dumps(result)) == result
    with Image.open(tmp_path / "out" / "sample.png") as sample:
        assert sample.width > 400 and sample.height > 4 * 200  # four rows, enlarged tiles


def test_what_is_wrong_is_found(tmp_path):
    """Pictures a to e. Row 2 repeats row 0; row 3 is row 0 with the labels swapped; row 4 is one picture twice; row 5 is a
    tie, row 6 is broken, row 7 cannot be cropped; two of three held-out prompts are trained on."""
    for i, name in enumerate("abcde"):
        (tmp_path / f"{name}.png").write_bytes(picture(i))
    (tmp_path / "strip.png").write_bytes(picture(9, (900, 4)))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")

    def row(prompt, first, second, scores=(1, 0)):
        return {"prompt": prompt, "images": [f"{first}.png", f"{second}.png"], "scores": list(scores)}
    path = jsonl(tmp_path / "d.jsonl", [
        row("A cat", "a", "b"), row("dog", "c", "d"), row("a  cat.", "b", "a", (0, 1)), row("a cat", "a", "b", (0, 1)),
        row("bird", "e", "e"), row("fish", "a", "e", (2, 2)), row("cow", "a", "broken"), row("cow", "a", "strip")])
    (tmp_path / "held.txt").write_text("a cat\nDOG\n\nhorse\n")
    result = check(spec(path, ties="refuse", heldout_prompts=str(tmp_path / "held.txt")), resolution=16, spatial_factor=4)
    assert (result["rows"], result["groups"], result["images"]) == (8, 5, 5)
    assert result["ties"] == {"count": 1, "policy": "refuse"} and result["bad_rows"]["count"] == 2
    assert [name.split(",")[0] for name in result["bad_rows"]["named"]] == ["d.jsonl line 7", "d.jsonl line 8"]
    assert result["duplicates"] == {
        "same_pair": {"count": 1, "named": ["d.jsonl line 1 and d.jsonl line 3"]},
        "conflicting_labels": {"count": 1, "named": ["d.jsonl line 1 and d.jsonl line 4"]},
        "identical_pictures": {"count": 1, "named": ["d.jsonl line 5"]}}
    assert result["leakage"]["heldout_prompts"] == {
        "prompts": 3, "shared": 2, "named": ["d.jsonl line 1: a cat", "d.jsonl line 2: dog"]}
    assert result["first_is_best"] == 0.6  # rows 1, 2 and 5 of five
    assert len(result["problems"]) == 6 and "2 bad rows stop the run" in result["problems"][0]


def test_leakage_into_a_validation_set(tmp_path):
    other = jsonl(tmp_path / "v.jsonl", [
        {"prompt": "Prompt 1", "chosen": "pictures/chosen0.png", "rejected": "pictures/rejected0.png"}])
    result = check(spec(pairs(tmp_path), validation=str(other)), resolution=16, spatial_factor=4)
    assert result["leakage"]["validation"]["shared"] == 1
    split = check(spec(pairs(tmp_path, 30, prompts=10), validation_share=0.4), resolution=16, spatial_factor=4)
    assert split["leakage"]["validation"]["shared"] == 0 and split["groups"] < 30


def test_a_constant_side_is_mentioned(tmp_path):
    columns = {"jpg_0": [picture(i) for i in range(20)], "jpg_1": [picture(i + 50) for i in range(20)], "label_0": [1] * 20,
               "caption": [f"{i}" for i in range(20)]}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "t.parquet"))
    result = check(spec(tmp_path / "t.parquet"), resolution=16, spatial_factor=4)
    assert result["first_is_best"] == 1.0 and "always on the same side" in result["problems"][0]


def test_unpaired_and_soft(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "image": "a.png", "label": i % 2} for i in range(3)])
    result = check(spec(path), resolution=16, spatial_factor=4, sample_path=tmp_path / "s.png")
    assert result["labels"] == {"liked": 1, "not liked": 2} and result["first_is_best"] is None
    assert (tmp_path / "s.png").is_file()


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="the data set is empty"):
        check(spec(jsonl(tmp_path / "e.jsonl", [])), resolution=16, spatial_factor=4)
    (tmp_path / "a.png").write_bytes(picture(0))
    tied = jsonl(tmp_path / "t.jsonl", [{"prompt": "p", "images": ["a.png"] * 2, "scores": [1, 1]}])
    with pytest.raises(DataError, match="all 1 rows are ties"):
        check(spec(tied), resolution=16, spatial_factor=4)
    with pytest.raises(DataError, match="data.heldout_prompts: .* cannot be read"):
        check(spec(pairs(tmp_path), heldout_prompts=str(tmp_path / "no.txt")), resolution=16, spatial_factor=4)
