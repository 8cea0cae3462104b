"""Encoding once: pictures and prompts of a data set -> a cache; the trainer then loads no VAE and no text encoder.

Rows are streamed; only the pictures of a batch are in memory. A row is taken whole or not at all. See cache.py for what lies
where.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from .. import rng
from ..errors import DataError, ResourceError
from . import buckets as shapes
from .cache import UNCONDITIONAL, VERSION, Cache, prompt_key, short
from .columns import ImageRef, Row, Tally, nothing_left, read_rows, refuse_or_skip, source_path
from .images import decode, pixels, probe
from .spec import DataSpec
from .store import Store, Writer, publish, sweep, write_aside

TABLES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".ndjson")
LATENT_LIMIT = 1e3  # latents have unit variance; beyond this the VAE is broken, not the picture


class Facts(Protocol):
    """What the cache key needs to know of the encoders; ``models.Encoders`` has it all, without loading weights will do."""

    identity: dict[str, str]
    family: str
    spatial_factor: int


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What ``encode`` did. manifest: open it with ``Cache(report.manifest)``. bad: names of the rows left out, at most 1000.

    encoded_*: records encoded by this process now, the rest were in the cache. renewed: damaged shards set aside.
    """

    manifest: Path
    part: str
    layout: str
    rows: int
    groups: int
    ties: int
    ties_are: str
    identical: int
    unlabelled: int
    bad_rows: int
    bad: list[str]
    images: int
    prompts: int
    encoded_images: int = 0
    encoded_prompts: int = 0
    renewed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for people."""
        notes = [f"{self.ties} ties ({self.ties_are})" if self.ties else "",
                 f"{self.identical} groups of identical pictures dropped" if self.identical else "",
                 f"{self.unlabelled} rows without label" if self.unlabelled else "",
                 f"{self.bad_rows} bad rows skipped" if self.bad_rows else "",
                 f"{len(self.renewed)} damaged cache files renewed" if self.renewed else ""]
        return (f"{self.part}: {self.groups} groups of {self.rows} rows, {self.images} pictures "
                f"({self.encoded_images} encoded now), {self.prompts} prompts ({self.encoded_prompts} now), "
                f"{self.seconds:.1f} s" + "".join(f"; {note}" for note in notes if note))


def encode(spec: DataSpec, encoders_factory: Callable[[], object], *, cache_dir: Path | str, resolution: int, seed: int,
           part: str = "train", facts: Facts | None = None, rank: int = 0, world: int = 1,
           barrier: Callable[[], None] = lambda: None, progress: bool = True) -> CacheReport:
    """Build, resume or find the cache of one part ("train" or "validation") of a data set.

    encoders_factory is called only when something has to be encoded, or when ``facts`` is None. resolution: pixels.
    seed decides the held-out prompts and the places of random crops. With several processes each encodes its own share of
    the records; every process calls this with the same arguments and a barrier. Safe to kill at any moment, and to run
    twice at once. Raises DataError (bad data, by row) and ResourceError (disk), the same on every rank.
    """
    started, loaded = time.monotonic(), []

    def encoders():
        if not loaded:
            loaded.append(encoders_factory())
        return loaded[0]

    job = _Job(spec, part, seed, resolution, facts or encoders(), Path(cache_dir), rank, world)
    report = job.found()
    if report is None:
        report = _build(job, encoders, barrier, progress)
    else:
        barrier()
    barrier()
    for kind in ("failures", "looks"):  # not earlier: the others read them between the barriers
        job.heard(kind, job.rank).unlink(missing_ok=True)
    return CacheReport(**{**report, "manifest": job.manifest, "seconds": time.monotonic() - started,
                          "renewed": job.latents.corrupt + job.texts.corrupt})


class _Job:
    """One call of ``encode``: its arguments, its stores and the name of its manifest."""

    def __init__(self, spec: DataSpec, part: str, seed: int, resolution: int, facts: Facts, folder: Path, rank: int,
                 world: int):
        self.spec, self.part, self.seed, self.facts, self.rank, self.world = spec, part, seed, facts, rank, world
        self.buckets = shapes.buckets(resolution, facts.spatial_factor, spec.aspect_ratio_buckets)
        self.mirrors = (False, True) if spec.random_flip else (False,)
        names = {kind: f"{kind}s-{short([VERSION, facts.identity[part_], spec.cache_dtype])}"
                 for kind, part_ in (("latent", "vae"), ("text", "text"))}
        self.names = names
        self.latents, self.texts = Store(folder / names["latent"]), Store(folder / names["text"])
        self.sets = folder / "sets"
        try:
            self.sets.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.sets}: cannot make the cache folder ({error.strerror}); set data.cache_dir") from None
        sweep(self.sets)
        sweep(self.sets, "failures-")
        sweep(self.sets, "looks-")
        self.source, self.sure = _source(spec, part)
        self.id = short([VERSION, part, resolution, facts.family, facts.spatial_factor, sorted(names.values()), self.source,
                          *self._options()])
        self.manifest = self.sets / f"{self.id}.json"

    def _options(self) -> list:
        spec = self.spec
        seeded = self.seed if spec.validation_share or not spec.center_crop else None
        return [spec.layout, spec.image_root, spec.max_train_samples, spec.ties, spec.bad_rows, spec.max_pixels,
                spec.aspect_ratio_buckets, spec.center_crop, spec.random_flip, spec.validation is not None,
                spec.validation_share, seeded]

    def found(self) -> dict | None:
        """The report of an earlier build, if it is whole and its source has not changed."""
        if not self.sure:
            return None
        try:
            cache = Cache(self.manifest)
            unchanged = all(_stat(path) == (size, mtime) for path, size, mtime in cache.files())
        except DataError:
            return None
        return {**cache.report, "encoded_images": 0, "encoded_prompts": 0} if unchanged else None

    def owns(self, key: bytes) -> bool:
        """Records are dealt out to the processes by their key, so the same picture in two rows is encoded once."""
        return int.from_bytes(key[:8], "big") % self.world == self.rank

    def heard(self, kind: str, rank: int) -> Path:
        """A file by which one process tells the others: "failures" or "looks"."""
        return self.sets / f"{kind}-{self.id}-{rank}.json"


def _build(job: _Job, encoders: Callable, barrier: Callable[[], None], progress: bool) -> dict:
    """Scan and encode; then all processes look at all results and reach the same end."""
    tally, groups = Tally(), _Groups()
    work, looks = _Encoding(job, encoders), _looks(job, barrier)
    fatal = None
    try:
        work.unconditional()
        for row in _bar(read_rows(job.spec, tally, part=job.part, seed=job.seed), progress and job.rank == 0, job.part):
            _take(row, job, work, groups, tally, looks)
        work.finish()
    except (DataError, ResourceError) as error:
        fatal = error
        if job.world == 1:
            raise
    write_aside(job.heard("failures", job.rank), json.dumps(
        {"fatal": fatal and str(fatal), "failed": {key.hex(): why for key, why in work.failed.items()}}).encode())
    barrier()
    failed = _failures(job)
    _drop_failed(job, groups, failed, tally)
    if not len(groups):
        raise nothing_left(job.spec, tally, job.part) if not groups.identical else DataError(
            f"{source_path(job.spec, job.part)[0]}: no group is left; {groups.identical} hold the same picture twice")
    report = _report(job, tally, groups, work)
    if job.rank == 0:
        _write_set(job, groups, report)
    return report


def _take(row: Row, job: _Job, work: _Encoding, groups: _Groups, tally: Tally, looks: dict[str, _Look]) -> None:
    try:
        found = [looks.get(str(ref.path)) or _Look.at(ref, job.spec.max_pixels) for ref in row.images]
        groups.files.update((str(ref.path), look.stat) for ref, look in zip(row.images, found, strict=True)
                            if ref.path is not None)
        hashes = [look.known(ref, "digest") for ref, look in zip(row.images, found, strict=True)]
        if len(hashes) > 1 and len(set(hashes)) == 1:
            groups.identical += 1
            return
        sizes = [look.known(ref, "size") for ref, look in zip(row.images, found, strict=True)]
        bucket = shapes.nearest(sizes, job.buckets)
        pictures = [_Picture.of(job, digest, size, bucket, ref.where)
                    for digest, size, ref in zip(hashes, sizes, row.images, strict=True)]
        work.images(pictures, [partial(look.read, ref) for ref, look in zip(row.images, found, strict=True)])
    except DataError as error:
        refuse_or_skip(job.spec, tally, error)
        return
    work.prompt(row)
    groups.add(row, bucket, pictures)


@dataclass(frozen=True, slots=True)
class _Look:
    """What is known of a picture without decoding it. stat: of its file. digest: SHA-256 of its bytes, None if they cannot be
    read. size: (height, width) in pixels, None when the header is bad. problem: what is wrong, without the row's name.
    content: its bytes, where this process has just read them.
    """

    stat: tuple[int, int] | None
    digest: bytes | None
    size: tuple[int, int] | None
    problem: str | None
    content: bytes | None = None

    @classmethod
    def at(cls, ref: ImageRef, max_pixels: int) -> _Look:
        stat, digest, content = None if ref.path is None else _stat(ref.path), None, None
        try:
            content = ref.read()
            digest = hashlib.sha256(content).digest()
            return cls(stat, digest, probe(content, ref.where, max_pixels), None, content)
        except DataError as error:
            return cls(stat, digest, None, str(error).removeprefix(ref.where), content)

    def known(self, ref: ImageRef, name: str):
        """digest or size; raises DataError naming the row where there is none."""
        value = getattr(self, name)
        if value is None:
            raise DataError(f"{ref.where}{self.problem}")
        return value

    def read(self, ref: ImageRef) -> bytes:
        """The bytes that were looked at, by whichever process."""
        if self.content is not None:
            return self.content
        content = ref.read()
        if hashlib.sha256(content).digest() != self.digest:
            raise DataError(f"{ref.where}: {ref.path} has changed while it was encoded; run the same command again")
        return content


def _looks(job: _Job, barrier: Callable[[], None]) -> dict[str, _Look]:
    """By path: several processes deal the files out, so that each is read for its hash and size by one of them only (and once
    more by who encodes it). Pictures inside tables are looked at by all, who have them in memory. One process: nothing."""
    if job.world == 1:
        return {}
    mine: dict[str, list] = {}
    with suppress(DataError):  # of a table: it is raised when the rows are taken
        for row in read_rows(job.spec, Tally(), part=job.part, seed=job.seed):
            for ref in row.images:
                name = str(ref.path)
                if ref.path is not None and name not in mine and job.owns(hashlib.sha256(os.fsencode(name)).digest()):
                    look = _Look.at(ref, job.spec.max_pixels)
                    mine[name] = [look.stat, look.digest and look.digest.hex(), look.size, look.problem]
    write_aside(job.heard("looks", job.rank), json.dumps(mine).encode())
    barrier()
    looks = {}
    for rank in range(job.world):
        for name, (stat, digest, size, problem) in json.loads(job.heard("looks", rank).read_bytes()).items():
            looks[name] = _Look(tuple(stat), digest and bytes.fromhex(digest), size and tuple(size), problem)
    return looks


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture in its crop. keys: of the latent, and of the mirrored one where the recipe flips."""

    crop: shapes.Crop
    bucket: int
    keys: tuple[bytes, ...]
    where: str

    @classmethod
    def of(cls, job: _Job, digest: bytes, size: tuple[int, int], bucket: int, where: str) -> _Picture:
        place = None
        if not job.spec.center_crop:  # by content, so that a picture in two rows keeps one crop and one latent
            place = tuple(rng.generator(job.seed, "crop", int.from_bytes(digest[:7], "big")).random(2))
        crop = shapes.plan(size, job.buckets[bucket], where, place)
        keys = tuple(hashlib.sha256(digest + json.dumps([crop.resized, crop.top, crop.left, crop.bucket, mirrored]).encode())
                     .digest() for mirrored in job.mirrors)
        return cls(crop, bucket, keys, where)


