"""Every layout becomes one schema; a bad row has an address; nothing outside the data set's folder is read."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import datasets
import pytest
import torch

from diffalign.data.columns import Tally, files_below, normalised, nothing_left, read_rows
from diffalign.data.spec import DataSpec
from diffalign.errors import DataError
from diffalign.objectives import AllPairs
from diffalign.types import Batch, Cond

from .toy import jsonl, pairs, picture, spec


def read(path, tally=None, part="train", seed=0, **options):
    return list(read_rows(spec(path, **options), tally if tally is not None else Tally(), part=part, seed=seed))


def pickapic(path, labels, **more):
    """Parquet with Pick-a-Pic's columns; picture bytes 2i and 2i + 1."""
    n = len(labels)
    columns = {"jpg_0": [picture(2 * i, format="JPEG") for i in range(n)],
               "jpg_1": [picture(2 * i + 1, format="JPEG") for i in range(n)], "label_0": labels,
               "caption": [f"caption {i}" for i in range(n)], **more}
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    return path


def test_pickapic_labels(tmp_path):
    """datasets.md check 1: labels 1, 0, 0.5 -> two pairs under drop, the second with jpg_1 preferred; 0.7 is a soft label."""
    path = pickapic(tmp_path / "train.parquet", [1.0, 0.0, 0.5, 0.3], label_1=[0.0, 1.0, 0.5, 0.7])
    tally = Tally()
    rows = read(path, tally)
    assert [(row.id, row.utility, row.soft) for row in rows] == [(0, (1, 0), None), (1, (0, 1), None), (3, (0, 1), 0.7)]
    assert (tally.ties, tally.rows, tally.layout) == (1, 4, "pickapic")
    assert rows[1].images[1].read() == picture(3, format="JPEG") and rows[1].where == "train.parquet row 1"
    soft = read(path, ties="soft")[2]
    assert soft.tie and soft.soft == 0.5
    with pytest.raises(DataError, match=r"train.parquet row 2: a tie, and data.ties=refuse. Remove it, or set data.ties"):
        read(path, ties="refuse")


def test_labels_as_text_are_numbers(tmp_path):
    """datasets.md check 2: webdataset labels arrive as text; "0" means jpg_1 won."""
    assert [row.utility for row in read(pickapic(tmp_path / "t.parquet", ["0", "1", "0.5"]))] == [(0, 1), (1, 0)]
    for bad in ("abc", "nan", "2", ""):
        with pytest.raises(DataError, match="t.parquet row 0: label_0: "):
            read(pickapic(tmp_path / "t.parquet", [bad]))


def test_labels_that_contradict_each_other(tmp_path):
    with pytest.raises(DataError, match=r"row 0: label_1: label_0 \+ label_1 must be 1"):
        read(pickapic(tmp_path / "t.parquet", [1.0], label_1=[1.0]))


def test_unlabelled_rows_are_counted(tmp_path):
    tally = Tally()
    assert len(read(pickapic(tmp_path / "t.parquet", [1.0, 0.5], has_label=[True, False]), tally)) == 1
    assert (tally.unlabelled, tally.ties) == (1, 0)


def test_image_features_stay_undecoded(tmp_path):
    """Even a picture that is none must reach our own decoder: one corrupt row is not a corrupt data set."""
    features = datasets.Features({"prompt": datasets.Value("string"), "chosen": datasets.Image(),
                                  "rejected": datasets.Image()})
    table = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": [{"bytes": picture(0), "path": None}],
                                        "rejected": [{"bytes": b"junk", "path": None}]}, features=features)
    (tmp_path / "hub").mkdir()
    table.to_parquet(str(tmp_path / "hub" / "train-00000-of-00001.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "hub", tmp_path / "hub" / "train-00000-of-00001.parquet", tmp_path / "saved"):
        (row,) = read(path)
        assert [image.read() for image in row.images] == [picture(0), b"junk"] and row.utility == (1, 0)


def test_scored_lists_and_ranks(tmp_path):
    """HPDv2's rank [2, 1, 3] (1 is best) puts picture 1 before 0 before 2."""
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(picture(i))
    images = [f"a/{i}.png" for i in range(3)]
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "images": images, "scores": [0.1, 0.9, 0.5]},
                                        {"prompt": "q", "images": images, "ranks": [2, 1, 3]},
                                        {"prompt": "r", "images": images[:2], "scores": [0.5, 0.5]}])
    tally = Tally()
    scored, ranked = read(path, tally)
    assert scored.utility == pytest.approx((0.1, 0.9, 0.5)) and ranked.utility == (-2, -1, -3) and tally.ties == 1
    for bad in ([0.1, 0.2], [0.1, "x", 0.2], [1e40, 0, 1], "abc", [None, 1, 2], [10**400, 0, 1]):
        with pytest.raises(DataError, match="d.jsonl line 1: scores: "):
            read(jsonl(path, [{"prompt": "p", "images": images, "scores": bad}]))


