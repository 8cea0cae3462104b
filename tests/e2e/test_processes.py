"""``encode`` by command, with several processes of gloo, from tables and from tars, killed and run again: always the same files."""

import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffalign.cli import main
from diffalign.data.cache import Cache
from diffalign.run import reference

from .conftest import DATA

ROOT, LIMIT = Path(__file__).parents[2], 280  # seconds, on a machine that others use too
BLOCK = 8  # groups a file of the reference's errors
COMMAND = f"""
import sys
from diffalign.cli import main
from diffalign.data import store
from diffalign.run import reference
reference.BLOCK, store.SHARD_BYTES = {BLOCK}, 1
sys.exit(main(sys.argv[1:]))
"""  # many small files, so that there is a middle to be killed in


def started(size: int, *words) -> list[subprocess.Popen]:
    """The ranks of ``diffalign WORDS``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if size == 1 else {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"})
    return [subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**common, **({} if size == 1 else {
                                 "RANK": str(rank), "LOCAL_RANK": str(rank)})}) for rank in range(size)]


def ended(processes: list[subprocess.Popen]) -> list[str]:
    """What each has printed, when all have done their work."""
    try:
        said = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), [error[-800:] for _, error in said]
    return [text for text, _ in said]


def killed(processes: list[subprocess.Popen], folder: Path, pattern: str, count: int) -> dict[str, bytes]:
    """SIGKILL for the last process as soon as so many files are there, then for the others, as a launcher does. The files."""
    deadline = time.monotonic() + LIMIT
    try:
        while len(list(folder.glob(pattern))) < count:
            assert time.monotonic() < deadline and any(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[-1].send_signal(signal.SIGKILL)
        time.sleep(0.3)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return files(folder, pattern)


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Forty of the embedded pairs in two shards, and in a table."""
    folder = tmp_path_factory.mktemp("pairs")
    table = pq.read_table(DATA / "train.parquet").slice(0, 40)
    pq.write_table(table, folder / "pairs.parquet")
    for shard in range(2):
        with tarfile.open(folder / f"pairs-{shard}.tar", "w") as archive:
            for number, row in enumerate(table.slice(20 * shard, 20).to_pylist()):
                for name, content in (("jpg_0.png", row["jpg_0"]), ("jpg_1.png", row["jpg_1"]),
                                      ("label_0.txt", str(row["label_0"]).encode()), ("caption.txt", row["caption"].encode())):
                    entry = tarfile.TarInfo(f"{20 * shard + number:04d}.{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return folder


@pytest.fixture
def recipe(small, tars, tmp_path):
    """A function (name, file of pairs) -> recipe over a cache of its own, NAME beside it."""
    def make(name: str, path: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return small(folder, data={"path": str(tars / path), "validation": None, "cache_dir": str(folder / "cache"),
                                   "encode_batch_size": 4}, evaluate=None)
    return make


def cache(file: Path) -> Cache:
    (manifest,) = (file.parent / "cache" / "sets").glob("*.json")
    return Cache(manifest)


ERRORS = "cache/reference-*/*.arrow"


@pytest.mark.parametrize("kill", [False, True], ids=["through", "killed"])
def test_two_processes_measure_the_reference(recipe, monkeypatch, kill):
    """Twelve files of one process, byte for byte; also where one of the two is killed in the middle, and both run again."""
    monkeypatch.setattr(reference, "BLOCK", BLOCK)
    one, two = (recipe(name, "pairs.parquet") for name in ("one", "two"))
    steps = "train.max_train_steps=12"
    processes = started(2, "encode", two, "--reference", steps)
    assert main(["encode", str(one), "--reference", steps, "train.gradient_accumulation_steps=2"]) == 0
    alone = files(one.parent, ERRORS)
    assert len(alone) == 12
    if kill:
        there = killed(processes, two.parent, ERRORS, 3)
        assert 3 <= len(there) < 12 and there.items() <= alone.items()
        processes = started(2, "encode", two, "--reference", steps)
    said = ended(processes)
    assert files(two.parent, ERRORS) == alone
    measured = 8 * (12 - len(there)) if kill else 96
    assert f"errors of 96 groups ({measured} measured now)" in said[0] and said[1] == ""
