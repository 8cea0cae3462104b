"""Ballots and votes in one SQLite file. A vote that was acknowledged is on disk, once, whatever happens afterwards.

Every change is one transaction with the write-ahead log synced to disk before it returns (``journal_mode=WAL``,
``synchronous=FULL``). A vote belongs to a ballot that was stored before it was shown, and a ballot takes one vote: a browser
that asks again after a lost answer, or after the server was killed and restarted, changes nothing. Nothing is ever deleted; a
vote taken back is marked. ``SELECT * FROM records`` shows everything to a reader with any SQLite tool.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from ..errors import DataError, ResourceError
from ..evaluate.ratings import Vote

APPLICATION = 0x64666C61  # marks the file as ours, for the `file` tool and against a database of something else
VERSION = 1
PATIENCE = 10.0  # seconds to wait for another process that writes

Outcome = Literal["ranked", "all_bad", "skipped"]
OUTCOMES = ("ranked", "all_bad", "skipped")

_SCHEMA = """
CREATE TABLE ballots (
  number   INTEGER PRIMARY KEY AUTOINCREMENT,
  id       TEXT NOT NULL UNIQUE,
  prompt   TEXT NOT NULL,
  models   TEXT NOT NULL,  -- JSON list, in the order shown
  images   TEXT NOT NULL,  -- JSON list of SHA-256, in the order shown
  voter    TEXT NOT NULL,
  criteria TEXT NOT NULL,
  issued   TEXT NOT NULL   -- UTC
);
CREATE TABLE votes (
  number    INTEGER PRIMARY KEY AUTOINCREMENT,
  ballot    TEXT NOT NULL UNIQUE REFERENCES ballots(id),
  outcome   TEXT NOT NULL CHECK (outcome IN ('ranked', 'all_bad', 'skipped')),
  ranks     TEXT CHECK ((ranks IS NULL) = (outcome <> 'ranked')),  -- JSON list, in the order shown, 1 is best, ties equal
  cast_at   TEXT NOT NULL,
  withdrawn TEXT
);
CREATE INDEX ballots_by_voter ON ballots(voter);
CREATE VIEW records AS
  SELECT votes.number, ballots.id AS ballot, prompt, models, images, outcome, ranks, voter, criteria, issued, cast_at,
    withdrawn FROM votes JOIN ballots ON ballots.id = votes.ballot ORDER BY votes.number;
"""


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """models, images (SHA-256): in the order shown. issued: UTC, ISO 8601."""

    id: str
    prompt: str
    models: tuple[str, ...]
    images: tuple[str, ...]
    voter: str
    criteria: str
    issued: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One vote, whole. ranks: in the order shown, 1 is best, equal is a tie; None unless outcome is "ranked"."""

    ballot: Ballot
    outcome: Outcome
    ranks: tuple[int, ...] | None
    cast_at: str

    @property
    def vote(self) -> Vote | None:
        """For the ratings; None for a skipped ballot."""
        if self.outcome == "skipped":
            return None
        return Vote(prompt=self.ballot.prompt, models=self.ballot.models, ranks=self.ranks, voter=self.ballot.voter)