class _Encoding:
    """Queues what is missing and encodes it in batches. failed: key -> why, for records that must not be used."""

    def __init__(self, job: _Job, encoders: Callable):
        self.job, self.encoders, self.failed = job, encoders, {}
        batch = job.spec.encode_batch_size
        self._latents, self._texts = Writer(job.latents, multiple=batch), Writer(job.texts, multiple=batch)
        self._queue: dict[int, list] = {}  # bucket -> (key, pixels as uint8 picture, where)
        self._prompts: list[tuple[bytes, str, str]] = []
        self._seen: set[bytes] = set()
        self.encoded_images = self.encoded_prompts = 0
        self._dtype = np.dtype(job.spec.cache_dtype)

    def images(self, pictures: list[_Picture], read: list[Callable[[], bytes]]) -> None:
        """Decodes every missing picture of a row before the first is queued: a row is taken whole or not at all."""
        fresh = []
        for picture, content in zip(pictures, read, strict=True):
            wanted = [(key, mirrored) for key, mirrored in zip(picture.keys, self.job.mirrors, strict=True)
                      if self._missing(key, self.job.latents)]
            if wanted:
                image = self._decode(content(), picture)
                fresh += [(picture.bucket, key, shapes.apply(image, picture.crop, mirrored), picture.where)
                          for key, mirrored in wanted]
        for bucket, key, image, where in fresh:
            if key not in self._seen:  # the same picture twice in one row
                self._seen.add(key)
                queue = self._queue.setdefault(bucket, [])
                queue.append((key, image, where))
                if len(queue) >= self.job.spec.encode_batch_size:
                    self._encode_images(bucket)

    def _decode(self, content: bytes, picture: _Picture):
        try:
            return decode(content, picture.where, self.job.spec.max_pixels)
        except DataError as error:
            self.failed.update(dict.fromkeys(picture.keys, str(error)))  # for the processes that did not decode it
            raise

    def prompt(self, row: Row) -> None:
        key = prompt_key(row.prompt)
        if self._missing(key, self.job.texts):
            self._seen.add(key)
            self._prompts.append((key, row.prompt, row.where))
            if len(self._prompts) >= self.job.spec.encode_batch_size:
                self._encode_prompts()

    def unconditional(self) -> None:
        if self.job.rank == 0 and UNCONDITIONAL not in self.job.texts:
            tokens, pooled = self.encoders().unconditional()
            self._texts.add(UNCONDITIONAL, self._text(tokens, pooled, 0))
            self._texts.close()  # a shard of its own: the prompts' batches and shards begin together

    def finish(self) -> None:
        for bucket in list(self._queue):
            self._encode_images(bucket)
        self._encode_prompts()
        self._latents.close()
        self._texts.close()

    def _missing(self, key: bytes, store: Store) -> bool:
        return key not in store and key not in self._seen and self.job.owns(key)

    def _encode_images(self, bucket: int) -> None:
        import torch

        keys, images, places = zip(*self._queue.pop(bucket), strict=True)
        mean, std = self.encoders().encode_images(torch.from_numpy(pixels(list(images))))
        mean, std = (x.detach().float().cpu().numpy().astype(self._dtype) for x in (mean, std))
        for i, key in enumerate(keys):
            if _plausible(mean[i]) and _plausible(std[i]):
                self._latents.add(key, {"mean": mean[i], "std": std[i]})
                self.encoded_images += 1
            else:
                self._fail(key, f"{places[i]}: the VAE's latent is not finite or far out of range")

    def _encode_prompts(self) -> None:
        if not self._prompts:
            return
        keys, prompts, places = zip(*self._prompts, strict=True)
        self._prompts = []
        tokens, pooled = self.encoders().encode_prompts(list(prompts))
        for i, key in enumerate(keys):
            record = self._text(tokens, pooled, i)
            if all(np.isfinite(value).all() for value in record.values()):
                self._texts.add(key, record)
                self.encoded_prompts += 1
            else:
                self._fail(key, f"{places[i]}: the text encoders' embedding of {prompts[i][:80]!r} is not finite")

    def _text(self, tokens, pooled, i: int) -> dict[str, np.ndarray]:
        found = {"tokens": tokens} if pooled is None else {"tokens": tokens, "pooled": pooled}
        with np.errstate(over="ignore"):  # too large for float16 becomes infinite, and is refused as such
            return {name: value[i].detach().float().cpu().numpy().astype(self._dtype) for name, value in found.items()}

    def _fail(self, key: bytes, why: str) -> None:
        if self.job.spec.bad_rows == "refuse":
            raise DataError(why)
        self.failed[key] = why


