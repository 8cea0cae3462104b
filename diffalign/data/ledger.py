"""What a build has seen so far, in a SQLite file: memory does not grow with the rows.

A scratch file of one process beside the sets, removed at the end, swept away after a kill, never read again: nothing rests
on its safety, so it has no journal, none of SQLite's locks (network disks may have none) and is not flushed. Ids begin at 1
and follow the first appearance.
"""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from ..errors import ResourceError
from .cache import Group
from .store import lock

CACHE_KIB = 1 << 10  # of SQLite's pages in memory; the system's own cache of the file makes up for a small one
_SETUP = """
    PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA temp_store=FILE;
    -- records by key; shard is NULL while one is only queued
    CREATE TABLE latent (key BLOB PRIMARY KEY, shard INTEGER, at INTEGER) WITHOUT ROWID;
    CREATE TABLE text (key BLOB PRIMARY KEY, shard INTEGER, at INTEGER) WITHOUT ROWID;
    CREATE TABLE picture (id INTEGER PRIMARY KEY, keys BLOB UNIQUE, height, width, top, left, left_flipped);
    CREATE TABLE prompt (id INTEGER PRIMARY KEY, content TEXT UNIQUE, key BLOB);
    CREATE TABLE grouped (id INTEGER PRIMARY KEY, row INTEGER, prompt INTEGER, bucket INTEGER, soft REAL, name TEXT);
    CREATE INDEX by_bucket ON grouped (bucket);
    CREATE TABLE member (owner INTEGER, place INTEGER, picture INTEGER, utility REAL, PRIMARY KEY (owner, place))
        WITHOUT ROWID;
    CREATE TABLE file (id INTEGER PRIMARY KEY, path BLOB UNIQUE, size INTEGER, changed INTEGER);
    CREATE TABLE look (path BLOB PRIMARY KEY, size INTEGER, changed INTEGER, digest BLOB, height INTEGER, width INTEGER,
                       problem TEXT) WITHOUT ROWID;
    CREATE TABLE lost_picture (id INTEGER PRIMARY KEY);
    CREATE TABLE lost_prompt (id INTEGER PRIMARY KEY);
    -- what the groups that are left use, numbered by first use
    CREATE TABLE used_picture (id INTEGER PRIMARY KEY, picture INTEGER UNIQUE);
    CREATE TABLE used_prompt (id INTEGER PRIMARY KEY, prompt INTEGER UNIQUE);
    BEGIN;
"""


