"""What a build was begun with, so that another recipe cannot go on in its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.store import write_aside
from ..errors import ConfigError, ResourceError

BEGUN = "begun.json"


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings -> leaves by dotted path."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {key: leaf for name, item in tree.items() for key, leaf in flat(item, f"{path}.{name}" if path else name).items()}


def begin(work: Path, facts: dict[str, Any], rewards: dict[str, dict], overwrite: bool, results: Sequence[Path],
          pictures: Path | None = None) -> None:
    """Go on with what the folder ``work`` holds, or begin. facts: what decides everything, rewards: what decides the scores of
    each; JSON-ready. Rewards may join and leave, since each has scores of its own.

    Raises ConfigError naming the option that differs, or a result that was made in another way, unless ``overwrite``: then
    work, results and pictures (a folder of this run's own) are removed. A beginning that nothing followed is no obstacle.
    """
    parts = {"": facts, **{f"rewards.{name}": own for name, own in rewards.items()}}
    path, found = work / BEGUN, json.loads(json.dumps(parts))
    there, before, reason = [result for result in results if result.exists()], {}, None
    if there or any(work.rglob("*.log")):
        try:
            before = json.loads(path.read_bytes())
            reason = _changed(before, found)
        except FileNotFoundError:
            reason = f"nothing says how {(there or [work])[0]} was made, so it"
        except (OSError, ValueError, AttributeError, TypeError):
            reason = f"{path} is damaged, so what it belongs to"
    if reason is not None and not overwrite:
        raise ConfigError(f"{reason} cannot be continued; choose another place, or set overwrite=true to remove what is "
                          "there and start anew")
    if reason is not None:
        _remove(work, there, pictures)
        before = {}
    if before != {**before, **found}:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path.parent}: cannot be made ({error.strerror}); choose another place") from None
        write_aside(path, json.dumps({**before, **found}, indent=1).encode(), path.name, "choose another place")


def _changed(before: dict[str, dict], found: dict[str, dict]) -> str | None:
    """The first option that differs, with both values."""
    for part in sorted(before.keys() & found.keys()):
        old, new = flat(before[part], part), flat(found[part], part)
        for name in dict.fromkeys((*new, *old)):
            was, now = (tree.get(name, "absent") for tree in (old, new))
            if was != now:
                return f"{name}: is {now}, but what is there was begun with {was} and"
    return None


def _remove(work: Path, results: Sequence[Path], pictures: Path | None) -> None:
    """The journals go last: while one is there, so is what tells that it belongs to another beginning."""
    journals = list(work.rglob("*.log"))
    if pictures is not None and journals:  # without journals the folder is somebody else's
        shutil.rmtree(pictures, ignore_errors=True)
    for file in (*results, *journals):
        file.unlink(missing_ok=True)