class _Groups:
    """The groups found so far, in flat columns: some hundred bytes a group, whatever the size of the pictures."""

    def __init__(self):
        self.row, self.prompt, self.bucket, self.k = array("q"), array("i"), array("i"), array("i")
        self.soft, self.image, self.utility = array("f"), array("i"), array("f")
        self.images: dict[tuple[bytes, ...], int] = {}
        self.crops: list[_Picture] = []
        self.prompts: dict[str, int] = {}
        self.files: dict[str, tuple[int, int]] = {}
        self.where: list[str] = []
        self.identical = 0
        self.keep: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row) if self.keep is None else int(self.keep.sum())

    def add(self, row: Row, bucket: int, pictures: list[_Picture]) -> None:
        self.row.append(row.id)
        self.prompt.append(self.prompts.setdefault(row.prompt, len(self.prompts)))
        self.bucket.append(bucket)
        self.k.append(len(pictures))
        self.soft.append(float("nan") if row.soft is None else row.soft)
        self.utility.extend(row.utility)
        self.where.append(row.where)
        for picture in pictures:
            number = self.images.setdefault(picture.keys, len(self.images))
            if number == len(self.crops):
                self.crops.append(picture)
            self.image.append(number)

    def tables(self, job: _Job) -> dict[str, pa.Table]:
        """Only what the kept groups use, numbered anew in order of first use, so that the tables don't depend on bad rows."""
        k, keep = np.frombuffer(self.k, "i4"), self.keep
        member = np.repeat(keep, k)
        images, image = _renumber(np.frombuffer(self.image, "i4")[member])
        prompts, prompt = _renumber(np.frombuffer(self.prompt, "i4")[keep])
        offsets = pa.array(np.concatenate([[0], np.cumsum(k[keep])]).astype("i4"))
        texts, pictures = list(self.prompts), [self.crops[i] for i in images]
        return {
            "groups": pa.table({
                "row": np.frombuffer(self.row, "i8")[keep], "prompt": prompt,
                "bucket": np.frombuffer(self.bucket, "i4")[keep], "soft": np.frombuffer(self.soft, "f4")[keep],
                "image": pa.ListArray.from_arrays(offsets, pa.array(image)),
                "utility": pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(self.utility, "f4")[member]))}),
            "images": pa.table({
                "keys": pa.array([b"".join(p.keys) for p in pictures], pa.binary(32 * len(job.mirrors))),
                "size": _pairs([(*p.crop.original, p.crop.top, p.crop.left, p.crop.left_flipped) for p in pictures], 5)}),
            "prompts": pa.table({"text": pa.array([texts[i] for i in prompts], pa.large_string())}),
            "files": pa.table({"path": pa.array([os.fsencode(p) for p in self.files], pa.large_binary()),
                               "stat": _pairs(list(self.files.values()), 2)}),
        }