@pytest.mark.parametrize("ranks, pairs_of_it", [([2, 1, 3], [(0, 2), (1, 0), (1, 2)]), ([1, 1, 2], [(0, 2), (1, 2)]),
                                                ([1, 2, 5, 3], [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (3, 2)])])
def test_ranks_with_gaps_and_ties_are_compared(tmp_path, ranks, pairs_of_it):
    """datasets.md check 6: (winner, loser) of HPDv2's [2, 1, 3] and of ImageReward's [1, 2, 5, 3] and [1, 1, 2]."""
    for i in range(len(ranks)):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    images = [f"{i}.png" for i in range(len(ranks))]
    row, = read(jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "images": images, "ranks": ranks}]))
    utility = torch.tensor([row.utility])
    batch = Batch(x0=torch.zeros(1, len(ranks), 1), cond=Cond(), utility=utility, valid=torch.ones_like(utility).bool(),
                  key=torch.zeros(1, 2, dtype=torch.int64))
    _, winner, loser = AllPairs()(batch)
    assert sorted(zip(winner.tolist(), loser.tolist(), strict=True)) == pairs_of_it


def test_unpaired(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(0))
    path = jsonl(tmp_path / "metadata.jsonl",
                 [{"text": "p", "file_name": "x.png", "label": label} for label in (1, True, 0, -1)])
    assert [row.utility for row in read(tmp_path)] == [(1,), (1,), (-1,), (-1,)]
    with pytest.raises(DataError, match="line 1: label: must be 1"):
        read(jsonl(path, [{"text": "p", "file_name": "x.png", "label": 0.5}]))


def test_imagefolder_names_and_json_lists(tmp_path):
    pairs(tmp_path, 2)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    renamed = [{"prompt": row["prompt"], "chosen_file_name": row["chosen"], "rejected_file_name": row["rejected"]}
               for row in rows]
    (tmp_path / "list.json").write_text(json.dumps(renamed))
    assert [row.images[0].read() for row in read(tmp_path / "list.json")] == [picture(0), picture(1)]
    assert read(tmp_path / "list.json")[1].where == "list.json row 1"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    jsonl(elsewhere / "train.jsonl", rows)
    assert read(elsewhere, image_root=str(tmp_path))[0].images[0].read() == picture(0)


def test_no_preference_column(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "image": "x.png", "url": "u"}])
    with pytest.raises(DataError) as caught:
        read(path, bad_rows="skip")  # never skipped: it is the data set that is wrong
    message = str(caught.value)
    assert "no preference column found. Its columns: prompt, image, url" in message and "\n" not in message
    assert all(name in message for name in ("pickapic (jpg_0, jpg_1, label_0", "chosen_rejected (", "scored (", "unpaired ("))
    with pytest.raises(DataError, match="not those of data.layout=pickapic"):
        read(pairs(tmp_path), layout="pickapic")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty(tmp_path, content):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="d.jsonl: the data set is empty"):
        read(tmp_path / "d.jsonl")


