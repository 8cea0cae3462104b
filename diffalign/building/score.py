"""Rewards over a data set that is there: its rows in units, and the scores as new columns of a copy beside it."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data.columns import SCORED, ImageRef, Pictures, files_below, read_pictures, table_of
from ..data.images import decode
from ..data.spec import DataSpec
from ..data.store import sha256
from ..data.tars import shards
from ..errors import ConfigError, DataError, ResourceError
from ..rewards import Reward, columns_of
from .journal import Journal
from .judge import copied, scored
from .spec import ScoreSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TABLES = (".parquet", ".arrow", ".csv", ".jsonl", ".ndjson", ".tar")
UNIT = 32  # rows scored and written down at once
HASHED = 4 << 30  # bytes; a larger file is told by size and time
NAMED = 5

Scores = Mapping[tuple[str, int], list[list[float | None]]]  # (reward, unit) -> rows of the unit -> pictures of the row


@dataclass(frozen=True)
class Source:
    """What is scored. table: the file that is read, None for a folder of pictures or what ``datasets`` resolves."""

    spec: ScoreSpec

    @property
    def data(self) -> DataSpec:
        return DataSpec(path=self.spec.data, split=self.spec.split, image_root=self.spec.image_root,
                        max_pixels=self.spec.max_pixels)

    @cached_property
    def table(self) -> Path | None:
        return table_of(self.data)

    @cached_property
    def is_pictures(self) -> bool:
        """A folder that holds pictures and no table."""
        folder = Path(self.spec.data)
        if self.table is not None or not folder.is_dir():
            return False
        return next(_tables(folder), None) is None and next(_files(folder), None) is not None

    @property
    def output(self) -> Path:
        """Beside the data: <name>.scored.parquet for parquet, else .scored.jsonl."""
        if self.spec.output is not None:
            return Path(self.spec.output)
        table, folder = self.table, Path(self.spec.data)
        if table is not None:
            return table.with_name(f"{table.stem}{'.scored.parquet' if table.suffix == '.parquet' else SCORED}")
        return folder / f"pictures{SCORED}" if folder.is_dir() else Path(f"{folder.name}{SCORED}")

    def rows(self) -> Iterator[Pictures]:
        """Every row in order. Raises DataError."""
        return _loose(Path(self.spec.data)) if self.is_pictures else read_pictures(self.data)

    def columns(self) -> list[str]:
        """Of the first row. Raises DataError when there is none."""
        if self.table is not None and self.table.suffix == ".parquet":
            with _readable(self.table):  # not by a first row: threads that read ahead are no good at being left alone
                return pq.read_schema(self.table).names
        first = next(self.rows(), None)
        if first is None:
            raise DataError(f"{self.spec.data}: there is nothing to score")
        return [*first.record]

    def count(self) -> int | None:
        """How many rows, where that is quickly told."""
        if self.is_pictures:
            return sum(1 for _ in _files(Path(self.spec.data)))
        if self.table is None or self.table.suffix not in (".parquet", ".jsonl", ".ndjson"):
            return None
        if self.table.suffix == ".parquet":
            with _readable(self.table):
                return pq.read_metadata(self.table).num_rows
        with self.table.open("rb") as file:
            return sum(1 for line in file if line.strip())

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another."""
        if self.table is not None:
            stat = self.table.stat()
            content = sha256(self.table).hexdigest() if stat.st_size <= HASHED else f"{stat.st_size} {stat.st_mtime_ns}"
        elif parts := self._parts():
            listed = "\n".join(f"{os.path.relpath(path, self.spec.data)} {_stamp(path)}" for path in parts)
            content = hashlib.sha256(os.fsencode(listed)).hexdigest()  # names may be no Unicode
        else:
            content = self.spec.data
        return {"data": content, "split": self.spec.split, "image_root": self.spec.image_root,
                "max_pixels": self.spec.max_pixels}

    def _parts(self) -> list[Path]:
        """The files that it is made of: loose pictures, the shards of a pattern, the tables of a folder; none on the hub."""
        folder = Path(self.spec.data)
        if self.is_pictures:
            return list(_files(folder))
        return [Path(name) for name in shards(self.spec.data) or ()] or sorted(_tables(folder))


