"""Memory does not grow with the rows: allocations are counted, not resident pages. docs/scale.md has the figures of 1e5 rows."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from diffalign.data import encoding, store
from diffalign.data.cache import Cache, prompt_key
from diffalign.data.columns import Tally
from diffalign.data.ledger import Ledger
from diffalign.data.offline import Offline

from .toy import ToyEncoders, spec

FEW, MANY = 500, 8000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that what is constant, a shard and a block, is reached by the smaller set already."""
    monkeypatch.setattr(store, "SHARD_RECORDS", 64)
    monkeypatch.setattr(encoding, "BLOCK", 64)
    monkeypatch.setattr("diffalign.data.ledger.CACHE_KIB", 64)


def fill(folder: Path, rows: int) -> Path:
    """The set that ``encode`` would write for so many pairs, each of new pictures and a new prompt; without decoding any."""
    (folder / "rows.jsonl").parent.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("")
    job = encoding._Job(spec(folder / "rows.jsonl"), "train", 0, 16, ToyEncoders(), folder / "cache", 0, 1)
    latent = {"mean": np.zeros((4, 4, 4), np.float32), "std": np.ones((4, 4, 4), np.float32)}
    with Ledger(job.sets) as ledger:
        work = encoding._Encoding(job, ledger, ToyEncoders)
        work.unconditional()
        for i in range(rows):
            keys = [hashlib.sha256(f"{i} {k}".encode()).digest() for k in (0, 1)]
            for key in keys:
                assert ledger.queue("latent", key)
                work._latents.add(key, latent)
            ledger.queue("text", prompt_key(f"prompt {i}"))
            work._texts.add(prompt_key(f"prompt {i}"), {"tokens": np.zeros((5, 6), np.float32), "pooled": np.zeros(6, np.float32)})
            ledger.add(i, f"prompt {i}", prompt_key(f"prompt {i}"), 0, None, f"row {i}", [(key, (16, 16, 0, 0, 0)) for key in keys],
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
    """8,000 pairs against 500: 7,500 more. Building: below 20 bytes a pair of growth (it was 4,100), from names of files and
    checked shards. Opening, the order and a batch: below 24 (it was 1,000), of which the permutation takes 8, and 16 while made."""
    built = {rows: peak(fill, tmp_path / str(rows), rows) for rows in (FEW, MANY)}
    assert built[MANY] - built[FEW] < 20 * (MANY - FEW), built

    def begin(manifest):
        source = Offline(Cache(manifest), seed=0, train_batch_size=8, prefetch=False)
        return source, source.take(0)
    manifests = {rows: next((tmp_path / str(rows) / "cache" / "sets").glob("*.json")) for rows in (FEW, MANY)}
    begin(manifests[FEW])  # what is imported late
    opened = {rows: peak(begin, manifests[rows]) for rows in (FEW, MANY)}
    assert opened[MANY] - opened[FEW] < 24 * (MANY - FEW), opened
    assert len(Cache(manifests[MANY])) == MANY