def _renumber(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values in order of first appearance, and the values as positions among them (int32)."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[inverse.reshape(-1)].astype("i4")


def _pairs(rows: list[tuple[int, ...]], width: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.array(rows, dtype="i8").reshape(-1)), width)


def _failures(job: _Job) -> dict[str, str]:
    """key -> why, of all processes. Raises the first fatal one, the same on every rank."""
    failed = {}
    for rank in range(job.world):
        if job.heard("failures", rank).is_file():
            found = json.loads(job.heard("failures", rank).read_bytes())
            if found["fatal"]:
                raise DataError(found["fatal"])
            failed.update(found["failed"])
    return failed


def _drop_failed(job: _Job, groups: _Groups, failed: dict[str, str], tally: Tally) -> None:
    """A group lives only if all its records are in the cache."""
    job.latents.refresh()
    job.texts.refresh()
    images = [all(key in job.latents for key in keys) for keys in groups.images]
    prompts = [prompt_key(text) in job.texts for text in groups.prompts]
    groups.keep = np.ones(len(groups.row), dtype=bool)
    if all(images) and all(prompts):
        return
    keys, texts, start = list(groups.images), list(groups.prompts), 0
    for i, k in enumerate(groups.k):
        members = groups.image[start:start + k]
        start += k
        lost = [key for member in members if not images[member] for key in keys[member]]
        lost += [] if prompts[groups.prompt[i]] else [prompt_key(texts[groups.prompt[i]])]
        if lost:
            groups.keep[i] = False
            why = next((failed[key.hex()] for key in lost if key.hex() in failed), "could not be decoded or encoded")
            refuse_or_skip(job.spec, tally, DataError(why if why.startswith(groups.where[i]) else f"{groups.where[i]}: {why}"))