class Refused(Exception):
    """A vote that cannot be taken: (HTTP status, one sentence)."""


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Store:
    """One open database; safe to use from several threads, and beside other processes that use the same file."""

    def __init__(self, path: Path | str):
        """Opens or creates it. Raises DataError when the file is something else, ResourceError when it cannot be written."""
        self.path = Path(path)
        self._lock = threading.RLock()
        with self._said():
            self._db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self._said():
            (application,), (version,) = (self._db.execute(f"PRAGMA {name}").fetchone()
                                          for name in ("application_id", "user_version"))
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and (application != APPLICATION or version != VERSION):
                raise DataError(f"{self.path}: this database is not an arena of this version; name another file")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
        with self._transaction() as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:  # another process may have been first
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={APPLICATION}")
                db.execute(f"PRAGMA user_version={VERSION}")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def issue(self, ballot: Ballot) -> None:
        """Stores a ballot before it is shown; one that is there already stays as it is."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO ballots (id, prompt, models, images, voter, criteria, issued) "
                       "VALUES (?, ?, ?, ?, ?, ?, ?)",
                       (ballot.id, ballot.prompt, json.dumps(ballot.models), json.dumps(ballot.images), ballot.voter,
                        ballot.criteria, ballot.issued))

    def open_ballot(self, voter: str) -> Ballot | None:
        """The newest ballot of this voter without a vote."""
        rows = self._rows("SELECT * FROM ballots WHERE voter = ? AND id NOT IN (SELECT ballot FROM votes) "
                          "ORDER BY number DESC LIMIT 1", (voter,))
        return _ballot(rows[0]) if rows else None

    def cast(self, ballot: str, voter: str, outcome: Outcome, ranks: Sequence[int] | None = None) -> tuple[Ballot, bool]:
        """Takes the vote, durably, before it returns -> (its ballot, whether it is new). ranks: in the order shown.

        The same vote again is acknowledged again and not stored again. Raises Refused for a ballot that is unknown, another
        voter's, or has another vote, and for ranks that are none.
        """
        with self._transaction() as db:
            row = db.execute("SELECT * FROM ballots WHERE id = ? AND voter = ?", (ballot, voter)).fetchone()
            if row is None:
                raise Refused(404, "This ballot is not known. Load the page again.")
            found = _ballot(row)
            ranks = _dense(outcome, ranks, len(found.models))
            before = db.execute("SELECT outcome, ranks FROM votes WHERE ballot = ?", (ballot,)).fetchone()
            if before is None:
                db.execute("INSERT INTO votes (ballot, outcome, ranks, cast_at) VALUES (?, ?, ?, ?)",
                           (ballot, outcome, ranks, now()))
            elif before != (outcome, ranks):
                raise Refused(409, "This ballot has a vote already. Load the page again.")
        return found, before is None

    def withdraw(self, ballot: str, voter: str) -> Ballot:
        """Takes a vote back and stores the same pictures as a new ballot, which is returned. Again: changes nothing more."""
        with self._transaction() as db:
            row = db.execute("SELECT ballots.* FROM ballots JOIN votes ON votes.ballot = ballots.id "
                             "WHERE ballots.id = ? AND voter = ?", (ballot, voter)).fetchone()
            if row is None:
                raise Refused(404, "There is no such vote to take back.")
            old = _ballot(row)
            db.execute("UPDATE votes SET withdrawn = ? WHERE ballot = ? AND withdrawn IS NULL", (now(), ballot))
            again = Ballot(id=f"{ballot[:32]}-{row[0]}", prompt=old.prompt, models=old.models, images=old.images, voter=voter,
                           criteria=old.criteria, issued=now())
            self.issue(again)
        return again

    def records(self) -> list[Record]:
        """All votes that were not taken back, in the order they came."""
        rows = self._rows("SELECT ballots.*, outcome, ranks, cast_at FROM votes JOIN ballots ON ballots.id = votes.ballot "
                          "WHERE withdrawn IS NULL ORDER BY votes.number")
        return [Record(ballot=_ballot(row[:8]), outcome=row[8], ranks=tuple(json.loads(row[9])) if row[9] else None,
                       cast_at=row[10]) for row in rows]

    def last_vote(self, voter: str) -> str | None:
        """The ballot of the voter's newest vote that was not taken back."""
        rows = self._rows("SELECT ballot FROM votes JOIN ballots ON ballots.id = ballot WHERE voter = ? AND withdrawn IS NULL "
                          "ORDER BY votes.number DESC LIMIT 1", (voter,))
        return rows[0][0] if rows else None

    def issued(self) -> int:
        """Ballots so far."""
        return self._rows("SELECT count(*) FROM ballots")[0][0]

    def state(self) -> tuple[int, int]:
        """Changes whenever the votes do."""
        return self._rows("SELECT count(*), count(withdrawn) FROM votes")[0]

    def _rows(self, query: str, values: tuple = ()) -> list[tuple]:
        with self._lock, self._said():
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it on disk, or nothing; inside another one, a part of that."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            with self._said():
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        """SQLite's errors as one sentence that names the file."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise ResourceError(f"{self.path}: the votes' database cannot be used ({error}); check the folder and the free "
                                "space on its disk") from None
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: no database of votes ({error}); name another file") from None


def new_id() -> str:
    return secrets.token_hex(16)


def _ballot(row: tuple) -> Ballot:
    return Ballot(id=row[1], prompt=row[2], models=tuple(json.loads(row[3])), images=tuple(json.loads(row[4])), voter=row[5],
                  criteria=row[6], issued=row[7])


def _dense(outcome: str, ranks: Sequence[int] | None, count: int) -> str | None:
    """The ranks as stored: 1, 2, ... without a gap, as JSON."""
    if outcome not in OUTCOMES:
        raise Refused(400, f"The outcome must be one of {', '.join(OUTCOMES)}.")
    if outcome != "ranked":
        if ranks is not None:
            raise Refused(400, "Only a ranked ballot has ranks.")
        return None
    if not isinstance(ranks, (list, tuple)) or len(ranks) != count or not all(
            isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= count for rank in ranks):
        raise Refused(400, f"{count} ranks from 1 to {count} are needed.")
    order = sorted(set(ranks))
    return json.dumps([order.index(rank) + 1 for rank in ranks])
