"""Music Arena's votes (arXiv 2507.20900) as rows of the one preference schema: two clips, who is better, how long each was
heard.

The released data are a JSON object a battle, in a folder a month (battle_data/*/*.json), with clips as paths relative to the
release; a .jsonl of such objects reads as well. What a vote says:

| preference | rows |
|---|---|
| A, B | a pair, hard |
| TIE | a pair of one half: dropped or kept as a soft label, as other ties are |
| BOTH_BAD | two rows of one clip, neither liked (for unpaired objectives): nothing says which is worse |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .columns import ImageRef, Row, inside

PREFERENCES = {"A": (1.0, 0.0), "B": (0.0, 1.0), "TIE": (0.5, 0.5)}
BOTH_BAD = "BOTH_BAD"
LONGEST = 1e9  # seconds; what is said to be longer is no time
LEAST = 5.0  # seconds that the arena wants each side to be heard before it takes a vote


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote:
    """One battle. rows: in the schema of ``columns``; an image is the file of a clip here. preference: A, B, TIE or BOTH_BAD.
    listened: seconds that A and B were heard. events: of each side, (PLAY, PAUSE, STOP or TICK, seconds since the epoch).
    feedback: what the listener wrote, or "". durations: seconds of the clips, NaN where not said.
    """

    rows: tuple[Row, ...]
    preference: str
    listened: tuple[float, float]
    events: tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]
    durations: tuple[float, float]
    feedback: str
    lyrics: str
    instrumental: bool


@dataclass
class Heard:
    """What was read, and what was left out: short: one side was heard too little. withheld: a clip that is not released."""

    votes: int = 0
    short: int = 0
    withheld: int = 0


def read_votes(path: str | Path, heard: Heard, *, least: float = LEAST) -> Iterator[Vote]:
    """Votes in the order of file names and lines. path: the release's folder, or a .jsonl in it. least: seconds that both
    sides must have been heard; 0 takes all.

    Raises DataError naming file or line: no vote there, no JSON, a missing column, a preference or a number that is none, a
    clip outside the folder.
    """
    path = Path(path)
    root = (path if path.is_dir() else path.parent).resolve()
    for where, record in _records(path):
        heard.votes += 1
        vote = _vote(heard.votes - 1, where, record, root)
        if vote is None:
            heard.withheld += 1
        elif min(vote.listened) < least:
            heard.short += 1
        else:
            yield vote
    if not heard.votes:
        raise DataError(f"{path}: holds no vote; give the folder of the release (battle_data/*/*.json), or a .jsonl of "
                        "battles")


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    try:
        for file in files:
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                yield from ((f"{file.name} line {n}", _object(line, f"{file.name} line {n}"))
                            for n, line in enumerate(text.split("\n"), 1) if line.strip())
            else:
                yield file.name, _object(text, file.name)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _object(text: str, where: str) -> dict:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON ({str(error)[:100]})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a battle is a JSON object, got {type(record).__name__}")
    return record


def _vote(number: int, where: str, record: dict, root: Path) -> Vote | None:
    """None where a clip is withheld: its path is empty."""
    prompt, preference = _text(record, "prompt", where).strip(), _text(record, "preference", where)
    if preference not in (*PREFERENCES, BOTH_BAD):
        raise DataError(f"{where}: preference is {preference!r:.40}; one of A, B, TIE and BOTH_BAD is needed")
    names = [_text(record, f"audio_{side}", where, "") for side in "ab"]
    if not all(names):
        return None
    clips = tuple(_clip(name, root, f"{where}, audio_{side}") for name, side in zip(names, "ab"))
    systems = tuple(record.get(f"system_{side}") for side in "ab")
    return Vote(
        rows=_rows(number, where, prompt, clips, preference, systems, _text(record, "user_pseudonym", where, "") or None),
        preference=preference,
        listened=tuple(_seconds(record, f"total_listening_time_{side}", where, 0.0) for side in "ab"),
        events=tuple(_events(record.get(f"listen_data_{side}"), f"{where}, listen_data_{side}") for side in "ab"),
        durations=tuple(_seconds(record, f"duration_{side}", where, math.nan) for side in "ab"),
        feedback=_text(record, "feedback", where, "").strip(), lyrics=_text(record, "lyrics", where, ""),
        instrumental=bool(record.get("is_instrumental")))


def _rows(number: int, where: str, prompt: str, clips: tuple[ImageRef, ...], preference: str, systems: tuple,
          user: str | None) -> tuple[Row, ...]:
    """ids leave room for the two rows of a vote."""
    def row(place: int, images: tuple, utility: tuple, models: tuple) -> Row:
        soft = 0.5 if preference == "TIE" else None
        return Row(id=2 * number + place, prompt=prompt, images=images, utility=utility, soft=soft, where=where, user=user,
                   models=models if all(isinstance(model, str) for model in models) else ())

    if preference == BOTH_BAD:
        return tuple(row(place, (clip,), (-1.0,), (system,)) for place, (clip, system) in enumerate(zip(clips, systems)))
    return (row(0, clips, PREFERENCES[preference], systems),)


def _clip(name: str, root: Path, where: str) -> ImageRef:
    path = inside(name, root)
    if path is None:
        raise DataError(f"{where}: the path {name[:80]!r} leaves the data set's folder")
    return ImageRef(path=path, where=where)


def _text(record: dict, name: str, where: str, absent: str | None = None) -> str:
    """absent: what stands for a text that is left out, or null; None: it must be there."""
    value = absent if record.get(name) is None else record[name]
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise DataError(f"{where}: {name} is {'missing or ' if absent is None else ''}no text") from None
    return value


def _seconds(record: dict, name: str, where: str, absent: float) -> float:
    value = record.get(name)
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LONGEST:  # also NaN
        raise DataError(f"{where}: {name} must be seconds, 0 or more, got {value!r:.40}")
    return float(value)


def _events(value: Any, where: str) -> tuple[tuple[str, float], ...]:
    """JSON in a text, as released, or the list itself; null is nothing heard of."""
    try:
        events = json.loads(value) if isinstance(value, str) and value else value or ()
        return tuple((str(name), float(at)) for name, at in events)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{where}: a list of [event, seconds] is needed, got {str(value)[:60]!r}") from None
