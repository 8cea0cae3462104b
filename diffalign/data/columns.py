"""Rows of any known layout -> one schema. Reads local files, tar shards (``tars.py``) and hub data sets, one row at a time,
never decoding a picture.

Layouts (``prompt`` may also be called ``caption`` or ``text``):
  pickapic         jpg_0, jpg_1, label_0[, label_1], caption     label_0 = P(jpg_0 preferred): 0, 0.5 (tie), 1 or between
  chosen_rejected  prompt, chosen, rejected
  pickapic_scored  jpg_0, jpg_1, score_0, score_1, caption       a reward's scores; beside label_0 only when asked for by name
  scored           prompt, images, scores (higher is better) or ranks (1 is best)
  unpaired         prompt, image, label                          1/true liked, 0/-1/false not
  prompts          prompt alone, or a text file of one a line    for sources that draw every picture
A picture is its bytes, {"bytes", "path"}, or a path inside the data set's folder; column names may end in ``_file_name``.
For text the candidates are answers: chosen, rejected; completions (for images); completion (for image). For music they are
WAV files, as pictures are files, or arrays of codec tokens, [codebooks][frames].
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from .. import rng
from ..errors import DataError
from . import tars
from .images import MAX_BYTES
from .spec import DataSpec

PROMPTS = ("prompt", "caption", "text")
MODELS = {"pickapic": ("model_0", "model_1"), "pickapic_scored": ("model_0", "model_1"),
          "chosen_rejected": ("chosen_model", "rejected_model"), "unpaired": ("model",)}
PICTURES = (("jpg_0", "jpg_1"), ("chosen", "rejected"), ("images",), ("image",))
TABLES = (".parquet", ".arrow", ".csv", ".tar")  # beside JSON lines, what a folder may hold data in
BESIDE = ("scores.parquet", "records.parquet")  # what `diffalign build` and `rich` write beside theirs
SCORED = ".scored.jsonl"  # the ending of what `diffalign score` writes beside a table, which stays the table
USERS = ("user_id", "user")
NO_NOTES: Mapping[str, type] = {}
NAMED = 1000  # bad rows kept by name; beyond it they are only counted


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """A picture not yet read. data: its bytes, or path: a file inside ``root``. where: the row, for messages."""

    data: bytes | None = None
    path: Path | None = None
    where: str

    def read(self) -> bytes:
        """Raises DataError naming the row when the file is missing or unreadable."""
        if self.data is not None:
            return self.data
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise DataError(f"{self.where}: {self.path.name} is larger than 1 GiB, which is no picture")
            return self.path.read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{self.where}: cannot read {self.path} ({_reason(error)})") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One group. id: the row's number in its data set, whatever was dropped before it. images: pictures, or texts or clips
    where those were asked for. utility: one float32-exact number per image, higher is better. soft: probability that the best
    is truly preferred, or None for a hard label. models: what drew each picture, where a column says so; else empty. user: who
    judged, from the column user_id or user, or None. notes: further columns that were asked for, those with a value."""

    id: int
    prompt: str
    images: tuple[ImageRef | str | np.ndarray, ...]
    utility: tuple[float, ...]
    soft: float | None
    where: str
    models: tuple[str | None, ...] = ()
    user: str | None = None
    notes: dict[str, str | int] = field(default_factory=dict)

    @property
    def tie(self) -> bool:
        return len(self.utility) > 1 and min(self.utility) == max(self.utility)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """A row's pictures without a look at its labels. id: the row's number. single: it has one picture in a column of its own.

    prompt: None where there is none. record: the row as it was read. columns: by the names of the layouts.
    """

    id: int
    prompt: str | None
    images: tuple[ImageRef, ...]
    single: bool
    record: dict
    columns: dict
    where: str


@dataclass
class Tally:
    """What was read and what was left out. bad: one message per bad row, at most 1000; bad_rows: how many in all."""

    layout: str = ""
    rows: int = 0
    ties: int = 0
    unlabelled: int = 0
    bad_rows: int = 0
    bad: list[str] = field(default_factory=list)

    def skip(self, message: str) -> None:
        self.bad_rows += 1
        if len(self.bad) < NAMED:
            self.bad.append(message)


