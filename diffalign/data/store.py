"""Tensors by content key, in Arrow files that nobody can half-write.

A shard is one Arrow IPC file, memory-mapped, read without copying. Its name holds its own size and SHA-256, so a shard says
by itself whether it is whole; it is written aside, flushed to the disk and renamed, so two processes that build the same
store at once at worst do the same work twice. Sizes are checked at every opening, hashes too while the shards are below
256 MiB, and every record carries a CRC-32 that is checked when a process first reads it. A shard that fails is renamed to
``.corrupt`` and reported: its records are then missing, and encoded again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import sys
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa

from ..errors import DataError, ResourceError

if TYPE_CHECKING:
    from .ledger import Ledger

SHARD_BYTES = 32 << 20
SHARD_RECORDS = 4096  # so that a shard which waits to be written takes about its own bytes, however small its records
FULL_CHECK_BYTES = 256 << 20  # hashed in a fraction of a second: the time of opening must not grow with the data
OPEN_SHARDS = 256  # each holds a file handle
_hashed: set[tuple[str, int, int]] = set()  # files this process has hashed, as (path, size, time of change)
STALE_SECONDS = 3600


def publish(table: pa.Table, folder: Path, prefix: str = "") -> Path:
    """Write ``table`` as one record batch, named after its content. Raises ResourceError when the disk is full."""
    return publish_batches(table.schema, table.combine_chunks().to_batches(), folder, prefix)


def publish_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch], folder: Path, prefix: str = "") -> Path:
    """The same of a table that need not fit into memory: one batch after the other."""
    def fill(file: BinaryIO) -> None:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    def named(aside: Path) -> Path:
        return folder / f"{prefix}{sha256(aside).hexdigest()[:32]}-{aside.stat().st_size}.arrow"
    return _write(folder, fill, named, "the cache", "set data.cache_dir to another disk")


def write_aside(path: Path, content, what: str = "the cache", where_else: str = "set data.cache_dir to another disk") -> None:
    """Temporary name, fsync, rename, fsync of the folder: under its final name a file is whole or absent.

    content: bytes or a buffer, or an iterator of them. Raises ResourceError; what, where_else: how it calls what could not
    be written, and the other way out.
    """
    parts = content if isinstance(content, Iterator) else [content]
    _write(path.parent, lambda file: file.writelines(parts), lambda aside: path, what, where_else)


def _write(folder: Path, fill: Callable[[BinaryIO], None], named: Callable[[Path], Path], what: str, where_else: str) -> Path:
    """fill: writes the file. named: its final name, when it is written."""
    aside = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        with aside.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        path = named(aside)
        os.replace(aside, path)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot write {what} ({error.strerror or error}); free some space "
                            f"or {where_else}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def intact(path: Path, full: bool = True) -> bool:
    """Whether a published file is there with the size, and if ``full`` the hash, that its name says."""
    try:
        digest, size = path.stem.split("-")[-2:]
        found = path.stat()
        seen = (str(path), found.st_size, found.st_mtime_ns)
        if found.st_size != int(size):
            return False
        if full and seen not in _hashed:
            if sha256(path).hexdigest()[:32] != digest:
                return False
            _hashed.add(seen)
        return True
    except (OSError, ValueError):
        return False


def sha256(path: Path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
    return digest


def read_table(path: Path) -> pa.Table:
    """A published table, memory-mapped. Raises DataError when it is damaged."""
    if not intact(path):
        raise DataError(f"{path}: this cache file is missing or damaged; run the same command again to build it anew")
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # another process has just set it aside
        return 0


class Shards:
    """Records of some shards, by their places (shard, row). names: of the shards, in the order in which places count them."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.paths = [folder / name for name in names]
        self._checked: dict[int, np.ndarray] = {}
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open)

    def damaged(self) -> list[str]:
        """Names of the shards that are gone or not whole; a flipped bit is seen here while all are below 256 MiB, else when
        its record is read."""
        full = sum(map(_size, self.paths)) <= FULL_CHECK_BYTES
        return [path.name for path in self.paths if not intact(path, full)]

    def read(self, shard: int, row: int) -> dict[str, np.ndarray]:
        """The record's tensors as read-only views of the mapped file. Raises DataError naming a damaged shard."""
        arrays = self._open(shard)
        checked = self._checked.setdefault(shard, np.zeros(len(arrays["key"]), dtype=bool))
        record = {name: array[row] for name, array in arrays.items() if name not in ("key", "crc")}
        if not checked[row]:
            if _crc(arrays["key"][row].tobytes(), record) != arrays["crc"][row]:
                _set_aside(self.paths[shard])
                raise DataError(f"{self.paths[shard]}: this part of the cache is damaged and has been set aside; "
                                "run the same command again, only this part is encoded anew")
            checked[row] = True
        return record

    def _open(self, number: int) -> dict[str, np.ndarray]:
        return _open_shard(self.paths[number])


