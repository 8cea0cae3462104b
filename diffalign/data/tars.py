"""Tar shards in WebDataset's form -> records with the columns that ``columns.py`` knows.

The files of a sample follow one another and share their name up to its first dot, its key; the rest of the name says what a
file holds:

    0007.jpg_0.jpg, 0007.jpg_1                pictures: jpg_0, jpg_1, chosen, rejected; image, or no name at all (0007.jpg)
    0007.label_0.txt, 0007.caption            text: any other column; the prompt may have no name (0007.txt), a label 0007.cls
    0007.json                                 an object, whose entries are columns of the sample

``datasets`` opens the archive, here or on the hub; its decoders are not used, since they open what may be a pickle. Nothing
is written to the disk, so names in an archive lead nowhere. Files of other kinds are passed over unread, and a kind that can
hold a pickle is refused before a byte of it is read. An archive must go on to its end mark and no further: tarfile stops
without a word at a damaged header, at a cut between two files, and at the end of the first of several that were put together.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError
from .images import MAX_BYTES

PICTURES = ("jpg_0", "jpg_1", "chosen", "rejected", "image")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "wav")  # and clips, which are files as pictures are
TEXTS = ("txt", "text", "cls")
OBJECTS = ("json", "jsn")
BARE = (*PICTURES, "prompt", "caption", "text", "original_prompt", "label", "label_0", "label_1", "score_0", "score_1", "user",
        "user_id")  # what needs no further ending
NAMES = {"txt": "text", "cls": "label", "original_prompt": "prompt", **dict.fromkeys(IMAGES, "image")}
PICKLES = ("pickle", "pkl", "pck", "pyd", "pth", "pt", "ckpt", "bin", "joblib", "npy", "npz")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shards(path: str) -> list[str] | None:
    """The local archives that ``path`` names, in order: a file, a glob pattern, or WebDataset's range of numbers in braces;
    None when it names no archive. Raises DataError for one that is not there, and for a range that counts down."""
    if not path.endswith(".tar"):
        return None
    names = []
    for name in _expanded(path):
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        if not found:
            raise DataError(f"{name}: no such file")
        names += found
    return names


def _expanded(path: str) -> Iterator[str]:
    """Braces as webdataset's: {00..12} keeps the zeros in front."""
    found = BRACES.search(path)
    if found is None:
        yield path
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise DataError(f"{path}: the range {found.group()} counts down; write {{{last}..{first}}}")
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{path[:found.start()]}{number:0{len(first)}d}{path[found.end():]}")


def records(path: str) -> Iterator[tuple[str, dict | DataError]]:
    """(name of the sample, for messages; its columns or what is wrong with it) of one archive. Raises what ``datasets`` and
    tarfile raise for a broken one, and DataError for a file that may be a pickle."""
    key, columns = None, {}
    for sample, field, content in _files(path):
        if sample != key and columns:
            yield _finished(path, key, columns)
            columns = {}
        key = sample
        if field in columns:
            raise DataError(f"{_where(path, key)}: two files called '{field}'")
        columns[field] = content
    if columns:
        yield _finished(path, key, columns)


class _Member(tarfile.TarInfo):
    """A header that is what it should be: tarfile takes any other, behind the first, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}: the archive is damaged, or cut before its end mark") from None


def _files(path: str) -> Iterator[tuple[str, str, bytes | None]]:
    """(key, rest of the name, content) of the files that are looked into; no content for a link, which is not followed."""
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            folder, slash, base = member.name.rpartition("/")
            key, dot, field = base.partition(".")
            if key and dot and not key.startswith("__") and (member.isreg() or member.islnk() or member.issym()):
                yield from _file(path, archive, member, folder + slash + key, field)
            archive.members = []  # else it keeps every header
        while rest := archive.fileobj.read(1 << 20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("something follows its end mark, which would not be read: make each archive a shard "
                                        "of its own")


def _file(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo, key: str,
          field: str) -> Iterator[tuple[str, str, bytes | None]]:
    *_, kind = field.lower().split(".")
    if kind in PICKLES:
        raise DataError(f"{Path(path).name}: holds {member.name[:200]}, and .{kind} can be a pickle, which may run anything "
                        "when it is opened; write the shards without such files")
    if kind not in (*IMAGES, *TEXTS, *OBJECTS) and field not in BARE:
        return
    if member.size > MAX_BYTES:
        raise DataError(f"{_where(path, key)}: {field} is larger than 1 GiB, which is no picture")
    yield key, field, archive.extractfile(member).read() if member.isreg() else None


def _where(path: str, key: str) -> str:
    return f"{Path(path).name} sample {key[:200]}"


def _finished(path: str, key: str, files: dict[str, bytes | None]) -> tuple[str, dict | DataError]:
    """The columns of a sample: of its JSON, then of its own files, which win."""
    where, columns, own = _where(path, key), {}, {}
    try:
        for field, content in files.items():
            if content is None:
                raise ValueError(f"{field}: a link, which is not followed; write the file itself (tar --dereference "
                                 "--hard-dereference)")
            name, _, kind = field.rpartition(".")
            if kind.lower() in OBJECTS:
                columns.update(_object(content, field))
            else:
                own.update([_column(name, kind, content, field)])
    except ValueError as error:
        return where, DataError(f"{where}: {error}")
    return where, {**columns, **own}


def _column(name: str, kind: str, content: bytes, field: str) -> tuple[str, bytes | str]:
    """A file's column and value. name: what it is called apart from its kind; empty for a name without a further dot."""
    if not name:  # 0007.jpg, but also 0007.jpg_0 and 0007.caption
        name, kind = (kind, kind.lower()) if kind.lower() in (*IMAGES, *TEXTS) else (kind, "")
    column = NAMES.get(name.lower(), name)
    if kind.lower() in IMAGES or column in PICTURES:
        return column, content
    try:
        return column, content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise ValueError(f"{field}: not UTF-8 text") from None


def _object(content: bytes, field: str) -> dict:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: no JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{field}: a JSON object is needed, got {type(found).__name__}")
    return found