def has_validation(spec: DataSpec) -> bool:
    return spec.validation is not None or spec.validation_share > 0


def read_rows(spec: DataSpec, tally: Tally, *, part: str = "train", seed: int = 0,
              candidates: Literal["pictures", "texts", "clips"] = "pictures",
              notes: Mapping[str, type] = NO_NOTES) -> Iterator[Row]:
    """Rows of ``part`` ("train" or "validation") in file order, ties treated as ``spec.ties`` says. candidates: what a row
    compares: files of pictures, texts, or clips (files, or arrays of codec tokens). notes: further columns, each a str or an
    int; a row without a value is read without it.

    Raises DataError: unreadable or empty data set, no preference column, a bad row or a tie where those are refused.
    """
    kept = 0
    for row in _labelled(spec, tally, part, _CANDIDATES[candidates], notes):
        if row.tie and not _keep_tie(spec, tally, row):
            continue
        kept += 1
        if spec.validation is not None or _held_out(row.prompt, spec, seed) == (part == "validation"):
            yield row
        if kept == spec.max_train_samples and not (spec.validation and part == "validation"):
            return


def detect_layout(spec: DataSpec) -> str:
    """The layout's name, from the first readable record: known before anything is decoded or loaded."""
    for _, _, _, record in _records(spec, "train"):
        if not isinstance(record, DataError):
            return _layout(spec, _canonical(record), record, "train")
    return spec.layout


def read_pictures(spec: DataSpec) -> Iterator[Pictures]:
    """Every row of any layout that has pictures, labelled or not, in file order. Raises DataError naming the row."""
    for number, where, root, record in _records(spec, "train"):
        if isinstance(record, DataError):
            raise record
        columns = _canonical(record)
        names = next((names for names in PICTURES if all(name in columns for name in names)), None)
        if names is None:
            needed = ", or ".join(" and ".join(names) for names in PICTURES)
            raise DataError(f"{where}: has no pictures. Its columns: {', '.join(columns)[:200]}. Needed: {needed}")
        try:
            named = ([("images", value) for value in _list(columns, "images")] if names == ("images",)
                     else [(name, _get(columns, name)) for name in names])
            images = tuple(_image(value, name, root, where) for name, value in named)
            prompt = _prompt(columns) if any(columns.get(name) is not None for name in PROMPTS) else None
        except _Field as error:
            raise DataError(f"{where}: {error.args[0]}: {error.args[1]}") from None
        yield Pictures(id=number, prompt=prompt, images=images, single=names == ("image",), record=record, columns=columns,
                       where=where)


def table_of(spec: DataSpec) -> Path | None:
    """The one local file that a data set is read from; None for what ``datasets`` resolves."""
    return _table(Path(spec.path), spec.split)


def refuse_or_skip(spec: DataSpec, tally: Tally, error: DataError) -> None:
    """A bad row: counted and named when skipped, else the error with what to do about it."""
    if spec.bad_rows == "refuse":
        raise DataError(f"{error}. Mend the row, or set data.bad_rows=skip to leave such rows out") from None
    tally.skip(str(error))


def normalised(prompt: str) -> str:
    """For comparing prompts only, never for training: Unicode NFKC, lower case, single spaces, no final full stop."""
    return " ".join(unicodedata.normalize("NFKC", prompt).lower().split()).rstrip(" .")


def nothing_left(spec: DataSpec, tally: Tally, part: str) -> DataError:
    """Why no group is left, for a data set that is not empty."""
    path = source_path(spec, part)[0]
    if tally.rows == 0:
        return DataError(f"{path}: the data set is empty")
    if tally.ties == tally.rows:
        return DataError(f"{path}: all {tally.rows} rows are ties, so nothing says which picture is better; "
                         "data.ties=soft keeps them as soft labels")
    share = spec.validation_share
    split = f"; data.validation_share={share:g} gave the others to the other part" if share else ""
    return DataError(f"{path}: no {part} group is left of {tally.rows} rows: {tally.ties} ties, {tally.bad_rows} bad, "
                     f"{tally.unlabelled} without a label{split}" + (f"; first: {tally.bad[0]}" if tally.bad else ""))


