"""What a stage has finished, so that a killed one goes on: append-only, a file a process, a line a unit of work.

A line is its own CRC-32 and a JSON object, flushed to the disk before the next unit begins. A line that a kill has torn, or a
disk has damaged, fails its check and counts as not written: its unit is done again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ResourceError


class Journal:
    """Records of one stage. folder: of this stage alone. rank: of this process, which writes one of the files."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self._file, self._own = folder, None, folder / f"{rank}.log"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The whole records of all processes, this and former runs'."""
        for file in sorted(self.folder.glob("*.log")):
            for line in file.read_bytes().splitlines():
                record = _record(line)
                if record is not None:
                    yield record

    def add(self, record: dict[str, Any]) -> None:
        """On the disk when it returns. Raises ResourceError."""
        try:
            if self._file is None:
                self._file = self._opened()
            self._file.write(_line(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResourceError(f"{self._own}: cannot be written ({error.strerror or error}); free some space and run the "
                                "same command again, which goes on from here") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self):
        """Ready to append; a torn last line is ended, so that the next one stands alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._own.open("a+b")
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=True, allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _record(line: bytes) -> dict[str, Any] | None:
    check, _, text = line.partition(b" ")
    return json.loads(text) if check == b"%08x" % zlib.crc32(text) else None
