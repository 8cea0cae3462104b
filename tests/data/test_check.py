from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import load_recipe
from diffalign.data.check import check, words
from diffalign.errors import ConfigError, DataError
from diffalign.evaluate.check_page import histogram, page
from diffalign.evaluate.labels import Example, Examples, Labels
from diffalign.evaluate.statistics import wilson

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


def test_small_pictures_and_empty_prompts_are_told(tmp_path):
    """16 x 16 pictures for 32 x 32: all twelve. Prompts of spaces alone say nothing."""
    path = pairs(tmp_path, 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i in (1, 4):
        rows[i]["prompt"] = " " * i
    jsonl(path, rows)
    assert check(spec(path), resolution=32, spatial_factor=4)["problems"] == [
        "2 groups have an empty prompt: they teach what is drawn without one",
        "12 pictures are smaller than what they are trained at: enlarged, they teach blur"]


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
        "prompts": 3, "shared": 2, "named": ["d.jsonl line 1: a cat", "d.jsonl line 2: dog"], "near": 0, "near_named": []}
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
    with pytest.raises(DataError, match="data.heldout_prompts: cannot read .*no.txt"):
        check(spec(pairs(tmp_path), heldout_prompts=str(tmp_path / "no.txt")), resolution=16, spatial_factor=4)


# --- near leakage


def test_held_out_prompts_may_be_a_table(tmp_path):
    """A benchmark's own file: read as raw lines, no prompt of it would ever be found."""
    path = pairs(tmp_path, 2, prompts=2)
    prompt = json.loads(path.read_text().splitlines()[0])["prompt"]
    (tmp_path / "held.tsv").write_text(f"Prompt\tCategory\n{prompt}\tanimals\n", encoding="utf-8")
    leak = check(spec(path, heldout_prompts=str(tmp_path / "held.tsv")), resolution=16, spatial_factor=4)["leakage"]
    assert (leak["heldout_prompts"]["prompts"], leak["heldout_prompts"]["shared"]) == (1, 1)


