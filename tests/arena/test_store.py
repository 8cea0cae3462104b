"""Nothing acknowledged is lost, nothing is counted twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffalign.arena.server import _stopped
from diffalign.arena.store import Ballot, Refused, Store
from diffalign.errors import DataError, ResourceError

from .toy import Client, gallery

SERVER = """
import sys
from diffalign.arena import ArenaSpec, serve
serve(ArenaSpec(gallery=sys.argv[1], port=0), lambda text: print(text, flush=True))
"""


def ballot(number: int = 0, voter: str = "ana", k: int = 3) -> Ballot:
    return Ballot(
        id=f"{number:032x}",
        prompt=f"prompt {number}",
        models=tuple("abcdefghi"[:k]),
        images=tuple(f"{i:064x}" for i in range(k)),
        voter=voter,
        criteria="c",
        issued="2026-01-01T00:00:00.000+00:00",
    )


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "arena.sqlite") as store:
        store.issue(ballot())
        yield store


def test_a_vote_is_whole(store):
    found, new = store.cast(ballot().id, "ana", "ranked", [2, 1, 2])
    assert new and found == ballot()
    (record,) = store.records()
    assert record.ballot == ballot() and record.ranks == (2, 1, 2) and record.outcome == "ranked"
    assert (record.vote.models, record.vote.ranks, record.vote.voter) == (("a", "b", "c"), (2, 1, 2), "ana")
    row = (
        sqlite3.connect(store.path)
        .execute("SELECT ballot, prompt, models, images, outcome, ranks, voter FROM records")
        .fetchone()
    )
    assert (
        row[:2] == (ballot().id, "prompt 0")
        and json.loads(row[2]) == ["a", "b", "c"]
        and row[4:] == ("ranked", "[2, 1, 2]", "ana")
    )


def test_a_retry_changes_nothing(store):
    for expected in (True, False, False):
        assert store.cast(ballot().id, "ana", "ranked", [1, 3, 3])[1] is expected
    assert [r.ranks for r in store.records()] == [(1, 2, 2)]  # kept without the gap
    with pytest.raises(Refused) as refusal:
        store.cast(ballot().id, "ana", "all_bad")
    assert refusal.value.args[0] == 409 and len(store.records()) == 1


@pytest.mark.parametrize(
    ("outcome", "ranks", "status"),
    [
        ("ranked", None, 400),
        ("ranked", [1, 2], 400),
        ("ranked", [0, 1, 2], 400),
        ("ranked", [1, 2, 4], 400),
        ("ranked", [1, 2, True], 400),
        ("ranked", [1, 2, "3"], 400),
        ("ranked", {"a": 1}, 400),
        ("ranked", [1, 2, 10**30], 400),
        ("all_bad", [1, 2, 3], 400),
        ("won", [1, 2, 3], 400),
        (None, None, 400),
        (["ranked"], None, 400),
    ],
)
def test_votes_that_are_none(store, outcome, ranks, status):
    with pytest.raises(Refused) as refusal:
        store.cast(ballot().id, "ana", outcome, ranks)
    assert refusal.value.args[0] == status and store.records() == []


def test_ballots_belong_to_their_voter(store):
    for name, voter in ((ballot().id, "bob"), ("f" * 32, "ana")):
        with pytest.raises(Refused) as refusal:
            store.cast(name, voter, "skipped")
        assert refusal.value.args[0] == 404
    store.issue(ballot(1, "bob"))
    assert (
        store.open_ballot("ana") == ballot()
        and store.open_ballot("bob") == ballot(1, "bob")
        and store.open_ballot("eve") is None
    )


def test_a_vote_taken_back_is_marked_and_comes_again(store):
    store.cast(ballot().id, "ana", "ranked", [1, 2, 3])
    again, same = store.withdraw(ballot().id, "ana"), store.withdraw(ballot().id, "ana")
    assert again.id == same.id != ballot().id and (again.models, again.images) == (ballot().models, ballot().images)
    assert store.records() == [] and store.open_ballot("ana").id == again.id and store.last_vote("ana") is None
    store.cast(again.id, "ana", "all_bad")
    assert [r.outcome for r in store.records()] == ["all_bad"] and store.last_vote("ana") == again.id
    assert store.withdraw(ballot().id, "ana").id == again.id and len(store.records()) == 1  # a late retry of the first undo
    assert sqlite3.connect(store.path).execute("SELECT count(*) FROM records").fetchone() == (2,)
    with pytest.raises(Refused):
        store.withdraw(again.id, "bob")


def test_settings_of_the_database(store):
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_databases_that_are_none(tmp_path):
    (tmp_path / "text").write_text("no database at all, but long enough to look at" * 40)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    for name, error in (("text", DataError), ("other", DataError), ("", ResourceError), ("none/arena.sqlite", ResourceError)):
        with pytest.raises(error, match=str(tmp_path)):
            Store(tmp_path / name)
    assert other.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)


def test_a_failed_vote_is_not_there(store):
    """A full disk: the size limit of the database stands for it. The vote is refused whole; the next fits again."""
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ResourceError, match="full"):
        for number in range(1, 2000):
            store.issue(ballot(number))
    count = store.issued()
    store._db.execute("PRAGMA max_page_count=1000000")
    store.issue(ballot(5000))
    assert store.issued() == count + 1


def test_many_threads_and_two_stores(tmp_path):
    stores = [Store(tmp_path / "a.sqlite") for _ in range(2)]
    for number in range(40):
        stores[0].issue(ballot(number))

    def work(store):
        for number in range(40):
            store.cast(ballot(number).id, "ana", "ranked", [1, 2, 3])

    threads = [threading.Thread(target=work, args=(stores[i % 2],)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(stores[1].records()) == 40
    [store.close() for store in stores]


class Started:
    """The server in a process of its own."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self.lines = [self.process.stdout.readline() for _ in range(2)]
        assert "vote at http" in self.lines[1], self.process.stderr.read()
        self.address = self.lines[1].split()[2]

    def end(self, number: int) -> int:
        os.kill(self.process.pid, number)
        code = self.process.wait(20)
        self.rest = self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def test_kill_9_during_rapid_voting_loses_nothing(tmp_path):
    """Two kills in full flight, then a polite end; every answered vote is there once, and asking again doubles none."""
    folder = gallery(tmp_path / "g", models=8, prompts=40, size=8)
    acknowledged, asked = {}, {}  # ballot -> ranks

    def vote(client: Client, until: threading.Event) -> None:
        try:
            shown = client.start()
            while not until.is_set() and shown["ballot"]:
                ballot = shown["ballot"]
                ranks = [1, 2, 3, 4] if len(asked) % 2 else [2, 1, 1, 3]
                asked[ballot["id"]] = ranks, client
                status, told = client.vote(ballot, ranks=ranks)
                assert status == 200, told
                acknowledged[ballot["id"]] = ranks
                shown = told["next"]
        except (OSError, EOFError, ValueError):
            return  # the server is dead, in the middle of this

    clients, sure = [Client("") for _ in range(3)], 0
    for life in range(3):
        server, done = Started(folder), threading.Event()
        for client in clients:
            client.host = server.address.removeprefix("http://")
        for name in [name for name in asked if name not in acknowledged]:  # the browser asks again
            ranks, client = asked[name]
            status, told = client.vote({"id": name, "pictures": ranks}, ranks=ranks)
            assert status == 200, told
            acknowledged[name] = ranks
        threads = [threading.Thread(target=vote, args=(client, done)) for client in clients]
        [thread.start() for thread in threads]
        until = time.monotonic() + 20
        while len(acknowledged) < sure + 10 + 7 * life and time.monotonic() < until:
            time.sleep(0.003)
        number = signal.SIGKILL if life < 2 else signal.SIGTERM
        assert server.end(number) == (-signal.SIGKILL if life < 2 else 0)
        done.set()
        [thread.join() for thread in threads]
        sure = len(acknowledged)
    assert sure >= 30 and "votes are kept" in server.rest
    assert sorted(p.name for p in folder.iterdir()) == ["arena.sqlite", "gallery.jsonl", "pictures"]  # no journal is left
    with Store(folder / "arena.sqlite") as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        records = store.records()
    stored = {record.ballot.id: list(record.ranks) for record in records}
    assert len(stored) == len(records)
    assert {name: stored.get(name) for name in acknowledged} == acknowledged
    assert set(stored) <= set(asked)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_signals_stop_and_are_given_back(number):
    before = signal.getsignal(number)
    with _stopped() as stop:
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) is before