class Ledger:
    """Use it as a context. Raises ResourceError when the disk is full."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / f".tmp-{uuid.uuid4().hex}"

    def __enter__(self) -> Ledger:
        try:
            self._lock = lock(self._path)
        except OSError as error:
            raise self._full(error) from None
        try:
            self._db = sqlite3.connect(f"{self._path.resolve().as_uri()}?nolock=1", uri=True, isolation_level=None)
            self._db.executescript(f"PRAGMA cache_size=-{CACHE_KIB};{_SETUP}")
        except sqlite3.Error as error:
            self._leave()
            raise self._full(error) from None
        return self

    def __exit__(self, *_) -> None:
        self._db.close()
        self._leave()

    def _leave(self) -> None:
        self._path.unlink(missing_ok=True)
        self._lock.close()

    def _run(self, statement: str, values: Sequence = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise self._full(error) from None

    def _full(self, error: sqlite3.Error | OSError) -> ResourceError:
        return ResourceError(f"{self._folder}: cannot write the cache ({error}); free some space or set data.cache_dir to "
                             "another disk")

    def _one(self, statement: str, *values):
        return self._run(statement, values).fetchone()

    # Records, "latent" or "text".

    def store(self, kind: str, shard: int, keys: np.ndarray) -> None:
        """keys: [N, 32] uint8 of a shard. Of a record that lies in two shards, the first counts."""
        rows = ((key.tobytes(), shard, at) for at, key in enumerate(keys))
        try:
            self._db.executemany(f"INSERT INTO {kind} VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET shard = excluded.shard, "
                                 "at = excluded.at WHERE shard IS NULL", rows)
        except sqlite3.OperationalError as error:
            raise self._full(error) from None

    def queue(self, kind: str, key: bytes) -> bool:
        """Whether the key is new; it is then known from now on."""
        return self._run(f"INSERT OR IGNORE INTO {kind} (key) VALUES (?)", (key,)).rowcount > 0

    def knows(self, kind: str, key: bytes) -> bool:
        """Whether the record is stored or queued."""
        return self._one(f"SELECT 1 FROM {kind} WHERE key = ?", key) is not None

    def place(self, kind: str, key: bytes) -> tuple[int, int] | None:
        """(shard, row), or None for a record that is in no shard."""
        return self._one(f"SELECT shard, at FROM {kind} WHERE key = ? AND shard IS NOT NULL", key)

    # The scan.

    def file(self, path: Path, stat: tuple[int, int]) -> None:
        self._run("INSERT OR IGNORE INTO file (path, size, changed) VALUES (?, ?, ?)", (os.fsencode(path), *stat))

    def files(self) -> Iterator[tuple[bytes, int, int]]:
        return self._run("SELECT path, size, changed FROM file ORDER BY id")

    def look(self, path: str) -> tuple | None:
        """(size, changed, digest, height, width, problem) of a picture file; see ``encoding._Look``."""
        return self._one("SELECT size, changed, digest, height, width, problem FROM look WHERE path = ?", os.fsencode(path))

    def add_look(self, path: str, *values) -> None:
        """values: as ``look`` gives them."""
        *values, problem = values
        self._run("INSERT OR IGNORE INTO look VALUES (?, ?, ?, ?, ?, ?, ?)", (os.fsencode(path), *values, _valid(problem)))

    def looks(self) -> Iterator[tuple]:
        return self._run("SELECT * FROM look")

    def add(self, row: int, prompt: str, prompt_key: bytes, bucket: int, soft: float | None, name: str,
            pictures: Sequence[tuple[bytes, tuple[int, ...]]], utility: Sequence[float]) -> None:
        """A group. pictures: of each candidate its keys, joined, and the numbers of ``Cache.size``. name: for messages."""
        text = self._id("prompt", "content", prompt, prompt_key)
        soft = None if soft is None else float(np.float32(soft))
        owner = self._run("INSERT INTO grouped (row, prompt, bucket, soft, name) VALUES (?, ?, ?, ?, ?)",
                          (row, text, bucket, soft, _valid(name))).lastrowid
        for place, ((keys, sizes), value) in enumerate(zip(pictures, utility, strict=True)):
            picture = self._id("picture", "keys", keys, *sizes)
            self._run("INSERT INTO member VALUES (?, ?, ?, ?)", (owner, place, picture, value))

    def _id(self, table: str, column: str, *values) -> int:
        """Of the row whose ``column`` is the first value; a new one where there is none."""
        found = self._one(f"SELECT id FROM {table} WHERE {column} = ?", values[0])
        if found is not None:
            return found[0]
        return self._run(f"INSERT INTO {table} VALUES (NULL{', ?' * len(values)})", values).lastrowid

    # The end: what is lost, what is left.

    def pictures(self) -> Iterator[tuple[int, bytes]]:
        """(id, keys) of all."""
        return self._run("SELECT id, keys FROM picture")

    def prompts(self) -> Iterator[tuple[int, bytes]]:
        """(id, key) of all."""
        return self._run("SELECT id, key FROM prompt")

    def lose(self, table: str, number: int) -> None:
        """Groups with this "picture" or "prompt" are lost."""
        self._run(f"INSERT INTO lost_{table} VALUES (?)", (number,))

    def lost(self) -> list[tuple[int, str]]:
        """(id, name) of the lost groups, in file order."""
        return self._run("""
            SELECT id, name FROM grouped WHERE prompt IN (SELECT id FROM lost_prompt) OR id IN
                (SELECT owner FROM member WHERE picture IN (SELECT id FROM lost_picture)) ORDER BY id""").fetchall()

    def lost_keys(self, owner: int) -> list[bytes]:
        """Of a lost group: the joined keys of its lost pictures, then the key of its prompt if that is lost."""
        return [key for (key,) in self._run("""
            SELECT keys FROM member CROSS JOIN picture ON picture.id = picture
            WHERE owner = ?1 AND picture IN (SELECT id FROM lost_picture)
            UNION ALL SELECT key FROM grouped CROSS JOIN prompt ON prompt.id = prompt
            WHERE grouped.id = ?1 AND prompt IN (SELECT id FROM lost_prompt)""", (owner,))]

    def drop(self, owner: int) -> None:
        self._run("DELETE FROM grouped WHERE id = ?", (owner,))
        self._run("DELETE FROM member WHERE owner = ?", (owner,))

    def number(self) -> None:
        """Numbers what the groups that are left use, in file order, so that the tables don't depend on what was dropped."""
        self._run("INSERT OR IGNORE INTO used_picture (picture) SELECT picture FROM member ORDER BY owner, place")
        self._run("INSERT OR IGNORE INTO used_prompt (prompt) SELECT prompt FROM grouped ORDER BY id")

    def count(self, table: str) -> int:
        return self._one(f"SELECT count(*) FROM {table}")[0]

    def sizes(self, buckets: int) -> list[int]:
        """How many groups each bucket has."""
        return [self._one("SELECT count(*) FROM grouped WHERE bucket = ?", bucket)[0] for bucket in range(buckets)]

    def largest(self) -> int:
        """Candidates of the largest group."""
        return self._one("SELECT max(place) + 1 FROM member")[0]

    def soft(self) -> bool:
        """Whether any group has a soft label."""
        return self._one("SELECT 1 FROM grouped WHERE soft IS NOT NULL LIMIT 1") is not None

    def groups(self, bucket: int | None = None) -> Iterator[Group]:
        """In file order, with the numbers of ``number``, from 0; of one bucket, or of all."""
        rows = self._run(f"""
            SELECT grouped.id, row, bucket, used_prompt.id - 1, soft, used_picture.id - 1, utility
            FROM grouped CROSS JOIN used_prompt ON used_prompt.prompt = grouped.prompt CROSS JOIN member ON owner = grouped.id
                 CROSS JOIN used_picture ON used_picture.picture = member.picture
            {"" if bucket is None else "WHERE bucket = ?"} ORDER BY grouped.id, place""", () if bucket is None else (bucket,))
        for _, members in groupby(rows, itemgetter(0)):
            (_, row, place, prompt, soft, *_), *_ = members = list(members)
            yield Group(row=row, bucket=place, prompt=prompt, images=tuple(member[5] for member in members),
                        utility=tuple(member[6] for member in members), soft=soft)

    def used_pictures(self) -> Iterator[tuple]:
        """(keys, and the five numbers of ``Cache.size``) by number."""
        return self._run("SELECT keys, height, width, top, left, left_flipped FROM used_picture CROSS JOIN picture "
                         "ON picture.id = picture ORDER BY used_picture.id")

    def used_prompts(self) -> Iterator[tuple[str, bytes]]:
        """(text, key) by number."""
        return self._run("SELECT content, key FROM used_prompt CROSS JOIN prompt ON prompt.id = prompt "
                         "ORDER BY used_prompt.id")


def _valid(text: str | None) -> str | None:
    """What SQLite takes: the name of a file may hold bytes that are no Unicode."""
    return text and text.encode(errors="backslashreplace").decode()