def test_same_words_in_another_order(tmp_path):
    """"a red ring on a blue square" and its mirror share their words; that is told, and is no problem by itself."""
    path = pairs(tmp_path, 2, prompts=2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    jsonl(path, [{**row, "prompt": prompt} for row, prompt in zip(rows, ("A red ring, on a blue square.", "a dog"))])
    (tmp_path / "held.txt").write_text("a blue square on a red ring\na dog\na cat\n")
    result = check(spec(path, heldout_prompts=str(tmp_path / "held.txt")), resolution=16, spatial_factor=4)
    leak = result["leakage"]["heldout_prompts"]
    assert (leak["prompts"], leak["shared"], leak["near"]) == (3, 1, 1)
    assert leak["near_named"] == ["pairs.jsonl line 1: a red ring, on a blue square ~ a blue square on a red ring"]
    assert len(result["problems"]) == 1 and words("Dog dog, CAT!") == {"dog", "cat"}


# --- labels beside a reward


@dataclass(frozen=True)
class Looks:
    """The red channel's mean; NaN for the prompt "blind"."""

    name = "looks"
    differentiable = False
    columns = ()

    def __call__(self, images, prompts):
        return torch.tensor([math.nan if prompt == "blind" else image.resize((1, 1)).getpixel((0, 0))[0] / 255
                             for image, prompt in zip(images, prompts)], dtype=torch.float32)


def looked(tmp_path, rows, reward=Looks(), count=2, **columns):
    """rows: (prompt, red of the preferred, red of the rejected). Returns what is found and the examples by kind."""
    records = []
    for i, (prompt, best, worst) in enumerate(rows):
        for side, red in (("c", best), ("r", worst)):
            Image.new("RGB", (16, 16), (red, i % 256, 7)).save(tmp_path / f"{side}{i}.png")
        records.append({"prompt": prompt, "chosen": f"c{i}.png", "rejected": f"r{i}.png",
                        **{name: values[i] for name, values in columns.items()}})
    labels = Labels(reward, Examples(count))
    found = check(spec(jsonl(tmp_path / "d.jsonl", records)), resolution=16, spatial_factor=4, look=labels.take)
    return found | labels.result(), labels


def test_agreement_over_prompts(tmp_path):
    """Prompt a: three pairs, all agree; b: one against; c: one equal; d: one of two; one cannot be scored.
    Mean over prompts: (1 + 0 + 1/2 + 1/2) / 4 = 1/2, although 4.5 of 7 pairs agree."""
    rows = [("a", 200, 100), ("A.", 200, 90), ("a", 255, 0), ("b", 0, 255), ("c", 50, 50), ("d", 90, 30), ("d", 30, 81),
            ("blind", 200, 100)]
    found, labels = looked(tmp_path, rows)
    told = found["agreement"]
    assert told["share"] == 0.5 and (told["low"], told["high"]) == wilson(0.5, 4)
    assert (told["reward"], told["prompts"], told["pairs"], told["equal"], told["not_scored"]) == ("looks", 4, 7, 1, 1)
    assert told["disagreements"] == ["d.jsonl line 4 (by 1)", "d.jsonl line 7 (by 0.2)"]
    gaps = found["gaps"]
    assert gaps["of"] == "looks" and sum(gaps["counts"]) == 7 and len(gaps["edges"]) == 21
    assert (gaps["least"], gaps["most"]) == (-1, 1) and gaps["median"] == pytest.approx(60 / 255)
    assert json.loads(json.dumps(found)) == found and labels.problems == []
    kinds = labels.examples.kinds()
    assert {name: [one.where.split()[-1] for one in found] for name, found in kinds.items() if name != "random"} == {
        "widest": ["3", "2"], "narrowest": ["5", "7"], "disagreements": ["4", "7"]}
    assert len(kinds["random"]) == 2 and kinds["widest"][0].scores == (1.0, 0.0)


def test_swapped_labels_are_a_problem(tmp_path):
    found, labels = looked(tmp_path, [(f"p {i}", 10, 200 if i % 10 else 5) for i in range(40)])
    assert found["agreement"]["share"] == 0.1 and "are winner and loser swapped?" in labels.problems[0]
    assert "only 10% of the prompts" in labels.problems[0]


def test_gaps_of_the_data_and_no_reward(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "images": ["0.png", "1.png", "2.png"], "scores": [s, 1.0, 0.25]}
                                        for s in (2.0, 3.0)])
    labels = Labels(None, Examples(3))
    check(spec(path), resolution=16, spatial_factor=4, look=labels.take)
    result = labels.result()
    assert result["agreement"] is None and result["gaps"]["of"] == "scores" and result["gaps"]["most"] == 2.75
    assert [one.gap for one in labels.examples.kinds()["widest"]] == [2.75, 1.75]
    plain, labels = looked(tmp_path, [("p", 9, 5)], reward=None)
    assert plain["gaps"] is None and plain["source_models"] == {} and list(labels.examples.kinds()) == ["random"]


@pytest.mark.parametrize("gaps, counts", [([1e17, 1e17], 2), ([0.1, np.nextafter(0.1, 1), 0.1], 3), ([0.0], 1)])
def test_gaps_that_are_all_but_equal_have_a_histogram(gaps, counts):
    labels = Labels(None, Examples(0))
    labels.gaps += gaps
    found = labels.result()["gaps"]
    assert sum(found["counts"]) == counts and found["edges"][0] <= found["least"] <= found["most"] <= found["edges"][-1]
    assert "nan" not in histogram(found)


def test_source_models(tmp_path):
    """Model x meets y in 20 groups and wins 19; one group is x alone."""
    rows = [(f"p {i}", 20, 10) for i in range(21)]
    found, labels = looked(tmp_path, rows, reward=None, chosen_model=["x"] * 19 + ["y", "x"],
                           rejected_model=["y"] * 19 + ["x", "x"])
    assert found["source_models"] == {"x": {"share": 22 / 42, "groups": 20, "wins": 0.95},
                                      "y": {"share": 20 / 42, "groups": 20, "wins": 0.05}}
    assert labels.problems == ["x wins 95% of the groups in which it meets other models: the labels may teach to look like it"]
    odd, _ = looked(tmp_path, rows[:2], reward=None, chosen_model=[3, None], rejected_model=["y", None])
    assert odd["source_models"] == {}