def _labelled(spec: DataSpec, tally: Tally, part: str, candidate: Callable,
              notes: Mapping[str, type]) -> Iterator[Row]:
    """Every well-formed row, ties included; bad ones refused or skipped. candidate: reads a value of a row, as ``_image``."""
    layout = None
    for number, where, root, record in _records(spec, part):
        tally.rows += 1
        try:
            if isinstance(record, DataError):
                raise record
            columns = _canonical(record)
            layout = layout or _layout(spec, columns, record, part)
            tally.layout = layout
            if columns.get("has_label") is False:
                tally.unlabelled += 1
                continue
            row = _row(number, where, root, columns, layout, candidate, notes)
        except _LayoutError:
            raise
        except DataError as error:
            refuse_or_skip(spec, tally, error)
            continue
        yield row
    if tally.rows == 0:
        raise nothing_left(spec, tally, part)


def _keep_tie(spec: DataSpec, tally: Tally, row: Row) -> bool:
    tally.ties += 1
    if spec.ties == "refuse":
        raise DataError(f"{row.where}: a tie, and data.ties=refuse. Remove it, or set data.ties to drop or soft")
    return spec.ties == "soft"


def _held_out(prompt: str, spec: DataSpec, seed: int) -> bool:
    """Split by prompt, never by row: near-identical prompts fall on the same side."""
    if not spec.validation_share:
        return False
    number = int.from_bytes(hashlib.sha256(normalised(prompt).encode()).digest()[:7], "big")
    return rng.generator(seed, "validation", number).random() < spec.validation_share


# One row, by layout. Each reader: (columns, picture) -> images, utility, soft; raises _Field for a bad value.


class _LayoutError(DataError):
    """The data set as a whole cannot be read; never skipped."""


class _Field(Exception):
    """A value that cannot be used: (column, what is wrong)."""


def _row(number: int, where: str, root: Path | None, columns: dict, layout: str, candidate: Callable,
         notes: Mapping[str, type]) -> Row:
    def picture(value, column: str) -> ImageRef | str | np.ndarray:
        return candidate(value, column, root, where)

    try:
        images, utility, soft = LAYOUTS[layout].read(columns, picture)
        utility = _float32(utility)
        if not all(map(math.isfinite, utility)):
            raise _Field("scores", "a score is too large for float32")
        prompt = _prompt(columns)
        noted = {name: _note(columns[name], name, kind) for name, kind in notes.items() if columns.get(name) is not None}
    except _Field as error:
        raise DataError(f"{where}: {error.args[0]}: {error.args[1]}") from None
    tied = len(utility) > 1 and min(utility) == max(utility)
    return Row(id=number, prompt=prompt, images=tuple(images), utility=utility, soft=0.5 if tied else soft, where=where,
               models=_models(columns, layout, len(images)), user=_user(columns), notes=noted)


def _models(columns: dict, layout: str, count: int) -> tuple[str | None, ...]:
    """What drew the pictures, for what is said of the data alone: a column of another form is no reason to refuse a row."""
    names = MODELS.get(layout, ())
    found = columns.get("models") if layout == "scored" else [columns.get(name) for name in names]
    if not isinstance(found, (list, tuple)) or len(found) != count or not any(found):
        return ()
    return tuple(found) if all(one is None or isinstance(one, str) for one in found) else ()


def _float32(values: Iterable[float]) -> tuple[float, ...]:
    """As the batch will hold them, so that what is a tie there is one here."""
    with np.errstate(over="ignore"):
        return tuple(float(np.float32(value)) for value in values)


def _pickapic(columns: dict, picture: Callable) -> tuple[list, tuple, float | None]:
    first = _probability(columns, "label_0")
    if columns.get("label_1") is not None and abs(first + _probability(columns, "label_1") - 1) > 1e-3:
        raise _Field("label_1", f"label_0 + label_1 must be 1, got {first:g} + {columns['label_1']}")
    images = [picture(_get(columns, name), name) for name in ("jpg_0", "jpg_1")]
    utility = (1.0, 0.0) if first > 0.5 else (0.0, 1.0) if first < 0.5 else (0.5, 0.5)
    return images, utility, None if first in (0, 1) else max(first, 1 - first)


