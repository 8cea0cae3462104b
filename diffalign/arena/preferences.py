"""Votes as preference data: a folder that ``data.path`` of a recipe can name as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..evaluate.files import write
from .gallery import Gallery, read_gallery
from .spec import ArenaSpec
from .store import Record, Store


@dataclass(frozen=True, kw_only=True)
class Exported:
    """table: the written metadata.jsonl. rows: ranked ballots. ties: rows among them where all are level, which a recipe
    drops unless data.ties=soft. left_out: ballots that were skipped or found all bad. pictures: distinct ones.
    """

    table: Path
    rows: int
    ties: int
    left_out: int
    pictures: int


def export(spec: ArenaSpec, path: Path | str, printer: Callable[[str], None] = lambda text: None) -> Exported:
    """Writes ``path``/metadata.jsonl (prompt, images, ranks, and user, models, voted) and ``path``/images, each picture once.

    The layout is "scored" of ``diffalign.data``: ranks, 1 is best, equal ones are a tie. The table is written last and
    whole, so an interrupted export leaves the old one. Raises DataError when there is no ranked vote, or a picture is gone
    or changed.
    """
    gallery = read_gallery(spec.gallery)
    database = spec.database_path(gallery.table)
    if not database.is_file():
        raise DataError(f"{database}: no votes yet; run the arena first, or name its database")
    with Store(database) as store:
        records = store.records()
    ranked = [record for record in records if record.ranks is not None]
    if not ranked:
        raise DataError(f"{database}: none of its {len(records)} votes ranks anything, so there is nothing to export")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: an export is a folder, and this is a file")
    table = folder / "metadata.jsonl"
    if table.resolve() == gallery.table.resolve():
        raise DataError(f"{table}: is the gallery's own table, which the export would replace; name another folder")
    names = {image: _copied(image, gallery, folder, record) for record in ranked for image in record.ballot.images}
    lines = [json.dumps(_row(record, names), ensure_ascii=False) for record in ranked]
    write(table, ("\n".join(lines) + "\n").encode())
    done = Exported(table=table, rows=len(ranked), ties=sum(max(r.ranks) == 1 for r in ranked),
                    left_out=len(records) - len(ranked), pictures=len(names))
    printer(f"{done.table}: {done.rows} ranked groups ({done.ties} all level), {done.pictures} pictures; "
            f"{done.left_out} votes ranked nothing")
    return done


def _row(record: Record, names: dict[str, str]) -> dict:
    ballot = record.ballot
    return {"prompt": ballot.prompt, "images": [names[image] for image in ballot.images], "ranks": list(record.ranks),
            "user": ballot.voter, "models": list(ballot.models), "voted": record.cast_at}


def _copied(image: str, gallery: Gallery, folder: Path, record: Record) -> str:
    """The picture's path in the table; its file is named by its content, so one that is there is the right one."""
    if image not in gallery.pictures:
        raise DataError(f"{gallery.table}: a vote on {record.ballot.prompt[:60]!r} is about a picture that is not in the "
                        f"gallery any more (SHA-256 {image[:12]}...); put it back, or export with the table that was voted on")
    picture = gallery.pictures[image]
    name = f"images/{image}.{picture.kind}"
    if not (folder / name).is_file():
        write(folder / name, picture.read())
    return name
