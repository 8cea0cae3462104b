"""``encode`` by command: several gloo processes, tables and tars, killed and run again: always the same records."""

import io
import shutil
import tarfile
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from diffalign.cli import main
from diffalign.data import store
from diffalign.data.cache import Cache
from diffalign.run import reference

from .. import ranks
from .conftest import DATA

LIMIT = 280  # seconds, on a machine that others use too
STEPS, BLOCK = 6, 8  # of the run; groups of a step of two processes, and of a file of the reference's errors
MANIFEST, ERRORS = "cache/sets/[0-9a-f]*.json", "cache/reference-*/*.arrow"


def in_small_files(words: list[str]) -> int:
    """The command; many small files, so that there is a middle to be killed in."""
    reference.BLOCK, store.SHARD_BYTES = BLOCK, 1
    return main(words)


def ended(folder: Path, size: int, *words) -> list[str]:
    """What each rank of ``diffalign WORDS`` has printed, when all have done their work. folder: a new one for its files."""
    folder.mkdir()
    return ranks.together(in_small_files, [*map(str, words)], folder=folder, world=size, limit=LIMIT)


def killed(own: Path, size: int, *words, folder: Path, pattern: str, count: int) -> dict[str, bytes]:
    """SIGKILL for the last rank as soon as so many files are there, then for the others, as a launcher does. The files."""
    own.mkdir()
    processes = [ranks.start(in_small_files, [*map(str, words)], said=own / f"{rank}.txt",
                             before=partial(ranks.join, own, rank, size)) for rank in range(size)]
    deadline = time.monotonic() + LIMIT
    try:
        while len(list(folder.glob(pattern))) < count:
            assert time.monotonic() < deadline and any(process.is_alive() for process in processes)
            time.sleep(0.002)
        processes[-1].kill()
        time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return files(folder, pattern)


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same number in every process: a matrix product rounds otherwise with another. Accelerate divides the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twenty of the embedded pairs in two tar shards, and in a table."""
    folder = tmp_path_factory.mktemp("pairs")
    table = pq.read_table(DATA / "train.parquet").slice(0, 20)
    pq.write_table(table, folder / "pairs.parquet")
    for shard in range(2):
        with tarfile.open(folder / f"pairs-{shard}.tar", "w") as archive:
            for number, row in enumerate(table.slice(10 * shard, 10).to_pylist()):
                for name, content in (("jpg_0.png", row["jpg_0"]), ("jpg_1.png", row["jpg_1"]),
                                      ("label_0.txt", str(row["label_0"]).encode()), ("caption.txt", row["caption"].encode())):
                    entry = tarfile.TarInfo(f"{10 * shard + number:04d}.{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def recipe(small, data, tmp_path_factory):
    """A function (name, pairs) -> recipe over a cache of its own, in a folder of that name."""
    def make(name: str, pairs: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return small(folder, data={"path": str(data / pairs), "validation": None, "cache_dir": str(folder / "cache"),
                                   "encode_batch_size": 4}, evaluate=None, train={"max_train_steps": STEPS})
    return make


@pytest.fixture(scope="module")
def alone(recipe) -> Path:
    """What one process makes of the table: latents, embeddings and the reference's errors."""
    file = recipe("alone", "pairs.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", BLOCK)
        assert main(["encode", str(file), "--reference", "train.gradient_accumulation_steps=2"]) == 0
    return file.parent


def records(folder: Path) -> list:
    """All that training reads of the cache in the folder."""
    (manifest,) = folder.glob(MANIFEST)
    cache = Cache(manifest)
    return [(group.row, group.utility, cache.prompt(group.prompt), [x.tobytes() for x in cache.text(group.prompt)],
             [x.tobytes() for image in group.images for x in cache.latent(image)]) for group in cache.groups]


def test_two_processes_measure_the_reference(recipe, alone):
    """The numbers of one process to the last bit: latents, embeddings, and the files of the errors, byte for byte."""
    file = recipe("two", "pairs.parquet")
    said = ended(file.parent / "ranks", 2, "encode", file, "--reference")
    assert "18 groups of 20 rows" in said[0] and "errors of 48 groups (48 measured now)" in said[0] and said[1] == ""
    assert records(file.parent) == records(alone)
    assert files(file.parent, ERRORS) == files(alone, ERRORS) and len(files(alone, ERRORS)) == STEPS


@pytest.mark.slow
def test_one_of_two_is_killed_while_they_measure(recipe, alone):
    file = recipe("killed", "pairs.parquet")
    shutil.copytree(alone / "cache", file.parent / "cache", ignore=shutil.ignore_patterns("reference-*"))
    whole = files(alone, ERRORS)
    there = killed(file.parent / "first", 2, "encode", file, "--reference", folder=file.parent, pattern=ERRORS, count=1)
    assert 1 <= len(there) < STEPS and there.items() <= whole.items()
    said = ended(file.parent / "ranks", 2, "encode", file, "--reference")
    assert f"errors of 48 groups ({48 - BLOCK * len(there)} measured now)" in said[0]
    assert files(file.parent, ERRORS) == whole


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_tars_killed_and_read_again(recipe, alone, size):
    """The records of the table, whatever the number of processes, one of which is killed in the middle."""
    file = recipe(f"tars{size}", "pairs-{0..1}.tar")
    shards = "cache/latents-*/*.arrow"
    there = killed(file.parent / "first", size, "encode", file, folder=file.parent, pattern=shards, count=2)
    assert 2 <= len(there) < 9 and not list(file.parent.glob(MANIFEST))
    said = ended(file.parent / "ranks", size, "encode", file)
    assert "18 groups of 20 rows, 36 pictures" in said[0] and said[1:] == [""] * (size - 1)
    assert records(file.parent) == records(alone) and there.items() <= files(file.parent, shards).items()