def _pickapic_scored(columns: dict, picture: Callable) -> tuple[list, tuple, None]:
    scores = tuple(_number(_get(columns, name), name) for name in ("score_0", "score_1"))
    return [picture(_get(columns, name), name) for name in ("jpg_0", "jpg_1")], scores, None


def _chosen_rejected(columns: dict, picture: Callable) -> tuple[list, tuple, None]:
    return [picture(_get(columns, name), name) for name in ("chosen", "rejected")], (1.0, 0.0), None


def _scored(columns: dict, picture: Callable) -> tuple[list, list, None]:
    images = _list(columns, "images")
    ranks = columns.get("scores") is None
    name = "ranks" if ranks else "scores"
    utility = [_number(value, name) * (-1 if ranks else 1) for value in _list(columns, name)]
    if len(images) != len(utility) or len(images) < 2:
        raise _Field(name, f"two or more pictures and as many {name} are needed, got {len(images)} and {len(utility)}")
    return [picture(image, "images") for image in images], utility, None


def _unpaired(columns: dict, picture: Callable) -> tuple[list, tuple, None]:
    label = _number(_get(columns, "label"), "label")
    if label not in (-1, 0, 1):
        raise _Field("label", f"must be 1 (liked) or 0 or -1 (not liked), got {label:g}")
    return [picture(_get(columns, "image"), "image")], (1.0 if label > 0 else -1.0,), None


def _prompts(columns: dict, picture: Callable) -> tuple[list, tuple, None]:
    """A grey picture stands in for those that will be drawn, so that a prompt has its place in the cache and in the order."""
    return [picture(_placeholder(), "prompt")], (1.0,), None


@cache
def _placeholder() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class _Layout:
    """needs: the columns that tell it; the last may be called by any of the names in a tuple."""

    needs: tuple[str | tuple[str, ...], ...]
    read: Callable

    def fits(self, columns: Iterable[str]) -> bool:
        return all(any(name in columns for name in ((need,) if isinstance(need, str) else need)) for need in self.needs)

    def __str__(self) -> str:
        return ", ".join(need if isinstance(need, str) else " or ".join(need) for need in self.needs)


LAYOUTS = {
    "pickapic": _Layout(("jpg_0", "jpg_1", "label_0", PROMPTS), _pickapic),
    "chosen_rejected": _Layout(("chosen", "rejected", PROMPTS), _chosen_rejected),
    "scored": _Layout(("images", ("scores", "ranks"), PROMPTS), _scored),
    "pickapic_scored": _Layout(("jpg_0", "jpg_1", "score_0", "score_1", PROMPTS), _pickapic_scored),
    "unpaired": _Layout(("image", "label", PROMPTS), _unpaired),
    "prompts": _Layout((PROMPTS,), _prompts),
}


def _layout(spec: DataSpec, columns: dict, record: dict, part: str) -> str:
    wanted = LAYOUTS if spec.layout == "auto" else {spec.layout: LAYOUTS[spec.layout]}
    if spec.layout == "auto" and not set(columns) <= set(PROMPTS):  # a prompt beside unknown columns is likely a mistake
        wanted = {name: layout for name, layout in LAYOUTS.items() if name != "prompts"}
    for name, layout in wanted.items():
        if layout.fits(columns):
            return name
    known = "; ".join(f"{name} ({layout})" for name, layout in wanted.items())
    lacks = ("no preference column found" if spec.layout == "auto"
             else f"the columns are not those of data.layout={spec.layout}")
    found = ", ".join(str(name)[:40] for name in list(record)[:30])
    raise _LayoutError(f"{source_path(spec, part)[0]}: {lacks}. Its columns: {found}. Needed: {known}")


def _canonical(record: dict) -> dict:
    """Column names without imagefolder's ``_file_name`` ending; answers, as TRL calls them, by the names of pictures."""
    known = {"file_name": "image", "file_names": "images", "completion": "image", "completions": "images"}
    return {re.sub(r"_file_names?$", "", known.get(name, name)): value for name, value in record.items()}


