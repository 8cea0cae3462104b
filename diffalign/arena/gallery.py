"""The entrants: a table of pictures of several models, read once, every picture known by the hash of its bytes."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from ..data.columns import inside
from ..data.images import MAX_BYTES, probe
from ..errors import DataError

KINDS = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}  # what browsers show
MAX_PIXELS = 100_000_000
LONGEST = {"prompt": 20_000, "model": 200}  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """path: inside the gallery's folder. sha256: of its bytes. kind: ending of its name and of its media type. Pixels."""

    path: Path
    sha256: str
    kind: str
    height: int
    width: int

    def read(self) -> bytes:
        """Its bytes. Raises DataError when they are gone or are no longer those that were hashed."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataError(f"{self.path}: the picture has changed since the gallery was read; start the arena again")
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One model's picture of a prompt. seed: what it was drawn with, None if the table does not say."""

    model: str
    seed: int | None
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """prompts: by prompt, by model, its pictures. pictures: by hash. models: all names, sorted. table: the file."""

    table: Path
    prompts: dict[str, dict[str, list[Entry]]]
    pictures: dict[str, Picture]
    models: tuple[str, ...]


def read_gallery(path: str | Path, *, progress: bool = False) -> Gallery:
    """path: a JSONL table (prompt, model, image[, seed]), or a folder that holds it as gallery.jsonl, metadata.jsonl or alone.

    Raises DataError naming the line: no JSON object, a missing column, a path that leaves the table's folder, no picture; and
    where no prompt has pictures of two models.
    """
    table = _table(Path(path))
    root = table.parent.resolve()
    lines = _read(table).split("\n")  # not splitlines: a prompt may hold U+2028, which JSON leaves as it is
    prompts, pictures, files = {}, {}, {}
    for number, line in enumerate(tqdm(lines, desc="hashing pictures", unit="picture", disable=None if progress else True), 1):
        if not line.strip():
            continue
        where = f"{table.name} line {number}"
        row = _row(line, where)
        file = inside(row["image"], root)
        if file is None:
            raise DataError(f"{where}: image: the path {row['image'][:80]!r} leaves the gallery's folder")
        if file not in files:
            files[file] = _picture(file, where)
        picture = pictures.setdefault(files[file].sha256, files[file])
        prompts.setdefault(row["prompt"], {}).setdefault(row["model"], []).append(
            Entry(model=row["model"], seed=row.get("seed"), picture=picture))
    if not any(len(models) > 1 for models in prompts.values()):
        raise DataError(f"{table}: no prompt has pictures of two models, so nothing can be compared")
    return Gallery(table=table, prompts=prompts, pictures=pictures,
                   models=tuple(sorted({model for models in prompts.values() for model in models})))


def _table(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)[:200]}: cannot be read ({error})") from None
    named = [file for name in ("gallery.jsonl", "metadata.jsonl") for file in found if file.name == name]
    if named or len(found) == 1:
        return (named or found)[0]
    lacks = "no gallery.jsonl in this folder" if path.is_dir() else "no such file or folder"
    raise DataError(f"{path}: {lacks}; a gallery is a JSONL table with the columns prompt, model, image")


def _read(table: Path) -> str:
    try:
        return table.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{table}: cannot be read ({error})") from None


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON object ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is needed, got {type(row).__name__}")
    for name in ("prompt", "model", "image"):
        if not (isinstance(row.get(name), str) and row[name].strip()):
            raise DataError(f"{where}: {name}: text is needed, got {str(row.get(name))[:40]!r}")
        if len(row[name]) > LONGEST.get(name, 4096):
            raise DataError(f"{where}: {name}: longer than {LONGEST.get(name, 4096):,} characters")
        try:
            row[name].encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {name}: no valid Unicode text") from None
    seed = row.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise DataError(f"{where}: seed: a whole number is needed, got {str(seed)[:40]!r}")
    return row


def _picture(path: Path, where: str) -> Picture:
    try:
        if not path.is_file():
            raise DataError(f"{where}: image: {path} is no file")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{where}: image: {path.name} is larger than 1 GiB, which is no picture")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: image: cannot read {path} ({error.strerror or error})") from None
    height, width = probe(data, f"{where}, {path.name}", MAX_PIXELS)
    kind = Image.open(io.BytesIO(data)).format
    if kind not in KINDS:
        raise DataError(f"{where}: image: browsers do not show {kind}; save {path.name} as PNG, JPEG or WebP")
    return Picture(path=path, sha256=hashlib.sha256(data).hexdigest(), kind=KINDS[kind], height=height, width=width)
