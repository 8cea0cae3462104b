"""Writing what people read: atomic files, JSON without NaN, and no secrets."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ResourceError
from ..redact import HIDDEN, SECRET_NAME, redact


def clean(tree: Any) -> Any:
    """A JSON-ready copy: numpy and paths become plain, non-finite numbers None, and anything like a secret "***"."""
    if isinstance(tree, dict):
        return {str(key): HIDDEN if SECRET_NAME.search(str(key)) and isinstance(value, str) else clean(value)
                for key, value in tree.items()}
    if isinstance(tree, (list, tuple, set, frozenset)):
        return [clean(item) for item in tree]
    if isinstance(tree, np.ndarray):
        return clean(tree.tolist())
    if isinstance(tree, np.generic):
        return clean(tree.item())
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    return tree if tree is None or isinstance(tree, (bool, int)) else redact(str(tree))


def write_json(path: Path, tree: dict) -> None:
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """``write`` in UTF-8; a name of a file that is no Unicode is written with its odd bytes escaped, as JSON has it."""
    write(path, text.encode(errors="backslashreplace"))


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: written aside, synced, renamed. Raises ResourceError naming the file."""
    aside = path.parent / f".{path.name}.{os.getpid()}.tmp"  # with_name refuses "." and "/" as no OSError
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as target:
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # or it would hide the error above, where the folder is a file
            aside.unlink(missing_ok=True)