def test_sources_that_are_none(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "d.md").write_text("x")
    (tmp_path / "d.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    for path, words in ((tmp_path / "d.parquet", "cannot be read as a data set"), (tmp_path / "d.md", "unknown kind of file"),
                        (tmp_path / "d.json", "no JSON file"), (tmp_path / "absent.parquet", "no such file or folder"),
                        (tmp_path / "nothing", "cannot be read as a data set"), ("absent.parquet", "no such file"),
                        ("x/*.parquet", r"no such file or folder; a pattern is read for tar shards only"),
                        ("../x/y", "no such file"), (tmp_path / "no" / "such", "no such file")):
        with pytest.raises(DataError, match=words) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_folder_of_two_tables_is_not_guessed(tmp_path):
    """The one JSONL would be read and the parquet left out without a word; what our commands write beside is no table."""
    pairs(tmp_path, 3)
    for ours in ("scores.parquet", "records.parquet", "pairs.scored.jsonl"):
        pickapic(tmp_path / ours, [1.0])
    assert len(read(tmp_path)) == 3
    pickapic(tmp_path / "more.parquet", [1.0, 0.0])
    with pytest.raises(DataError, match=r"several kinds \(pairs.jsonl, more.parquet\), of which one would be read; give that"):
        read(tmp_path)
    assert len(read(tmp_path / "pairs.jsonl")) == 3 and len(read(tmp_path / "more.parquet")) == 2


@pytest.mark.parametrize("path", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", "C:\\x.png",
                                  "link.png", "x\0.png", "http://host/x.png", "file:///etc/passwd", "a" * 5000, "~/x.png", ""])