@contextmanager
def _readable(table: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{table}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere: a picture that cannot be read
        return "none"
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _files(folder: Path) -> Iterator[Path]:
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    yield from sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def _tables(folder: Path) -> Iterator[Path]:
    """All but what ``diffalign score`` wrote; nothing where there is no such folder."""
    return (path for path in files_below(folder, TABLES) if ".scored." not in str(path)) if folder.is_dir() else iter(())


def _loose(folder: Path) -> Iterator[Pictures]:
    """Pictures of a folder without a table; the prompt is what a text file of the same name says."""
    for number, path in enumerate(_files(folder)):
        name = path.relative_to(folder).as_posix()
        try:
            prompt = path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            prompt = None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path.with_suffix('.txt')}: cannot be read as a prompt ({error})") from None
        record = {"image": name, **({} if prompt is None else {"prompt": prompt})}
        yield Pictures(id=number, prompt=prompt, images=(ImageRef(path=path, where=name),), single=True, record=record,
                       columns=record, where=name)


def check(source: Source, rewards: Mapping[str, Reward]) -> None:
    """What can be refused before a reward is loaded. Raises UserError children: nothing to score, a column that a reward reads
    and that is missing, or one of the name that its scores would get; an output that is the input.
    """
    columns = source.columns()
    for name, reward in rewards.items():
        missing = [column for column in columns_of(reward) if column not in columns]
        if missing:
            raise DataError(f"{source.spec.data}: rewards.{name} reads a column '{missing[0]}', and there is none")
        if f"score_{name}" in columns:
            raise ConfigError(f"rewards.{name}: {source.spec.data} has a column score_{name} already; give the reward another "
                              "name, such as {" + f"{name}_2: {{kind: ...}}" + "}")
    output = source.output
    if output.exists() and any(output.samefile(path) for path in (source.table, Path(source.spec.data))
                               if path is not None and path.exists()):
        raise ConfigError(f"output: {output} is the data itself; give another file")
    if output.suffix not in (".jsonl", ".ndjson", ".parquet"):
        raise ConfigError(f"output: {output} must end in .jsonl or .parquet")
    if output.suffix == ".parquet" and (source.table is None or source.table.suffix != ".parquet"):
        raise ConfigError(f"output: {output}: only a parquet file becomes parquet again; give a name that ends in .jsonl")


def known(journal: Journal) -> dict[tuple[str, int], list[list[float | None]]]:
    return {(record["reward"], record["unit"]): record["scores"] for record in journal}


def score(source: Source, rewards: Mapping[str, Reward], journal: Journal, *, rank: int = 0, world: int = 1,
          progress: bool = True, say: Callable[[str], None] = lambda _: None) -> None:
    """This process's share of the units that are not there yet. One reward's weights in memory at a time.

    A picture that cannot be decoded has no score; the first ones are named. Raises UserError children.
    """
    done, count = set(known(journal)), source.count()
    for name, reward in rewards.items():
        own, named = copied(reward), []
        with tqdm(total=count, desc=f"scoring with {name}", unit="row", disable=None if progress else True) as bar:
            for number, unit in enumerate(_units(source.rows())):
                if number % world == rank and (name, number) not in done:
                    values = _unit(own, unit, source.spec.max_pixels, named)
                    journal.add({"reward": name, "unit": number, "scores": values})
                bar.update(len(unit))
        del own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for line in named[:NAMED]:
            say(f"no score of {name}: {line}")
    journal.close()


def _units(rows: Iterable[Pictures]) -> Iterator[list[Pictures]]:
    rows = iter(rows)
    while unit := list(islice(rows, UNIT)):
        yield unit


def _unit(reward: Reward, rows: Sequence[Pictures], max_pixels: int, named: list[str]) -> list[list[float | None]]:
    """Scores of each row's pictures; a row without a prompt has an empty one."""
    images = [_decoded(ref, max_pixels, named) for row in rows for ref in row.images]
    prompts = [row.prompt or "" for row in rows for _ in row.images]
    columns = {name: [value for row in rows for value in _spread(row, name)] for name in columns_of(reward)}
    flat = iter(scored(reward, images, prompts, columns))
    return [list(islice(flat, len(row.images))) for row in rows]


def _decoded(ref: ImageRef, max_pixels: int, named: list[str]) -> Image.Image | None:
    try:
        return decode(ref.read(), ref.where, max_pixels)
    except DataError as error:
        named.append(str(error))
        return None


