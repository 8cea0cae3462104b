"""Prompt files: one prompt a line, or a table with a column of categories."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """texts: the prompts in file order. categories: one word per prompt, or None."""

    texts: list[str]
    categories: list[str] | None = None


def read_prompts(path: str | Path, option: str = "evaluate.prompts") -> Prompts:
    """A text file with a prompt a line (empty lines are skipped), or a .tsv with a header that names a column "Prompt" and
    perhaps "Category" (PartiPrompts). Quotes are ordinary letters. Raises DataError, naming the option, file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise DataError(f"{option}: cannot read {path}: {reason}") from error
    prompts = _table(path, lines, option) if path.suffix == ".tsv" else Prompts(texts=[x.strip() for x in lines if x.strip()])
    if not prompts.texts:
        raise DataError(f"{option}: {path} holds no prompt; write one prompt a line")
    return prompts


def _table(path: Path, lines: list[str], option: str) -> Prompts:
    # without quoting: PartiPrompts has prompts with single straight quotes
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
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
