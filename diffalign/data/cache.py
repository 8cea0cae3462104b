"""A built cache of latents and text embeddings, memory-mapped: what training reads. ``encoding.py`` builds it.

A record is addressed by its content: a latent by the picture's bytes, its crop and mirroring; a text by the prompt; both
inside a folder named after the encoder's identity, the number format and VERSION. What changes, misses; what is shared
between rows, data sets or runs, is encoded once. The groups of one data set under one recipe are listed in Arrow tables,
which say in which shard and row each record lies, bound together by a manifest that is written last. Nothing that grows
with the rows is held in memory: opening a cache hashes its tables and looks at its shards, and a group is read when asked for.

    cache_dir/latents-<id>/*.arrow   key, crc, mean, std                   see store.py
              texts-<id>/*.arrow     key, crc, tokens[, pooled]            and the unconditional embedding
              sets/<id>.json         manifest -> groups-*, images-*, prompts-*, files-*.arrow; names of the shards
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import DataError
from .store import Shards, read_table

VERSION = 1  # of everything that decides a record's numbers: decoding, scaling, cropping, scaling of latents, file format
INDEX = 2  # of the manifest and its tables; another one is read and hashed anew, but not encoded
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
    members: numbers of each bucket's groups, which follow one another in file order, bucket after bucket.
    """

    def __init__(self, manifest: Path | str):
        manifest = Path(manifest)
        content = _manifest(manifest)
        self.identity, self.family, self.report = content["identity"], content["family"], content["report"]
        self.spatial_factor, self.mirrored = content["spatial_factor"], content["mirrored"]
        self.k, self.soft, self._unconditional = content["k"], content["soft"], content["unconditional"]
        self.buckets = [tuple(bucket) for bucket in content["buckets"]]
        ends = [0, *accumulate(content["sizes"])]
        self.members = [range(start, end) for start, end in zip(ends, ends[1:])]
        self._latents, self._texts = (Shards(manifest.parent.parent / content["stores"][kind], content["shards"][kind])
                                      for kind in ("latent", "text"))
        damaged = self._latents.damaged() + self._texts.damaged()
        if damaged:
            raise DataError(f"{manifest}: a part of the cache is missing or damaged ({', '.join(damaged)[:500]}); run the "
                            "same command again, only this part is encoded anew")
        self._groups, self._images, self._prompts, self._files = (
            read_table(manifest.parent / content["tables"][name]) for name in ("groups", "images", "prompts", "files"))

    def __len__(self) -> int:
        return len(self._groups)

    @cached_property
    def groups(self) -> Sequence[Group]:
        return _GroupList(self)

    def group(self, i: int) -> Group:
        (found,) = self._groups.slice(i, 1).to_pylist()
        return Group(**{**found, "images": tuple(found["images"]), "utility": tuple(found["utility"])})

    @cached_property
    def elements(self) -> int:
        """Latent numbers of a picture of the fullest bucket."""
        fullest = max(self.members, key=len)
        return math.prod(self.latent(self.group(fullest[0]).images[0])[0].shape)

    def latent(self, image: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and std, [C, h, w] each, unit variance: read-only views of the file, in the cache's own dtype."""
        record = self._latents.read(*self._images["place"][image].as_py()[2 * flipped:][:2])
        return record["mean"], record["std"]

    def size(self, image: int) -> list[int]:
        """Pixels: original height and width; of the cut in the scaled picture top, left, and left where it is mirrored."""
        return self._images["size"][image].as_py()

    def text(self, prompt: int) -> tuple[np.ndarray, np.ndarray | None]:
        """tokens [L, D], pooled [D'] or None: read-only views."""
        return self._embedding(self._prompts["place"][prompt].as_py())

    def unconditional(self) -> tuple[np.ndarray, np.ndarray | None]:
        return self._embedding(self._unconditional)

    def _embedding(self, place: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        record = self._texts.read(*place)
        return record["tokens"], record.get("pooled")

    def prompt(self, number: int) -> str:
        return self._prompts["text"][number].as_py()

    def files(self) -> Iterator[tuple[Path, int, int]]:
        """(path, size, time of change) of every picture file read; size -1 for one that was missing."""
        for batch in self._files.to_batches():
            for file in batch.to_pylist():
                yield Path(os.fsdecode(file["path"])), *file["stat"]


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
        if (content["version"], content["index"]) == (VERSION, INDEX) and short(content, 64) == claimed:
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