def _spread(row: Pictures, name: str) -> list:
    """A column's value for each picture: a list of as many values, or one value for all."""
    if name not in row.columns:
        raise DataError(f"{row.where}: has no column '{name}', which the reward reads")
    value = row.columns[name]
    return value if isinstance(value, list) and len(value) == len(row.images) else [value] * len(row.images)


# The copy with the new columns, written aside and renamed.


def write(source: Source, names: Sequence[str], scores: Scores) -> dict[str, Any]:
    """The data with a column score_<reward> each: a number where a row has one picture, else a list of its pictures' order.

    Returns counts and statistics. Raises DataError for a unit that is missing, ResourceError for a disk that is full.
    """
    found, bare = {name: _Totals() for name in names}, []
    columns = _columns(source, names, scores, found, bare)
    with _aside(source.output) as path:
        if source.output.suffix == ".parquet":
            rows = _write_parquet(source.table, path, names, columns)
        else:
            rows = _write_lines(path, columns)
    return {"rows": rows, "without_prompt": len(bare), "rewards": {name: totals.facts() for name, totals in found.items()}}


def _columns(source: Source, names: Sequence[str], scores: Scores, found: dict[str, _Totals],
             bare: list[int]) -> Iterator[tuple[Pictures, dict[str, Any]]]:
    """Each row with its new columns. bare: takes the numbers of rows without a prompt."""
    for number, unit in enumerate(_units(source.rows())):
        for place, row in enumerate(unit):
            new = {}
            for name in names:
                try:
                    values = scores[name, number][place]
                except LookupError:
                    raise DataError(f"{row.where}: its score of {name} is missing; run the same command again") from None
                if len(values) != len(row.images):
                    raise DataError(f"{row.where}: the data have changed meanwhile; run again with overwrite=true")
                found[name].take(values)
                new[f"score_{name}"] = values[0] if row.single else values
            if row.prompt is None:
                bare.append(row.id)
            yield row, new


def _write_lines(path: Path, columns: Iterator[tuple[Pictures, dict[str, Any]]]) -> int:
    """Pictures that the rows hold as bytes stay where they are; the row's number leads to them."""
    rows = 0
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a character as JSON escapes it
        for row, new in columns:
            plain = {name: value for name, value in row.record.items() if _is_plain(value)}
            record = {**({} if len(plain) == len(row.record) else {"row": row.id}), **plain, **new}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            rows += 1
        file.flush()
        os.fsync(file.fileno())
    return rows


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _write_parquet(table: Path, path: Path, names: Sequence[str], columns: Iterator[tuple[Pictures, dict[str, Any]]]) -> int:
    """The table's own batches with columns added: no value of it is converted."""
    writer, rows = None, 0
    try:
        for batch in pq.ParquetFile(table).iter_batches(UNIT):
            new = [values for _, values in islice(columns, batch.num_rows)]
            for name in names:
                own = [values[f"score_{name}"] for values in new]
                kind = pa.list_(pa.float32()) if isinstance(own[0], list) else pa.float32()
                batch = batch.append_column(f"score_{name}", pa.array(own, kind))
            # what `datasets` noted of the columns would not hold for the new ones, and it refuses such a file
            kept = {key: value for key, value in (batch.schema.metadata or {}).items() if key != b"huggingface"}
            batch = batch.replace_schema_metadata(kept)
            writer = writer or pq.ParquetWriter(path, batch.schema)
            writer.write_batch(batch)
            rows += batch.num_rows
        for _ in columns:  # to the end, where whoever reads ahead stops
            rows += 1
    finally:
        if writer is not None:
            writer.close()
    return rows


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    aside = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror or error}); free some space or set output") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


class _Totals:
    """Mean and extremes of a reward's scores, as they pass."""

    def __init__(self):
        self.values, self.lost = [], 0

    def take(self, values: Sequence[float | None]) -> None:
        self.values += [value for value in values if value is not None]
        self.lost += sum(value is None for value in values)

    def facts(self) -> dict[str, Any]:
        found = torch.tensor(self.values, dtype=torch.float64)
        if not len(found):
            return {"scored": 0, "not_scored": self.lost}
        return {"scored": len(found), "not_scored": self.lost, "mean": found.mean().item(),
                "std": found.std(correction=0).item(), "least": found.min().item(), "greatest": found.max().item()}