def test_unpaired_groups_and_soft_ties_have_no_agreement(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    lone = jsonl(tmp_path / "u.jsonl", [{"prompt": "p", "image": "a.png", "label": 1, "model": "x"}])
    labels = Labels(Looks(), Examples(2))
    check(spec(lone), resolution=16, spatial_factor=4, look=labels.take)
    result = labels.result()
    assert result["agreement"]["share"] is None and result["agreement"]["prompts"] == 0 and result["gaps"] is None
    assert result["source_models"] == {"x": {"share": 1.0, "groups": 0, "wins": None}}
    assert labels.examples.kinds()["random"][0].worst is None


def test_a_pair_is_drawn_with_even_chances():
    image = Image.new("RGB", (4, 4))
    seen = [0] * 6
    for seed in range(600):
        examples = Examples(2, seed)
        for i in range(6):
            examples.offer(Example(prompt=str(i), where="", best=image, worst=image))
        for one in examples.kinds()["random"]:
            seen[int(one.prompt)] += 1
    assert all(140 < count < 260 for count in seen)  # 200 each, standard deviation 11.5
    big = Examples(1)
    big.offer(Example(prompt="p", where="", best=Image.new("RGB", (2000, 1000)), worst=None, gap=None))
    assert big.kinds()["random"][0].best.size == (640, 320)
    none = Examples(0)
    none.offer(Example(prompt="p", where="", best=image, worst=image, gap=1.0))
    assert none.kinds() == {}


# --- the page


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_page(tmp_path):
    evil = "<script>alert(1)</script> & \"quotes\""
    found, labels = looked(tmp_path, [(evil, 200, 100), ("b", 0, 255), ("c", 60, 50)])
    found["problems"] += ["<b>odd</b>"]
    html = page("data.parquet", found, labels.examples.kinds())
    reader = Reader(html)
    scripts = [attrs for tag, attrs in reader.found if tag == "script"]
    assert len(scripts) == 1 and "src" not in scripts[0] and "<b>odd" not in html
    assert all(attrs["src"].startswith("data:") for tag, attrs in reader.found if tag == "img")
    assert not any(tag in ("link", "iframe") for tag, _ in reader.found)
    cards = [attrs for tag, attrs in reader.found if tag == "article"]
    assert len(cards) == 1 + 2 + 2 + 2 and evil in [card["data-prompt"] for card in cards]
    text = " ".join(" ".join(reader.words).split())
    for words_ in ("agree with looks on 66.7% of 3 prompts", "The reward disagrees with the label", "gap -1", "<b>odd</b>"):
        assert words_ in text
    assert [tag for tag, _ in reader.found].count("rect") == 20
    bare, labels = looked(tmp_path, [("p", 9, 5)], reward=None)
    html = page("data.parquet", bare, labels.examples.kinds())
    assert "1 group of 1 prompt; no problem was found" in html and "<rect" not in html
    one = histogram({"of": "<x>", "edges": [0.5, 0.5], "counts": [3]})  # all gaps equal
    assert "nan" not in one and "<x>" not in one


# --- the command


def test_command(tmp_path, capsys):
    from diffalign.cli import main

    recipe = ["check", "configs/quickstart.yaml", f"output_dir={tmp_path}", "data.max_train_samples=24"]
    assert main([*recipe, "check.reward=scenes", "check.examples=2"]) == 0
    said = capsys.readouterr().out
    assert "agreement" in said and "check.html" in said
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["agreement"]["share"] == 1.0 and found["agreement"]["reward"] == "scenes"  # the labels are the checker's
    html = (tmp_path / "check.html").read_text()
    assert "Widest gaps" in html and "disagrees with the label" not in html
    assert main(recipe) == 0  # no reward: no agreement, and no weights
    assert json.loads((tmp_path / "check.json").read_text())["agreement"] is None
    capsys.readouterr()
    assert main([*recipe, "check.reward=magic"]) == 2
    assert "check.reward.kind: no reward called 'magic'" in capsys.readouterr().err


def test_the_section_may_change_between_runs():
    from diffalign.train.identity import _config_changes

    old = {"seed": 0}
    assert _config_changes(old, {"seed": 0, "check": {"reward": None, "examples": 6}}, True, ()) == []
    recipe = load_recipe("configs/quickstart.yaml", ["check.examples=3"])
    assert recipe.check.examples == 3 and recipe.check.reward is None
    with pytest.raises(ConfigError, match="check.examples: .*0..1000|examples must lie"):
        load_recipe("configs/quickstart.yaml", ["check.examples=-1"])
