"""What a build was begun with, so that another recipe cannot go on in its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..data.store import write_aside
from ..errors import ConfigError
from .pictures import FOLDER

WORK = "work"
BEGUN = "begun.json"


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings -> leaves by dotted path."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {key: leaf for name, item in tree.items() for key, leaf in flat(item, f"{path}.{name}" if path else name).items()}


def begin(folder: Path, facts: dict[str, Any], overwrite: bool, made: tuple[str, ...] = ()) -> None:
    """Go on with what ``folder`` holds, or begin. facts: everything that decides pictures and scores, JSON-ready.

    Raises ConfigError naming the option that differs, unless ``overwrite``: then what lies there is removed, ``made`` (names
    of results) with it. A beginning that nothing followed is no obstacle.
    """
    path, found = folder / WORK / BEGUN, flat(json.loads(json.dumps(facts)))
    there = [name for name in made if (folder / name).exists()]
    try:
        before = json.loads(path.read_bytes()) if any(path.parent.rglob("*.log")) or there else {}
        reason = _changed(before, found) if before and before != found else None
    except FileNotFoundError:
        before = None
        reason = f"output_dir: {folder / there[0]} is there, but not how it was made, so it" if there else None
    except (OSError, ValueError, AttributeError):
        before, reason = None, f"output_dir: {path} is damaged, so {folder}"
    if reason is not None and not overwrite:
        raise ConfigError(f"{reason} cannot be continued; choose another output_dir, or set overwrite=true to remove what is "
                          "there and start anew")
    if reason is not None:
        _remove(folder, there)
    if reason is not None or not before:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, json.dumps(found, indent=1).encode(), "the beginning of a build", "choose another output_dir")


def _remove(folder: Path, made: list[str]) -> None:
    """The work goes at once, by a rename: a half of it would pass for the beginning of the new one."""
    gone = folder / f".{WORK}-removed"
    shutil.rmtree(gone, ignore_errors=True)
    if (folder / WORK).exists():
        (folder / WORK).rename(gone)
    for name in (gone.name, FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in made:
        (folder / name).unlink(missing_ok=True)


def _changed(before: dict[str, Any], found: dict[str, Any]) -> str:
    """The first option that differs, with both values."""
    name = next(name for name in (*found, *before) if before.get(name, found) != found.get(name, before))
    old, new = (tree.get(name, "absent") for tree in (before, found))
    return f"{name}: is {new}, but the build in output_dir was begun with {old} and"