def _report(job: _Job, tally: Tally, groups: _Groups, work: _Encoding) -> dict:
    tables = groups.tables(job)
    return {"part": job.part, "layout": tally.layout, "rows": tally.rows, "groups": len(groups), "ties": tally.ties,
            "ties_are": {"drop": "dropped", "soft": "kept as soft labels", "refuse": "refused"}[job.spec.ties],
            "identical": groups.identical, "unlabelled": tally.unlabelled, "bad_rows": tally.bad_rows, "bad": tally.bad,
            "images": len(tables["images"]), "prompts": len(tables["prompts"]),
            "encoded_images": work.encoded_images, "encoded_prompts": work.encoded_prompts}


def _write_set(job: _Job, groups: _Groups, report: dict) -> None:
    tables = groups.tables(job)
    content = {
        "version": VERSION, "identity": _identity(job, tables), "family": job.facts.family,
        "spatial_factor": job.facts.spatial_factor, "buckets": job.buckets, "mirrored": len(job.mirrors) > 1,
        "stores": job.names, "report": report,
        "tables": {name: publish(table, job.sets, f"{name}-").name for name, table in tables.items()}}
    content["sha256"] = short(content, 64)
    write_aside(job.manifest, json.dumps(content, indent=1).encode())


def _identity(job: _Job, tables: dict[str, pa.Table]) -> str:
    """Hash of everything training reads: which records, in which order, with which labels. Paths and dates don't count."""
    digest = hashlib.sha256(json.dumps([job.names, job.facts.family, job.buckets]).encode())
    for name in ("groups", "images", "prompts"):
        for column in tables[name].column_names:
            values = tables[name][column].to_pylist()
            digest.update(f"{name}.{column}:{len(values)}".encode())
            for value in values:
                digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()


# Sources.


def _plausible(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and np.abs(values).max() <= LATENT_LIMIT)


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    except (OSError, ValueError):
        return -1, 0


def _source(spec: DataSpec, part: str) -> tuple[list, bool]:
    """What tells this data set from another, and whether that is enough to trust an earlier build without reading it again."""
    path, split = source_path(spec, part)
    local = Path(path)
    try:
        if local.is_file():
            return [str(local.resolve()), *_stat(local)], True
        if local.is_dir():
            tables = sorted(path for path in local.rglob("*") if path.suffix in TABLES)
            return [str(local.resolve()), split, [[str(p.relative_to(local)), *_stat(p)] for p in tables]], True
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    commit = _commit(path, spec.revision)
    return [path, spec.name, split, commit], commit is not None


def _commit(name: str, revision: str | None) -> str | None:
    """The hub's commit of this data set, asked for unless the recipe pins it; None when the hub cannot be reached."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        from huggingface_hub import HfApi
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # offline, no such data set, wrong name: reading it will say so
        return None


def _bar(rows: Iterator[Row], visible: bool, part: str) -> Iterator[Row]:
    from tqdm import tqdm
    return iter(tqdm(rows, desc=f"encode {part}", unit=" groups", disable=not visible))