class Store:
    """All records of one kind ("latent" or "text") of one encoder identity; the ledger knows where each lies.

    names: of the whole shards. corrupt: names of those found damaged, which are set aside.
    """

    def __init__(self, folder: Path, kind: str, ledger: Ledger):
        self.folder, self.kind, self.ledger, self.names, self.corrupt = folder, kind, ledger, [], []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{folder}: cannot make the cache folder ({error.strerror}); set data.cache_dir") from None
        sweep(folder)
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that were written since, by whomever."""
        known = set(self.names)
        fresh = [path for path in sorted(self.folder.glob("*.arrow")) if path.name not in known]
        full = sum(map(_size, fresh)) <= FULL_CHECK_BYTES
        for path in fresh:
            if intact(path, full):
                self.ledger.store(self.kind, len(self.names), _open_shard(path)["key"])
                self.names.append(path.name)
            else:
                self.corrupt.append(path.name)
                _set_aside(path)


class Writer:
    """Collects records and publishes them in shards of about 32 MiB or some 4096 records, one tensor shape a shard.

    multiple: shards hold a multiple of this many records (the encoding batch), so that a build which was killed goes on
    with the same batches, hence the same bytes, as one that was not.
    """

    def __init__(self, store: Store, *, multiple: int, shard_bytes: int | None = None):
        self.store, self.multiple, self.shard_bytes = store, multiple, shard_bytes or SHARD_BYTES
        self._waiting: dict[tuple, _Waiting] = {}

    def add(self, key: bytes, record: dict[str, np.ndarray]) -> None:
        shape = tuple((name, array.shape, array.dtype.str) for name, array in record.items())
        waiting = self._waiting.setdefault(shape, _Waiting())
        waiting.add(key, record)
        size = sum(array.nbytes for array in record.values())
        if waiting.count >= max(1, min(self.shard_bytes // size, SHARD_RECORDS) // self.multiple) * self.multiple:
            self._flush(shape)

    def close(self) -> None:
        for shape in list(self._waiting):
            self._flush(shape)
        self.store.refresh()

    def _flush(self, shape: tuple) -> None:
        publish(self._waiting.pop(shape).table(shape), self.store.folder)


class _Waiting:
    """Records of one shape, as the bytes that their columns will have: an array object for each would take more than a small
    record itself, and the table needs no second copy of them."""

    def __init__(self):
        self.count, self._columns = 0, defaultdict(bytearray)

    def add(self, key: bytes, record: dict[str, np.ndarray]) -> None:
        self.count += 1
        self._columns["key"] += key
        self._columns["crc"] += _crc(key, record).to_bytes(4, sys.byteorder)
        for name, array in record.items():
            self._columns[name] += array.tobytes()

    def table(self, shape: tuple) -> pa.Table:
        """shape: (name, shape, dtype) of a record's tensors."""
        columns = [pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), self.count, [None, pa.py_buffer(self._columns["key"])]),
                   pa.array(np.frombuffer(self._columns["crc"], np.uint32))]
        fields = [pa.field(name, array.type) for name, array in zip(("key", "crc"), columns)]
        for name, sides, dtype in shape:
            flat = np.frombuffer(self._columns[name], dtype)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), math.prod(sides)))
            fields.append(pa.field(name, columns[-1].type, metadata={"shape": ",".join(map(str, sides))}))
        return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _open_shard(path: Path) -> dict[str, np.ndarray]:
    with pa.memory_map(str(path)) as source:
        return _arrays(pa.ipc.open_file(source).get_batch(0))


def _set_aside(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.replace(path, path.with_suffix(".corrupt"))


def _arrays(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Views of the mapped buffers; they keep the mapping alive."""
    arrays = {"key": np.frombuffer(batch["key"].buffers()[1], dtype=np.uint8).reshape(-1, 32)[:len(batch)]}
    for field in batch.schema:
        column = batch[field.name]
        if field.name == "crc":
            arrays["crc"] = column.to_numpy()
        elif field.name != "key":
            shape = [int(side) for side in field.metadata[b"shape"].split(b",")]
            arrays[field.name] = column.values.to_numpy().reshape(len(batch), *shape)
    return arrays


def _crc(key: bytes, record: dict[str, np.ndarray]) -> int:
    value = zlib.crc32(key)
    for name in sorted(record):
        value = zlib.crc32(np.ascontiguousarray(record[name]).view(np.uint8).reshape(-1), value)
    return value


def sweep(folder: Path, prefix: str = ".tmp-") -> None:
    """Remove what killed processes left behind: what is younger than an hour, or locked, may belong to one that lives."""
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS and not _locked(path):
                path.unlink()


def lock(path: Path) -> BinaryIO:
    """Makes the file if need be, and keeps ``sweep`` off it while what is returned is open. Where the disk knows no locks, as
    some network disks, its age alone does. Raises OSError."""
    file = path.open("ab")
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _locked(path: Path) -> bool:
    with path.open("rb") as file, contextlib.suppress(OSError):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
