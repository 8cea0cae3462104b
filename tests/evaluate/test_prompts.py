"""Prompt lists by file shape, with the traps of each; and the lists that are shipped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.prompts import read_prompts
from diffalign.errors import DataError

SHIPPED = Path(__file__).parents[2] / "configs" / "prompts"


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def test_lines_and_parti(tmp_path):
    path = write(tmp_path / "a.txt", '\ufeffa red ring\r\n\r\n  "quoted" & <b>\nform\x0cfeed\u2028kept')
    assert read_prompts(path).texts == ["a red ring", '"quoted" & <b>', "form\x0cfeed\u2028kept"]
    header = "Prompt\tCategory\tChallenge\tNote\n"
    path = write(tmp_path / "b.tsv", header + 'a "fox, red\tAnimals\tBasic\t\nhens\tAnimals\tBasic\tx\n')
    table = read_prompts(path)  # a lone straight quote, and a comma, are letters
    assert (table.texts, table.categories) == (['a "fox, red', "hens"], ["Animals", "Animals"])
    assert len(read_prompts(write(tmp_path / "long.tsv", f"Prompt\n{'x' * 200_000}\n")).texts[0]) == 200_000


def test_hpsv2_benchmark_and_test_split(tmp_path):
    for style in ("photo", "anime"):
        write(tmp_path / "benchmark" / f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
    found = read_prompts(tmp_path / "benchmark")
    assert found.texts == ["anime one", "anime two", "photo one", "photo two"]
    assert found.categories == ["anime", "anime", "photo", "photo"]
    test = write(tmp_path / "test.json", json.dumps([{"prompt": "a fox", "image_path": ["x.jpg"], "rank": [1, 2]}]))
    assert read_prompts(test).texts == ["a fox"] and read_prompts(test).categories is None
    one = write(tmp_path / "all.json", json.dumps({"anime": ["a"], "photo": ["b", "c"]}))
    assert read_prompts(one).categories == ["anime", "photo", "photo"]


def test_geneval_tasks(tmp_path):
    lines = [{"tag": "counting", "include": [{"class": "fox", "count": 2}], "prompt": "two foxes"},
             {"tag": "colors", "include": [], "prompt": "a red fox"}]
    found = read_prompts(write(tmp_path / "evaluation_metadata.jsonl", "\n".join(map(json.dumps, lines))))  # unterminated
    assert (found.texts, found.categories) == (["two foxes", "a red fox"], ["counting", "colors"])


def test_t2i_compbench_keeps_its_last_line_and_leaves_training_out(tmp_path):
    write(tmp_path / "t" / "color_val.txt", "a red fox\na blue hen")  # the last line is unterminated
    write(tmp_path / "t" / "3d_spatial_val.txt", "a fox behind a hen\n\n")
    for other in ("color_train", "color", "color_val_seen", "complex_val_action"):
        write(tmp_path / "t" / f"{other}.txt", "not held out\n")
    found = read_prompts(tmp_path / "t")
    assert found.texts == ["a fox behind a hen", "a red fox", "a blue hen"]
    assert found.categories == ["3d_spatial", "color", "color"]
    assert read_prompts(tmp_path / "t" / "color_val.txt").texts == ["a red fox", "a blue hen"]


def test_dpg_bench_folder_and_questions(tmp_path):
    for name, text in (("10", "ten"), ("2", "two, long"), ("COCO1", "a photo")):
        write(tmp_path / "p" / f"{name}.txt", text)
    found = read_prompts(tmp_path / "p")
    assert found.texts == ["two, long", "ten", "a photo"] and found.categories is None
    table = ("item_id,text,keywords,proposition_id,question_natural_language\n"
             'first,"One, with a comma\nand a line break",,1,Is it one?\n'
             'first,"One, with a comma\nand a line break",,2,Is it two?\n'
             "second,Another,,1,Is it?\n")
    found = read_prompts(write(tmp_path / "dpg_bench.csv", table))
    assert found.texts == ["One, with a comma\nand a line break", "Another"]  # the first row counts, an item comes once


def test_pick_a_pic_captions_come_once(tmp_path):
    rows = {"caption": ["a fox", "a hen", "a fox"], "jpg_0": [b"x"] * 3, "label_0": [1.0, 0.0, 0.5]}
    pq.write_table(pa.table(rows), tmp_path / "v.parquet")
    assert read_prompts(tmp_path / "v.parquet").texts == ["a fox", "a hen"]


def test_other_tables(tmp_path):
    assert read_prompts(write(tmp_path / "a.csv", 'Prompt,Category\n"a, b",x\nc,y\n')).categories == ["x", "y"]
    twice = read_prompts(write(tmp_path / "b.txt", "a\na\n"))
    assert twice.texts == ["a", "a"]  # asked for twice: other seeds


@pytest.mark.parametrize(("name", "content", "words"), [
    ("x.json", "{", "x.json is not readable JSON"), ("x.json", "3", "is no list of prompts"),
    ("x.json", '["a", 3]', "mixes prompts with something else"), ("x.json", '["a", " "]', "entry 2 has no prompt"),
    ("x.json", '[{"words": "a"}]', "names no column of prompts"),
    ("x.jsonl", '{"prompt": "a"}\n{', "line 2 is not readable JSON"),
    ("x.jsonl", '{"prompt": "a"}\n{"tag": "b"}', "entry 2 has no prompt"), ("x.csv", 'prompt\n"a', "is no table with commas"),
    ("x.csv", "words\na\n", "names no column"), ("x.json", "[]", "holds no prompt"), ("x.parquet", "no", "cannot read"),
    ("x.json", "[" * 100_000, "is not readable JSON"), ("gone.txt", None, "cannot read .*gone.txt: No such file"),
    ("empty.txt", "\n \n", "holds no prompt"), ("t.tsv", "Text\nx\n", 'line 1 names no column "Prompt"'),
    ("short.tsv", "Category\tPrompt\nx\n", "line 2 has no prompt"),
    ("half.json", '["a", "b \\ud83d"]', "holds 'b .ud83d', which is no valid Unicode text"),
    ("half.jsonl", '{"prompt": "a", "tag": "\\udc00"}', "no valid Unicode text")])
def test_bad_files_are_one_line(tmp_path, name, content, words):
    path = tmp_path / name if content is None else write(tmp_path / name, content)
    with pytest.raises(DataError, match=words) as caught:
        read_prompts(path, "prompts")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("prompts: ")


def test_no_text_empty_folder_and_wrong_parquet(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "bytes.txt")
    (tmp_path / "bytes.txt").unlink()
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path)
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has no column caption or prompt, it has .'words'"):
        read_prompts(tmp_path / "x.parquet")


@given(st.sampled_from([".txt", ".tsv", ".csv", ".json", ".jsonl", ".parquet"]), st.binary(max_size=200))
def test_any_bytes_give_prompts_or_one_line(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        found = read_prompts(path)
    except DataError as error:
        assert "\n" not in str(error).replace(str(path), "")
    else:
        assert found.texts and all(text.strip() == text and text for text in found.texts)
        assert found.categories is None or len(found.categories) == len(found.texts)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc"))).map(str.strip).filter(bool), min_size=1))
def test_what_is_written_is_read(tmp_path_factory, texts):
    folder = tmp_path_factory.getbasetemp()
    assert read_prompts(write(folder / "a.json", json.dumps(texts))).texts == texts
    assert read_prompts(write(folder / "a.txt", "\n".join(texts))).texts == texts
    assert read_prompts(write(folder / "a.jsonl", "\n".join(json.dumps({"prompt": text}) for text in texts))).texts == texts


@pytest.mark.parametrize(("path", "count", "kinds", "digest"), [
    ("parti/PartiPrompts.tsv", 1632, 12, "fab29e41bb512a16"),
    ("geneval/evaluation_metadata.jsonl", 553, 6, "5c48e0813e812e3c"),
    ("t2i_compbench", 2400, 8, None), ("validation.txt", 16, 0, None)])
def test_shipped_lists_are_whole(path, count, kinds, digest):
    found = read_prompts(SHIPPED / path)
    assert len(found.texts) == len(set(found.texts)) == count and len(Counter(found.categories or ())) == kinds
    if digest:
        assert hashlib.sha256((SHIPPED / path).read_bytes()).hexdigest().startswith(digest)


def test_shipped_lists_by_their_own_figures():
    """evaluation.md section 6: 28 lines of PartiPrompts hold straight quotes (22 in the prompt, 6 in the note); 300 validation
    prompts per T2I-CompBench category."""
    parti = SHIPPED / "parti" / "PartiPrompts.tsv"
    assert sum('"' in text for text in read_prompts(parti).texts) == 22 and parti.read_text().count("\n") == 1633
    assert set(Counter(read_prompts(SHIPPED / "t2i_compbench").categories).values()) == {300}
    assert (SHIPPED / "t2i_compbench" / "color_val.txt").read_bytes().count(b"\n") == 299
