"""Memory does not grow with the rows: allocations are counted, not resident pages. docs/scale.md has figures of 1e5 rows."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import encoding, store
from diffalign.data.cache import Cache, prompt_key
from diffalign.data.columns import Tally, read_rows
from diffalign.data.ledger import Ledger
from diffalign.data.offline import Offline

from .toy import ToyEncoders, spec

FEW, MANY = 500, 2000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that what is constant, a shard and a block, is reached by the smaller set already."""
    monkeypatch.setattr(store, "SHARD_RECORDS", 250)
    monkeypatch.setattr(encoding, "BLOCK", 250)
    monkeypatch.setattr(store.os, "fsync", lambda handle: None)


def fill(folder: Path, rows: int) -> Path:
    """The set that ``encode`` would write for so many pairs, each of new pictures and a new prompt; without decoding any."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("")
    job = encoding._Job(spec(folder / "rows.jsonl"), "train", 0, 16, ToyEncoders(), folder / "cache", encoding.ALONE,
                        [], True)
    latent = {"mean": np.zeros((4, 4, 4), np.float32), "std": np.ones((4, 4, 4), np.float32)}
    text = {"tokens": np.zeros((5, 6), np.float32), "pooled": np.zeros(6, np.float32)}
    with Ledger(job.sets) as ledger:
        work = encoding._Encoding(job, ledger, ToyEncoders)
        work.unconditional()
        for i in range(rows):
            keys, prompt = [hashlib.sha256(f"{i} {k}".encode()).digest() for k in (0, 1)], f"prompt {i}"
            for key in keys:
                assert ledger.queue("latent", key)
                work._latents.add(key, latent)
            ledger.queue("text", prompt_key(prompt))
            work._texts.add(prompt_key(prompt), text)
            ledger.add(i, prompt, prompt_key(prompt), 0, None, f"row {i}", [(key, (16, 16, 0, 0, 0)) for key in keys],
                       (1.0, 0.0))
        work.finish()
        encoding._drop_failed(job, work, ledger, {}, Tally())
        ledger.number()
        encoding._write_set(job, ledger, work, encoding._report(job, Tally(), ledger, work))
    return job.manifest


def peak(call, *args) -> int:
    """Bytes that Python, numpy and Arrow held at most during the call, above what they held before."""
    tracemalloc.start()
    try:
        before, arrow = tracemalloc.get_traced_memory()[0], pa.total_allocated_bytes()
        kept = call(*args)
        grown = tracemalloc.get_traced_memory()[1] - before + max(0, pa.total_allocated_bytes() - arrow)
        del kept
        return grown
    finally:
        tracemalloc.stop()


def test_memory_is_flat(tmp_path):
    """1,500 pairs more. Building: below 100 bytes a pair, of names and checks of the shards, one for 250 records here instead
    of 32 MiB (it was 4,100). Opening, the order and a batch: below 64 (it was 1,000), of which the permutation takes 8."""
    def begin(manifest):
        source = Offline(Cache(manifest), seed=0, train_batch_size=8, prefetch=False)
        return source, source.take(0)
    begin(fill(tmp_path / "first", 10))  # what is imported late
    built = {rows: peak(fill, tmp_path / str(rows), rows) for rows in (FEW, MANY)}
    assert built[MANY] - built[FEW] < 100 * (MANY - FEW), built
    opened = {}
    for rows in (FEW, MANY):
        (manifest,) = (tmp_path / str(rows) / "cache" / "sets").glob("*.json")
        begin(manifest)  # hashes the files, 1 MiB at a time
        opened[rows] = peak(begin, manifest)
    assert opened[MANY] - opened[FEW] < 64 * (MANY - FEW), opened
    assert len(Cache(manifest)) == MANY


@pytest.mark.parametrize("count, numbers", [(4000, 16), (128, 16_384)], ids=["small", "large"])
def test_what_waits_for_its_shard_takes_its_own_bytes(tmp_path, monkeypatch, count, numbers):
    """And so does writing it: a record of 64 bytes had 600 of objects around it, and a shard was copied to be written."""
    monkeypatch.setattr(store, "SHARD_RECORDS", count + 1)
    latent = np.arange(numbers, dtype=np.float32)

    def written(ledger):
        writer = store.Writer(store.Store(tmp_path / "latents", "latent", ledger), multiple=1)
        for i in range(count):
            writer.add(i.to_bytes(32, "big"), {"mean": latent, "std": latent})
        writer._flush((("mean", latent.shape, "<f4"), ("std", latent.shape, "<f4")))
    with Ledger(tmp_path) as ledger:
        written(ledger)
        grown = peak(written, ledger)
    held = count * (36 + 2 * latent.nbytes)
    assert grown < 1.25 * held + (1 << 19) + 50_000, grown / held  # two blocks of the file, while it is hashed


def test_a_parquet_file_is_not_read_ahead(tmp_path):
    """20 MiB of pictures: what Arrow holds is never half of them."""
    rows = [{"prompt": f"p{i}", "chosen": np.random.default_rng(i).bytes(1 << 16), "rejected": b"x"} for i in range(320)]
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    for source in (path, tmp_path / "folder"):
        before, held = pa.total_allocated_bytes(), []
        for _ in read_rows(spec(source), Tally()):
            held.append(pa.total_allocated_bytes() - before)
        assert len(held) == 320 and max(held) < 10 << 20, max(held)
