"""A built cache of latents and text embeddings, memory-mapped: what training reads. ``encoding.py`` builds it.

A record is addressed by its content: a latent by the picture's bytes, its crop and mirroring; a text by the prompt; both
inside a folder named after the encoder's identity, the number format and VERSION. What changes, misses; what is shared
between rows, data sets or runs, is encoded once. The groups of one data set under one recipe are listed in small Arrow
tables, bound together by a manifest that is written last.

    cache_dir/latents-<id>/*.arrow   key, crc, mean, std                   see store.py
              texts-<id>/*.arrow     key, crc, tokens[, pooled]            and the unconditional embedding
              sets/<id>.json         manifest -> groups-*, images-*, prompts-*, files-*.arrow
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import DataError
from .columns import normalised
from .store import KEY, Store, read_table

VERSION = 1  # of everything that decides a record's numbers: decoding, scaling, cropping, scaling of latents, file format
UNCONDITIONAL = hashlib.sha256(b"diffalign: the unconditional prompt").digest()


@dataclass(frozen=True, slots=True)
class Group:
    """One group, light. row: its number in the data set; bucket, prompt, images: numbers inside the cache."""

    row: int
    bucket: int
    prompt: int
    images: tuple[int, ...]
    utility: tuple[float, ...]
    soft: float | None


class Cache:
    """A built cache, memory-mapped. Raises DataError when a part of it is missing or damaged.

    buckets: (height, width) in pixels. identity: hash of all that training reads. report: counts of the build.
    k: largest group. soft: whether any group has a soft label. mirrored: whether mirrored latents are held.
    """

    def __init__(self, manifest: Path | str):
        manifest = Path(manifest)
        content = _manifest(manifest)
        self.identity, self.family, self.report = content["identity"], content["family"], content["report"]
        self.spatial_factor, self.mirrored = content["spatial_factor"], content["mirrored"]
        self.buckets = [tuple(bucket) for bucket in content["buckets"]]
        self._latents = Store(manifest.parent.parent / content["stores"]["latent"])
        self._texts = Store(manifest.parent.parent / content["stores"]["text"])
        tables = {name: read_table(manifest.parent / file) for name, file in content["tables"].items()}
        self._files, self._prompts = tables["files"], tables["prompts"]["text"]
        columns = tables["groups"]
        self._row, self._prompt, self._bucket, self._soft = (
            columns[name].to_numpy() for name in ("row", "prompt", "bucket", "soft"))
        image, utility = (columns[name].combine_chunks() for name in ("image", "utility"))
        self._offset, self._image, self._utility = image.offsets.to_numpy(), image.values.to_numpy(), utility.values.to_numpy()
        self.sizes = tables["images"]["size"].combine_chunks().values.to_numpy().reshape(-1, 5)
        self._resolve(tables["images"]["keys"], manifest)

    def _resolve(self, keys: pa.ChunkedArray, manifest: Path) -> None:
        try:
            joined = np.frombuffer(keys.combine_chunks().buffers()[1], KEY)[:len(keys) * (1 + self.mirrored)]
            self._places = self._latents.places(joined).reshape(len(keys), -1, 2)
            texts = np.fromiter((prompt_key(text.as_py()) for text in self._prompts), KEY, len(self._prompts))
            self._text_places = self._texts.places(texts)
            self._unconditional = self._texts.places(np.frombuffer(UNCONDITIONAL, KEY))[0]
        except KeyError:
            damaged = self._latents.corrupt + self._texts.corrupt
            what = ", ".join(damaged) or "a file is gone"
            raise DataError(f"{manifest}: a part of the cache is missing or damaged ({what}); run the same command again, "
                            "only this part is encoded anew") from None

    def __len__(self) -> int:
        return len(self._row)

    @cached_property
    def groups(self) -> Sequence[Group]:
        return _GroupList(self)

    def group(self, i: int) -> Group:
        here, soft = slice(self._offset[i], self._offset[i + 1]), float(self._soft[i])
        return Group(row=int(self._row[i]), bucket=int(self._bucket[i]), prompt=int(self._prompt[i]),
                     images=tuple(self._image[here].tolist()), utility=tuple(self._utility[here].tolist()),
                     soft=None if np.isnan(soft) else soft)

    @cached_property
    def members(self) -> list[np.ndarray]:
        """Groups of each bucket, in file order: int64 positions in ``groups``."""
        return [np.flatnonzero(self._bucket == bucket) for bucket in range(len(self.buckets))]

    @cached_property
    def k(self) -> int:
        return int(np.diff(self._offset).max())

    @cached_property
    def elements(self) -> int:
        """Latent numbers of a picture of the fullest bucket."""
        fullest = max(self.members, key=len)
        return math.prod(self.latent(self.group(fullest[0]).images[0])[0].shape)

    @cached_property
    def soft(self) -> bool:
        return not bool(np.isnan(self._soft).all())

    def latent(self, image: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and std, [C, h, w] each, unit variance: read-only views of the file, in the cache's own dtype."""
        record = self._latents.read(self._places[image][int(flipped)])
        return record["mean"], record["std"]

    def text(self, prompt: int) -> tuple[np.ndarray, np.ndarray | None]:
        """tokens [L, D], pooled [D'] or None: read-only views."""
        record = self._texts.read(self._text_places[prompt])
        return record["tokens"], record.get("pooled")

    def unconditional(self) -> tuple[np.ndarray, np.ndarray | None]:
        record = self._texts.read(self._unconditional)
        return record["tokens"], record.get("pooled")

    def prompt(self, number: int) -> str:
        return self._prompts[number].as_py()

    def prompts(self) -> set[str]:
        """Distinct prompts, normalised for comparison."""
        return {normalised(text) for text in self._prompts.to_pylist()}

    def files(self) -> Iterator[tuple[Path, int, int]]:
        """(path, size, time of change) of every picture file read; size -1 for one that was missing."""
        for path, (size, changed) in zip(self._files["path"].to_pylist(), self._files["stat"].to_pylist(), strict=True):
            yield Path(os.fsdecode(path)), size, changed


class _GroupList(Sequence):
    """All groups, made when asked for."""

    def __init__(self, cache: Cache):
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self._cache.group(j) for j in range(*i.indices(len(self)))]
        return self._cache.group(range(len(self))[i])


def _manifest(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
        claimed = content.pop("sha256")
        if content["version"] == VERSION and short(content, 64) == claimed:
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DataError(f"{path}: no whole cache manifest; run the same command again to build it")


def prompt_key(prompt: str) -> bytes:
    """The key of a prompt's embedding."""
    return hashlib.sha256(prompt.encode()).digest()


def short(value, length: int = 24) -> str:
    """Hex digits of the hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
