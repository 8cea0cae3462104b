"""Pictures on disk, named by the SHA-256 of their bytes: stored once, whole or absent, and checked when read."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image

from ..data.images import decode
from ..data.store import write_aside
from ..errors import DataError, ResourceError

MAX_PIXELS = 100_000_000
FOLDER = "images"


def store(folder: Path, image: Image.Image) -> str:
    """Write the picture as PNG below ``folder`` unless it is there; its path relative to that. Raises ResourceError."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    content = buffer.getvalue()
    name = place(hashlib.sha256(content).hexdigest())
    path = folder / name
    try:
        known = path.stat().st_size == len(content)
    except OSError:
        known = False
    if not known:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path.parent}: cannot be made ({error.strerror}); choose another output_dir") from None
        write_aside(path, content, "a picture", "choose an output_dir on another disk")
    return name


def tidy(folder: Path) -> None:
    """Remove what killed processes were writing; for when none writes any more."""
    for pattern in (".tmp-*", "*/.tmp-*", f"{FOLDER}/*/.tmp-*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def place(digest: str) -> str:
    """images/ab/abcd....png: at most 256 folders, so that none holds millions of files."""
    return f"{FOLDER}/{digest[:2]}/{digest}.png"


def fetch(folder: Path, name: str) -> Image.Image:
    """Raises DataError when the file is gone or its bytes are not those it is named after."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the same command again to draw it anew") from None
    if hashlib.sha256(content).hexdigest() != path.stem:
        path.unlink(missing_ok=True)
        raise DataError(f"{path}: was damaged and has been removed; run the same command again to draw it anew")
    return decode(content, name, MAX_PIXELS)
