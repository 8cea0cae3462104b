"""Prompt lists: one prompt a line, or a benchmark's own files, told apart by their shape.

| set | file | category |
|---|---|---|
| any | .txt, a prompt a line | none |
| PartiPrompts | .tsv with columns Prompt and Category (1632) | Category |
| HPSv2 benchmark (HPDv2) | folder of .json, lists of prompts (4 of 800; the test split's 400 are another set) | file |
| GenEval | .jsonl, each line an object with prompt and tag (553) | tag |
| T2I-CompBench | folder of *_val.txt (300 each; the training prompts beside them are left out) | file |
| DPG-Bench | folder of .txt of one prompt each, or .csv of questions with item_id and text (1065) | none |
| Pick-a-Pic validation_unique | .parquet with a column caption (500) | none |
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

TEXT, CATEGORY = ("prompt", "caption", "text"), ("category", "tag", "style")  # names of columns, in any case
LONGEST_FIELD = 10_000_000  # bytes of one field of a .csv


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """texts: the prompts in file order. categories: one word per prompt, or None. meanings: what each asks for, in words
    that a checker understands, or None: a table's column ``meaning``.
    """

    texts: list[str]
    categories: list[str] | None = None
    meanings: list[str] | None = None


def read_prompts(path: str | Path, option: str = "evaluate.prompts") -> Prompts:
    """A prompt list from a file, or from a folder of a benchmark's files (see the module's table).

    Repeated prompts stay (they get other seeds), except where a table has a row per question or picture. Raises DataError,
    naming the option, file and line.
    """
    path = Path(path)
    prompts = _folder(path, option) if os.path.isdir(path) else _file(path, option)  # Path.is_dir may raise
    if not prompts.texts:
        raise DataError(f"{option}: {path} holds no prompt; write one prompt a line")
    for text in (*prompts.texts, *(prompts.categories or ()), *(prompts.meanings or ())):
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say
            raise DataError(f"{option}: {path} holds {text[:60]!r}, which is no valid Unicode text") from None
    return prompts


def _file(path: Path, option: str) -> Prompts:
    if path.suffix == ".parquet":
        return _parquet(path, option)
    text = _read(path, option)
    if path.suffix == ".tsv":
        return _tsv(path, _lines(text), option)
    if path.suffix == ".csv":
        return _csv(path, text, option)
    if path.suffix == ".json":
        return _listed(path, _json(path, text, "", option), option)
    if path.suffix == ".jsonl":
        rows = [_json(path, line, f" line {n}", option) for n, line in enumerate(_lines(text), 1) if line.strip()]
        return _listed(path, rows, option)
    return Prompts(texts=[line.strip() for line in _lines(text) if line.strip()])


def _folder(path: Path, option: str) -> Prompts:
    """Categories are the files' names, except for a folder of single prompts."""
    held_out = sorted(path.glob("*_val.txt"))  # T2I-CompBench keeps its training prompts, and parts of these, beside them
    files = held_out or sorted([*path.glob("*.json"), *path.glob("*.txt")], key=lambda file: _number(file.stem))
    parts = [(file.stem.removesuffix("_val"), _file(file, option).texts) for file in files]
    if files and all(file.suffix == ".txt" and len(texts) == 1 for file, (_, texts) in zip(files, parts, strict=True)):
        return Prompts(texts=[text for _, texts in parts for text in texts])
    return Prompts(texts=[text for _, texts in parts for text in texts],
                   categories=[name for name, texts in parts for _ in texts])


def _number(name: str) -> tuple[int, str]:
    """2 before 10; names that are no number after those that are, by the alphabet."""
    return (int(name), name) if name.isascii() and name.isdigit() and len(name) < 19 else (10**19, name)