def _get(columns: dict, name: str):
    if columns.get(name) is None:
        raise _Field(name, "missing or empty")
    return columns[name]


def _list(columns: dict, name: str) -> list:
    value = _get(columns, name)
    if not isinstance(value, (list, tuple)):
        raise _Field(name, f"a list is needed, got {type(value).__name__}")
    return list(value)


def _number(value, name: str) -> float:
    """Numbers, booleans and text that reads as a number (webdataset labels arrive as text)."""
    try:
        if isinstance(value, (bool, int, float, str)) and math.isfinite(number := float(value)):
            return number
    except (ValueError, OverflowError):
        pass
    raise _Field(name, f"a finite number is needed, got {str(value)[:40]!r}")


def _probability(columns: dict, name: str) -> float:
    value = _number(_get(columns, name), name)
    if not 0 <= value <= 1:
        raise _Field(name, f"must be 0, 0.5 (tie), 1 or a probability between, got {value:g}")
    return value


def _prompt(columns: dict) -> str:
    name = next((name for name in PROMPTS if columns.get(name) is not None), None)
    if name is None:
        raise _Field("prompt", "missing or empty")
    return _text(columns[name], name)


def _user(columns: dict) -> str | None:
    """As text, so that 7, 7.0 (a column with gaps) and "7" are one person."""
    value = next((columns[name] for name in USERS if columns.get(name) is not None), None)
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if math.isnan(value) else value
    return None if value is None or isinstance(value, (dict, list, bytes)) else str(value) or None


def _note(value, column: str, kind: type) -> str | int:
    if kind is str:
        return _text(value, column)
    number = _number(value, column)
    if number != int(number):
        raise _Field(column, f"a whole number is needed, got {number:g}")
    return int(number)


def _text(value, column: str, root: Path | None = None, where: str = "") -> str:
    if not isinstance(value, str):
        raise _Field(column, f"text is needed, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Field(column, "no valid Unicode text") from None
    return value


def _image(value, column: str, root: Path | None, where: str) -> ImageRef:
    where = f"{where}, {column}"
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return ImageRef(data=bytes(value), where=where)
    if isinstance(value, str) and value:
        return ImageRef(path=_inside(value, root, column), where=f"{where} ({value[:200]})")
    raise _Field(column, f"a picture is bytes or a path, got {type(value).__name__}")


def _clip(value, column: str, root: Path | None, where: str) -> ImageRef | np.ndarray:
    """A list of codebooks, each a list of whole numbers; or a file's bytes or path."""
    if not isinstance(value, (list, tuple)):
        return _image(value, column, root, where)
    try:
        codes = np.array(value)
    except ValueError:
        raise _Field(column, "the codebooks of a clip must have one length") from None
    if codes.dtype.kind not in "iu":
        raise _Field(column, "the codes of a clip are whole numbers, a list for each codebook")
    return codes


_CANDIDATES = {"pictures": _image, "texts": _text, "clips": _clip}


def _inside(name: str, root: Path | None, column: str) -> Path:
    if re.match(r"[a-z0-9+]+://", name, re.IGNORECASE):
        raise _Field(column, f"pictures are not downloaded from addresses: {name[:80]}")
    if root is None:
        raise _Field(column, "the data set holds paths; say with data.image_root which folder they are in")
    path = inside(name, root)
    if path is None:
        raise _Field(column, f"the path {name[:80]!r} leaves the data set's folder")
    return path


def inside(name: str, root: Path) -> Path | None:
    """The file ``name`` below ``root``, a resolved folder. None for what lies outside, of which nothing is ever read: .., an
    absolute path elsewhere, a link out."""
    parts = name.replace("\\", "/").split("/")
    try:
        path = (root / name).resolve()
        outside = ".." in parts or "\0" in name or re.match(r"[A-Za-z]:", name) or not path.is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # names too long, embedded zeros, loops of links
        return None
    return None if outside else path


# Where records come from: (number, where, root of its paths, record or the reason why it is none).


def source_path(spec: DataSpec, part: str) -> tuple[str, str]:
    """Where a part is read from: (file, folder or hub id, split)."""
    if part == "validation" and spec.validation is not None:
        return spec.validation, spec.validation_split or spec.split
    return spec.path, spec.split


def files_below(folder: Path | str, suffixes: Collection[str]) -> Iterator[Path]:
    """Files with these endings, in no order. ``Path.rglob`` would hold the names of all pictures of a folder in memory."""
    with suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if os.path.splitext(entry.name)[1] in suffixes:
                yield Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path, suffixes)