def test_paths_stay_in_the_folder(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(picture(0))
    inside = tmp_path / "set"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    data = jsonl(inside / "d.jsonl", [{"prompt": "p", "chosen": path, "rejected": path}])
    with pytest.raises(DataError, match="^d.jsonl line 1"):
        [image.read() for image in read(data)[0].images]


def test_bad_rows_are_skipped_and_named(tmp_path):
    path = pairs(tmp_path, 4)
    lines = path.read_text().splitlines()
    lines[1], lines[2] = "{broken", json.dumps({"prompt": 3, "chosen": "x", "rejected": "y"})
    path.write_text("\n".join(lines))
    tally = Tally()
    assert [row.id for row in read(path, tally, bad_rows="skip")] == [0, 3]
    assert tally.bad_rows == 2 and tally.bad[0].startswith("pairs.jsonl line 2: no JSON object")
    assert tally.bad[1] == "pairs.jsonl line 3: prompt: text is needed, got int"
    with pytest.raises(DataError, match="line 2: .*Mend the row, or set data.bad_rows=skip"):
        read(path)


def test_mutated_rows_are_rows_or_sentences(tmp_path):
    """RELIABILITY E5, 1,000 mutants of JSON lines."""
    values = [None, True, -1, 1e400, float("nan"), "", "\ud800", [], {}, [[]], {"bytes": 3}, {"path": None}, "x" * 3000,
              10**30]
    good = {"prompt": "p", "images": ["a.png", "b.png"], "scores": [1, 2]}
    draw, rows = random.Random(0), []
    for _ in range(500):
        row = dict(good)
        row[draw.choice([*row, "label_0"])] = draw.choice(values)
        if draw.random() < 0.3:
            del row[draw.choice(list(row))]
        rows.append(json.dumps(row).encode())
    line = json.dumps(good).encode()
    for _ in range(500):
        at = draw.randrange(len(line))
        inserted = draw.choice([b"", bytes([draw.randrange(256)]), b"[" * 3000, b"\0"])
        rows.append(line[:at] + inserted + line[at + draw.randrange(3):])
    path, tally = tmp_path / "d.jsonl", Tally()
    path.write_bytes(line + b"\n" + b"\n".join(row.replace(b"\n", b" ") for row in rows))
    kept = read(path, tally, bad_rows="skip")
    assert len(kept) + tally.bad_rows + tally.ties == tally.rows > 1000 and tally.bad_rows > 400
    assert all(message.startswith("d.jsonl line ") and "\n" not in message for message in tally.bad)


def test_the_limit_counts_groups_after_ties(tmp_path):
    """MaPO's reader limits first and drops ties then: fewer rows than asked for."""
    rows = read(pickapic(tmp_path / "t.parquet", [0.5, 1.0, 0.5, 0.0, 1.0]), max_train_samples=2)
    assert [row.id for row in rows] == [1, 3]


def test_validation_is_split_by_prompt(tmp_path):
    path = pairs(tmp_path, 60, prompts=20)
    train = read(path, validation_share=0.3, seed=5)
    held = read(path, part="validation", validation_share=0.3, seed=5)
    assert len(train) + len(held) == 60 and 3 <= len({row.prompt for row in held}) <= 10
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert {row.id for row in held} != {row.id for row in read(path, part="validation", validation_share=0.3, seed=6)}
    tally = Tally()
    assert not read(path, tally, validation_share=0.999)
    said = str(nothing_left(spec(path, validation_share=0.999), tally, "train"))
    assert "no train group is left of 60 rows" in said and "data.validation_share=0.999 gave the others" in said
    other = pairs(tmp_path, 3, name="held.jsonl")
    assert len(read(path, part="validation", validation=str(other))) == 3 and len(read(path, validation=str(other))) == 60


def test_near_identical_prompts_fall_on_one_side(tmp_path):
    """Capitals, blanks and a full stop do not make another prompt: no spelling of a held-out prompt is trained on."""
    path = pairs(tmp_path, 1)
    row = json.loads(path.read_text())
    jsonl(path, [{**row, "prompt": form.format(i)} for i in range(30) for form in ("prompt {}", "Prompt  {}.", " PROMPT {} ")])
    held = [normalised(row.prompt) for row in read(path, part="validation", validation_share=0.5)]
    assert 5 < len(set(held)) < 25 and all(held.count(prompt) == 3 for prompt in held)


def test_normalised_prompts():
    assert normalised("  A  Red\tRING. ") == normalised("a red ring") == "a red ring"
    assert normalised("ﬁsh") == "fish"


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Rows are yielded one by one: the first is there before a broken later line is reached."""
    path = pairs(tmp_path, 2)
    path.write_bytes(path.read_bytes() + b"{\n")
    rows = read_rows(spec(path), Tally())
    assert next(rows).id == 0 and next(rows).id == 1
    with pytest.raises(DataError, match="line 3"):
        next(rows)


def test_reading_a_recipe_needs_no_torch():
    program = "import sys, diffalign.data; diffalign.data.DataSpec(path='x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_prompts_alone(tmp_path):
    """A text file, or a table with nothing but prompts; beside other columns a prompt is not enough unless asked for."""
    (tmp_path / "p.txt").write_bytes("\ufeffa red ring\n\n  a blue disc \n".encode() + b"\xff\n")
    rows = list(read_rows(DataSpec(path=str(tmp_path / "p.txt"), bad_rows="skip"), tally := Tally()))
    assert [row.prompt for row in rows] == ["a red ring", "a blue disc"] and tally.layout == "prompts"
    assert [len(row.images) for row in rows] == [1, 1] and tally.bad == ["p.txt line 4: not UTF-8 text"]
    assert rows[0].images[0].data == rows[1].images[0].data  # one stand-in, encoded once
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a ring", "id": 3}))
    with pytest.raises(DataError, match="no preference column"):
        list(read_rows(DataSpec(path=str(tmp_path / "p.jsonl")), Tally()))
    assert next(read_rows(DataSpec(path=str(tmp_path / "p.jsonl"), layout="prompts"), Tally())).prompt == "a ring"


def test_users_are_text(tmp_path):
    """user_id or user; 7, 7.0 and "7" are one person; nobody is None."""
    path = pickapic(tmp_path / "a.parquet", [1.0] * 3, user_id=[7.0, None, 8.0])
    assert [row.user for row in read(path)] == ["7", None, "8"]
    path = pickapic(tmp_path / "b.parquet", [1.0] * 2, user=["7", ""])
    assert [row.user for row in read(path)] == ["7", None]
    assert [row.user for row in read(pickapic(tmp_path / "c.parquet", [1.0]))] == [None]


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """``datasets`` is then told to look into its cache alone, for this call."""
    asked, offline = [], []

    def unreachable(self, name, **_):
        asked.append(name)
        raise OSError("Name or service not known")

    def cached(*_, **__):
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError("nothing there")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset_builder", cached)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="owner/name: no such file or folder here, .* cannot be reached .Name or service"):
        list(read_rows(spec("owner/name"), Tally()))
    assert asked == ["owner/name"] and offline == [True] and datasets.config.HF_HUB_OFFLINE is False


def test_files_below_a_folder(tmp_path):
    """As ``Path.rglob`` finds them, hidden ones and folders of such a name too, links to folders not followed."""
    for name in ("a.tar", "b/c.tar", "b/.d.tar", "b/c/e.png", "f.tar/g.jsonl", "a.tar.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    expected = {path for path in tmp_path.rglob("*") if path.suffix in (".tar", ".jsonl")}
    assert set(files_below(tmp_path, (".tar", ".jsonl"))) == expected and len(expected) == 5