def _tsv(path: Path, lines: list[str], option: str) -> Prompts:
    rows = [line.split("\t") for line in lines]  # no quoting: PartiPrompts has prompts with single straight quotes
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if "prompt" not in header:
        raise DataError(f'{option}: {path} line 1 names no column "Prompt", it has {header}')
    text, kind = header.index("prompt"), header.index("category") if "category" in header else None
    kept = [(n, row) for n, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
    for n, row in kept:
        if len(row) <= max(text, kind or 0) or not row[text].strip():
            raise DataError(f"{option}: {path} line {n} has no prompt or too few columns")
    return Prompts(texts=[row[text].strip() for _, row in kept],
                   categories=None if kind is None else [row[kind].strip() or "none" for _, row in kept])


def _csv(path: Path, text: str, option: str) -> Prompts:
    """A prompt a row; with item_id and text (DPG-Bench) an item a prompt, whose further rows are further questions."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))  # prompts hold commas and line breaks
    except csv.Error as error:
        raise DataError(f"{option}: {path} is no table with commas ({error})") from error
    names = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    if "item_id" in names and "text" in names:
        items: dict[str, str] = {}
        for row in rows:
            items.setdefault(row[names["item_id"]], row[names["text"]])
        return Prompts(texts=_stripped(path, items.values(), option))
    return _columns(path, [{key: row.get(name) for key, name in names.items()} for row in rows], option)


def _listed(path: Path, rows: object, option: str) -> Prompts:
    """A list of texts, a list of objects that hold one each, or an object of such lists by category."""
    if isinstance(rows, dict) and rows and all(isinstance(value, list) for value in rows.values()):
        parts = [(name, _listed(path, value, option).texts) for name, value in rows.items()]
        return Prompts(texts=[text for _, texts in parts for text in texts],
                       categories=[name for name, texts in parts for _ in texts])
    if not isinstance(rows, list):
        raise DataError(f"{option}: {path} is no list of prompts")
    if all(isinstance(row, str) for row in rows):
        return Prompts(texts=_stripped(path, rows, option))
    return _columns(path, rows, option)


def _columns(path: Path, rows: list, option: str) -> Prompts:
    """Rows as mappings; every one needs a text, and they have a category together or not at all."""
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{option}: {path} mixes prompts with something else; every entry is a text, or every one an object")
    rows = [{str(name).lower(): value for name, value in row.items()} for row in rows]
    name = next((name for name in TEXT if any(name in row for row in rows)), None)
    if rows and name is None:
        raise DataError(f"{option}: {path} names no column of prompts ({', '.join(TEXT)}); it has {sorted(rows[0])[:10]}")
    kind = next((kind for kind in CATEGORY if rows and all(isinstance(row.get(kind), str) for row in rows)), None)
    meanings = None
    if any("meaning" in row for row in rows):
        meanings = _stripped(path, [row.get("meaning") for row in rows], option, "meaning")
    return Prompts(texts=_stripped(path, [row.get(name) for row in rows], option), meanings=meanings,
                   categories=None if kind is None else [row[kind].strip() or "none" for row in rows])


def _parquet(path: Path, option: str) -> Prompts:
    """Distinct captions in file order: a split with pictures has a row a pair. Only the column of texts is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = {name.lower(): name for name in pq.read_schema(path).names}
        name = next((names[name] for name in ("caption", "prompt", "text") if name in names), None)
        if name is None:
            raise DataError(f"{option}: {path} has no column caption or prompt, it has {sorted(names)[:10]}")
        column = pq.read_table(path, columns=[name]).column(0).to_pylist()
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{option}: cannot read {path}: {reason}") from error
    return Prompts(texts=list(dict.fromkeys(_stripped(path, column, option))))


def _stripped(path: Path, values: Iterable[object], option: str, noun: str = "prompt") -> list[str]:
    values = list(values)
    for n, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{option}: {path} entry {n} has no {noun}")
    return [value.strip() for value in values]


def _read(path: Path, option: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise DataError(f"{option}: cannot read {path}: {reason}") from error


def _lines(text: str) -> list[str]:
    """At line breaks alone: a prompt may hold a form feed or a Unicode separator, where str.splitlines would cut it."""
    return re.split(r"\r\n|\n|\r", text)


def _json(path: Path, text: str, where: str, option: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option}: {path}{where} is not readable JSON ({str(error)[:100]})") from error