def _records(spec: DataSpec, part: str) -> Iterator[tuple[int, str, Path | None, dict | DataError]]:
    path, split = source_path(spec, part)
    archives = tars.shards(path)
    table = None if archives else _table(Path(path), split)
    root = Path(spec.image_root) if spec.image_root else table.parent if table else Path(path) if Path(path).is_dir() else None
    if root is not None and not os.path.isdir(root):  # Path.is_dir raises on a name that is too long
        raise DataError(f"data.image_root: {root} is no folder")
    root = None if root is None else root.resolve()
    if archives:
        records = _samples(archives)
    elif table is not None and table.suffix == ".txt":
        records = _text_lines(table)
    elif table is not None and table.suffix in (".jsonl", ".ndjson", ".json"):
        records = _json_lines(table) if table.suffix != ".json" else _json_list(table)
    else:
        records = _library(path, table, split, spec)
    for number, (where, record) in enumerate(records):
        yield number, where, root, record


def _table(path: Path, split: str) -> Path | None:
    """The one local file to read, or None when the folder or hub id is for ``datasets`` to resolve."""
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            return None
        for folder in (path / split, path):
            if (folder / "metadata.jsonl").is_file():
                return folder / "metadata.jsonl"
        found = [p for p in sorted(path.iterdir()) if p.suffix in (".jsonl", ".ndjson") and not p.name.endswith(SCORED)]
        named = [p for p in found if p.stem == split] or (found if len(found) == 1 else [])
        other = [p for p in sorted(path.iterdir()) if p.suffix in TABLES and p.name not in BESIDE]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)})") from None
    if named and other:
        raise DataError(f"{path}: holds tables of several kinds ({named[0].name}, {other[0].name}), of which one would be "
                        "read; give that one as data.path")
    return named[0] if named else None


def _text_lines(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    """One prompt a line; empty lines are skipped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path.name} line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    yield where, DataError(f"{where}: not UTF-8 text")
                    continue
                if text:
                    yield where, {"prompt": text}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)})") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    """By hand and not through ``datasets``, whose reader cannot say which line is broken."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path.name} line {number}"
                    yield where, _json(line, where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)})") from None


def _json(line: bytes, where: str) -> dict | DataError:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: no JSON object ({_reason(error)})")
    return record if isinstance(record, dict) else DataError(f"{where}: a JSON object is needed, got {type(record).__name__}")


