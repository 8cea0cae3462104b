"""Text rows -> token groups -> batches: layouts, masks of prompt and answer, and what is refused by name."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffalign.data import DataSpec, Offline, fixed_batches, read_texts
from diffalign.errors import DataError
from diffalign.models.masked_lm import load_tokens
from diffalign.models.spec import ModelSpec
from tests.models.test_masked_lm import MASK, make

PAIRS = [{"prompt": "a b", "chosen": "c", "rejected": "d e"}, {"prompt": "a", "chosen": "f f f", "rejected": "b"},
         {"prompt": "c", "chosen": "d", "rejected": "e"}]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return load_tokens(ModelSpec(pretrained_model_name_or_path=str(make(tmp_path_factory.mktemp("model") / "m"))))


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, tokens, rows=PAIRS, **options):
    return read_texts(DataSpec(path=written(tmp_path / "rows.jsonl", rows), **options), tokens)


def test_a_batch(tmp_path, tokens):
    batch = read(tmp_path, tokens)(np.array([0, 1]), np.array([0, 3]))
    # a b -> 3 4, end 1; the longest row is "a f f f <end>" of 5
    assert batch.x0.tolist() == [[[3, 4, 5, 1, 1], [3, 4, 6, 7, 1]], [[3, 8, 8, 8, 1], [3, 4, 1, 1, 1]]]
    answer, attended = (batch.cond.extra[name].int().tolist() for name in ("answer", "attended"))
    assert answer == [[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]]
    assert attended == [[[1, 1, 1, 1, 0], [1] * 5], [[1] * 5, [1, 1, 1, 0, 0]]]
    assert batch.key.tolist() == [[0, 0], [1, 3]] and batch.utility.tolist() == [[1, 0], [1, 0]] and batch.soft is None
    assert batch.cond.tokens is None and batch.cond.rows(2, 3).extra["answer"].shape == (12, 5)


def test_layouts(tmp_path, tokens):
    table = pa.table({"prompt": ["a"], "completions": [["b", "c", "d"]], "scores": [[0.1, 0.3, 0.2]]})
    pq.write_table(table, tmp_path / "ranked.parquet")
    texts = read_texts(DataSpec(path=str(tmp_path / "ranked.parquet")), tokens)
    batch = texts(np.array([0]), np.array([0]))
    assert texts.k == 3 and batch.x0[0, :, 1].tolist() == [4, 5, 6]
    assert batch.utility[0].tolist() == pytest.approx([0.1, 0.3, 0.2])
    liked = read(tmp_path, tokens, [{"prompt": "a", "completion": "b", "label": True},
                                    {"prompt": "a", "completion": "c", "label": False}])
    assert liked.k == 1 and liked(np.arange(2), np.zeros(2)).utility.tolist() == [[1], [-1]]


def test_ragged_groups_are_filled_with_what_does_not_count(tmp_path, tokens):
    texts = read(tmp_path, tokens, [{"prompt": "a", "completions": ["b", "c", "d"], "ranks": [1, 2, 3]},
                                    {"prompt": "a", "completions": ["e", "f"], "ranks": [1, 2]}])
    batch = texts(np.arange(2), np.zeros(2))
    assert batch.valid.tolist() == [[True] * 3, [True, True, False]] and batch.cond.extra["answer"].any(2).all()


def test_source_and_order(tmp_path, tokens):
    texts = read(tmp_path, tokens, PAIRS * 4)
    whole = Offline(texts, seed=3, train_batch_size=4, prefetch=False).take(2)[0]
    halves = Offline(texts, seed=3, train_batch_size=2, gradient_accumulation_steps=2, prefetch=False).take(2)
    assert torch.equal(whole.key, torch.cat([part.key for part in halves]))
    assert torch.equal(whole.place, torch.cat([part.place for part in halves]))
    ranks = [Offline(texts, seed=3, train_batch_size=2, rank=r, world=2, prefetch=False).take(2)[0].key for r in (0, 1)]
    assert torch.equal(whole.key, torch.cat(ranks))
    assert [len(batch.key) for batch in fixed_batches(texts, 5)] == [5, 5, 2]


def test_identity_follows_the_content(tmp_path, tokens):
    first = read(tmp_path, tokens).identity
    assert first == read(tmp_path, tokens).identity
    assert first != read(tmp_path, tokens, [*PAIRS[:2], {**PAIRS[2], "chosen": "f"}]).identity
    assert first != read(tmp_path, tokens, [PAIRS[1], PAIRS[0], PAIRS[2]]).identity


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "row line 4: an answer is empty"),
    ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen: missing or empty"),
    ({"prompt": "a", "chosen": 7, "rejected": "b"}, "chosen: text is needed, got int"),
    ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "b"}, "text is needed, got list"),
    ({"prompt": "a", "chosen": MASK, "rejected": "b"}, "holds the mask token"),
    ({"prompt": f"a {MASK}", "chosen": "c", "rejected": "b"}, "the prompt holds the mask token"),
    ({"prompt": "a " * 20, "chosen": "c", "rejected": "b"}, r"prompt \(20 tokens\) and answer \(2\) are longer than the 12"),
    ({"prompt": 3, "chosen": "c", "rejected": "b"}, "prompt: text is needed")])
def test_bad_rows(tmp_path, tokens, row, words):
    words = words.replace("row line", "line")
    with pytest.raises(DataError, match=words) as error:
        read(tmp_path, tokens, [*PAIRS, row])
    assert "rows.jsonl line 4" in str(error.value) and "bad_rows=skip" in str(error.value)
    skipped = read(tmp_path, tokens, [*PAIRS, row], bad_rows="skip")
    assert len(skipped) == 3 and skipped.report["bad_rows"] == 1 and "line 4" in skipped.report["bad"][0]


def test_max_tokens_and_ties(tmp_path, tokens):
    with pytest.raises(DataError, match="longer than the 4"):
        read(tmp_path, tokens, max_tokens=4)
    tie = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}
    with pytest.raises(DataError, match="ties"):
        read(tmp_path, tokens, [tie])
    assert read(tmp_path, tokens, [tie], ties="soft")(np.array([0]), np.array([0])).soft.tolist() == [0.5]
    with pytest.raises(DataError, match="no train group is left"):
        read(tmp_path, tokens, [{"prompt": "a", "chosen": "", "rejected": "b"}], bad_rows="skip")
