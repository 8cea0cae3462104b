"""The pictures of a data set that is being built: one file each, named by the SHA-256 of its bytes, so stored once."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from contextlib import suppress
from pathlib import Path

from PIL import Image

from ..data.images import FORMATS, decode
from ..errors import DataError, ResourceError

FOLDER = "images"
MAX_PIXELS = 100_000_000


def store(folder: Path, content: bytes, where: str) -> str:
    """Keep a picture's bytes below ``folder``; returns its name relative to it, "images/<sha256>.<format>".

    Nothing is written when it is there already. Raises DataError naming ``where`` for bytes that are no picture,
    ResourceError when the disk is full.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            ending = image.format.lower()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise DataError(f"{where}: it is no picture of a known format; readable are {', '.join(FORMATS)}") from None
    name = f"{FOLDER}/{hashlib.sha256(content).hexdigest()}.{'jpg' if ending in ('jpeg', 'mpo') else ending}"
    if not (folder / name).is_file():
        write(folder / name, content)
    return name


def store_image(folder: Path, image: Image.Image) -> str:
    """The same for a picture in memory, as PNG."""
    target = io.BytesIO()
    image.convert("RGB").save(target, "PNG")
    return store(folder, target.getvalue(), "picture")


def load(folder: Path, name: str) -> Image.Image:
    """A stored picture, RGB. Raises DataError naming the file."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the picture cannot be read ({error.strerror or error})") from None
    return decode(content, str(path), MAX_PIXELS)


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: written aside, synced, renamed. Raises ResourceError naming the file."""
    aside = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror or error}); free some space") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
