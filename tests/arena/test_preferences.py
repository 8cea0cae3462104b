"""Votes come back as the data a trainer reads."""

from __future__ import annotations

import hashlib
import json

import pytest

from diffalign.arena import ArenaSpec, Store, export, read_gallery
from diffalign.arena.ballots import Ballots
from diffalign.arena.store import Ballot
from diffalign.data import DataSpec, read_rows
from diffalign.data.columns import Tally
from diffalign.errors import DataError

from .toy import gallery


@pytest.fixture
def voted(tmp_path):
    """A gallery with four votes: ranked with a tie, all level, all bad, and one taken back."""
    spec = ArenaSpec(gallery=str(gallery(tmp_path / "g")), voter="ana")
    found = read_gallery(spec.gallery)
    with Store(spec.database_path(found.table)) as store:
        ballots = Ballots(found, spec)
        for number, (outcome, ranks) in enumerate(
            [
                ("ranked", [3, 1, 2, 1]),
                ("ranked", [1, 1, 1, 1]),
                ("all_bad", None),
                ("skipped", None),
                ("ranked", [1, 2, 3, 4]),
            ]
        ):
            ballot = ballots.next("ana", number)
            store.issue(ballot)
            store.cast(ballot.id, "ana", outcome, ranks)
            ballots.restart(store.records())
        store.withdraw(ballot.id, "ana")
        yield spec, store.records()


def read(folder, **options) -> tuple[list, Tally]:
    tally = Tally()
    return list(read_rows(DataSpec(path=str(folder), **options), tally)), tally


def test_the_trainer_reads_the_right_winners(voted, tmp_path):
    spec, records = voted
    said = []
    done = export(spec, tmp_path / "out", said.append)
    assert (done.rows, done.ties, done.left_out) == (2, 1, 2) and "2 ranked groups (1 all level)" in said[0]
    (row,), tally = read(tmp_path / "out")
    assert tally.layout == "scored" and tally.ties == 1
    ballot = records[0].ballot
    assert row.prompt == ballot.prompt and row.utility == (-3, -1, -2, -1)
    for image, reference in zip(ballot.images, row.images):
        assert hashlib.sha256(reference.read()).hexdigest() == image
    assert len(read(tmp_path / "out", ties="soft")[0]) == 2
    first = json.loads((tmp_path / "out" / "metadata.jsonl").read_text().splitlines()[0])
    assert first["user"] == "ana" and first["models"] == list(ballot.models) and first["ranks"] == [3, 1, 2, 1]


def test_pictures_are_stored_once_and_again_is_the_same(voted, tmp_path):
    spec, records = voted
    out = tmp_path / "out"
    one = export(spec, out)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert one == export(spec, out) and one.pictures == len(before) == len({i for r in records[:2] for i in r.ballot.images})
    assert before == {path.name: path.stat().st_mtime_ns for path in (out / "images").iterdir()}


def test_a_folder_moves(voted, tmp_path):
    export(voted[0], tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert read(tmp_path / "moved")[0][0].images[0].read()


def test_what_cannot_be_exported(voted, tmp_path):
    spec, records = voted
    with pytest.raises(DataError, match="no votes yet"):
        export(ArenaSpec(gallery=spec.gallery, database=str(tmp_path / "none.sqlite")), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="an export is a folder"):
        export(spec, tmp_path / "file")
    with Store(tmp_path / "empty.sqlite"):
        pass
    with pytest.raises(DataError, match="nothing to export"):
        export(ArenaSpec(gallery=spec.gallery, database=str(tmp_path / "empty.sqlite")), tmp_path / "out")
    table = read_gallery(spec.gallery).table
    kept = [line for line in table.read_text().splitlines() if json.loads(line)["prompt"] != records[0].ballot.prompt]
    table.write_text("\n".join(kept))
    with pytest.raises(DataError, match="not in the gallery any more"):
        export(spec, tmp_path / "out")
    assert not (tmp_path / "out" / "metadata.jsonl").exists() and not (tmp_path / "none.sqlite").exists()


def test_a_gallery_is_not_replaced_by_its_export(voted):
    spec, _ = voted
    table = read_gallery(spec.gallery).table
    own = table.rename(table.with_name("metadata.jsonl"))
    before = own.read_bytes()
    with pytest.raises(DataError, match="the gallery's own table"):
        export(spec, own.parent)
    assert own.read_bytes() == before


def test_votes_on_other_pictures_are_not_mixed_up(voted, tmp_path):
    """A database of another gallery: the picture is missing, and is not replaced by one of the same name."""
    spec, _ = voted
    with Store(spec.database_path(read_gallery(spec.gallery).table)) as store:
        store.issue(
            Ballot(
                id="0" * 32,
                prompt="p",
                models=("model-0", "model-1"),
                images=("0" * 64, "1" * 64),
                voter="ana",
                criteria="",
                issued="",
            )
        )
        store.cast("0" * 32, "ana", "ranked", [1, 2])
    with pytest.raises(DataError, match="000000000000"):
        export(spec, tmp_path / "out")