def _json_list(path: Path) -> Iterator[tuple[str, dict | DataError]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: no JSON file ({_reason(error)})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of rows is needed, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        where = f"{path.name} row {number}"
        yield where, row if isinstance(row, dict) else DataError(f"{where}: an object is needed, got {type(row).__name__}")


BUILDERS = {".arrow": "arrow", ".csv": "csv"}


def _library(path: str, table: Path | None, split: str, spec: DataSpec) -> Iterator[tuple[str, dict]]:
    """Parquet, Arrow, CSV, saved data sets and the hub through ``datasets``, pictures undecoded."""
    files = [str(table)] if table else _asked_once(path, spec, lambda: _files(path, split, spec))
    if files and files[0].endswith(".tar"):
        yield from _samples(files)
        return
    name = table.name if table else f"{path} ({split})"
    if files and files[0].endswith(".parquet"):
        rows = _parquet(files)
    else:
        rows = iter(_asked_once(path, spec, lambda: _open_library(path, table, split, spec)))
    number = 0
    while (record := _guarded(f"{name} near row {number}", lambda: next(rows, None))) is not None:
        yield f"{name} row {number}", record
        number += 1


def _samples(archives: list[str]) -> Iterator[tuple[str, dict | DataError]]:
    for archive in archives:
        where, rows = Path(archive).name, tars.records(archive)
        while (found := _guarded(where, lambda rows=rows: next(rows, None))) is not None:
            where = f"{found[0]}, or what follows it"
            yield found


def _is_hub(path: str) -> bool:
    """Whether this may be a data set's id on the hub."""
    return (re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
            and Path(path).suffix not in (*BUILDERS, ".parquet", ".jsonl", ".json"))


def _asked_once(path: str, spec: DataSpec, call: Callable):
    """``call``, guarded. A hub that cannot be reached is asked once, and ``datasets`` then takes what it has cached; by itself
    it would ask for half a minute."""
    from ..models.load import unreachable

    problem = unreachable("dataset", path, spec.revision) if _is_hub(path) and not Path(path).exists() else None
    if problem is None:
        return _guarded(path, call)
    import datasets

    def cached():
        try:
            return call()
        except ConnectionError:
            raise DataError(f"{path}: no such file or folder here, no copy of such a data set is cached, and the hub cannot "
                            f"be reached ({problem}); check the path and the network") from None

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        return _guarded(path, cached)
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _files(path: str, split: str, spec: DataSpec) -> list[str]:
    """Tar shards that ``datasets`` finds in a folder or a hub data set, which it would decode, and parquet files in a folder,
    which it would read ahead; else nothing."""
    import datasets

    folder = Path(path)
    if not folder.is_dir() and not _is_hub(path):
        return []
    if folder.is_dir() and next(files_below(folder, (".tar", ".parquet")), None) is None:
        return []
    found = datasets.load_dataset_builder(path, name=spec.name, revision=spec.revision).config.data_files or {}
    kinds = {Path(file).suffix for files in found.values() for file in files}
    if kinds == {".tar"} and split not in found:
        raise DataError(f"{path}: has no split '{split}'; there are {', '.join(map(str, found))}")
    return list(found.get(split, ())) if kinds == {".tar"} or kinds == {".parquet"} and folder.is_dir() else []


def _parquet(files: list[str]) -> Iterator[dict]:
    """A few rows at a time: ``datasets`` would have all that is left of a file in memory."""
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file, buffer_size=1 << 20) as source:
            for group in range(source.num_row_groups):  # one by one: a reader of several has buffers for all from the start
                for batch in source.iter_batches(16, row_groups=[group]):
                    yield from batch.to_pylist()


def _open_library(path: str, table: Path | None, split: str, spec: DataSpec):
    import datasets

    folder = Path(path)
    if table is not None:
        if table.suffix not in BUILDERS:
            raise DataError(f"{path}: unknown kind of file; parquet, arrow, csv, json, jsonl, tar and txt (prompts) are "
                            "read")
        return _undecoded(datasets.load_dataset(BUILDERS[table.suffix], data_files=str(table), split="train",
                                                streaming=True))
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        saved = saved[split] if isinstance(saved, dict) else saved
        return _undecoded(saved.to_iterable_dataset())
    if folder.is_dir():
        return _undecoded(datasets.load_dataset(path, name=spec.name, split=split, streaming=True))
    if not _is_hub(path):
        several = "; a pattern is read for tar shards only, other tables together are a folder"
        raise DataError(f"{path}: no such file or folder{several if set('*?{') & set(path) else ''}")
    found = datasets.load_dataset(path, name=spec.name, split=split, revision=spec.revision, streaming=spec.streaming)
    return _undecoded(found if spec.streaming else found.to_iterable_dataset())


def _undecoded(found):
    """Pictures as bytes or paths. A streamed CSV file does not know its columns yet, and holds nothing to decode."""
    return found if found.features is None else found.decode(False)


def _guarded(where: str, call: Callable):
    """``datasets`` and what lies below it raise dozens of types for a file or address that is wrong; all are one sentence."""
    try:
        return call()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: cannot be read as a data set ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(cause.strerror if isinstance(cause, OSError) and cause.strerror else cause)
    return (text.splitlines() or [type(cause).__name__])[0][:300] or type(cause).__name__
