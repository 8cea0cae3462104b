"""Encoding once: pictures and prompts of a data set -> a cache; the trainer then loads no VAE and no text encoder.

Rows are streamed; only the pictures of a batch and a shard of records are in memory, and what was seen is in a ledger on the
disk. A row is taken whole or not at all. See cache.py for what lies where.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from .. import rng
from ..errors import DataError, ResourceError
from ..world import Single, World, on_first, together
from . import buckets as shapes
from .cache import INDEX, UNCONDITIONAL, VERSION, Cache, prompt_key, short
from .columns import ImageRef, Row, Tally, files_below, nothing_left, read_rows, refuse_or_skip, source_path
from .images import decode, pixels, probe
from .ledger import Ledger
from .spec import DataSpec
from .store import Store, Writer, publish_batches, sweep, write_aside
from .tars import shards

TABLES = (".parquet", ".arrow", ".csv", ".json", ".jsonl", ".ndjson", ".tar")
BLOCK, PIECE = 4096, 64  # rows of a table that are in memory while it is written: as Arrow's columns, as Python's objects
ALONE = Single()
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
           part: str = "train", facts: Facts | None = None, world: World = ALONE, progress: bool = True) -> CacheReport:
    """Build, resume or find the cache of one part ("train" or "validation") of a data set.

    encoders_factory is called only when something has to be encoded, or when ``facts`` is None. resolution: pixels.
    seed decides the held-out prompts and the places of random crops. world: its processes, which call this with the same
    arguments, each encode their own share of the records. Safe to kill at any moment, and to run twice at once. Raises
    DataError (bad data, by row) and ResourceError (disk); where one process does, all raise a UserError.
    """
    started, loaded, made = time.monotonic(), [], []

    def encoders():
        if not loaded:
            loaded.append(encoders_factory())
        return loaded[0]

    def find() -> str:
        job = _Job(spec, part, seed, resolution, facts or encoders(), Path(cache_dir), world, *source)
        made.extend([job, job.found()])
        return "found" if made[1] else ""

    # asked for once: a disk or hub that changes meanwhile must not give the processes two names for one cache
    source = json.loads(on_first(world, lambda: json.dumps(_source(spec, part))))
    # what one process does not see, all build again: they must take the same turn, and most of it is there
    found = all(together(world, find))
    job, report = made
    if not found:
        report = _build(job, encoders, progress)
    return CacheReport(**{**report, "manifest": job.manifest, "seconds": time.monotonic() - started})


class _Job:
    """One call of ``encode``: its arguments, where its stores lie, the name of its manifest. source, sure: see ``_source``."""

    def __init__(self, spec: DataSpec, part: str, seed: int, resolution: int, facts: Facts, folder: Path, world: World,
                 source: list, sure: bool):
        self.spec, self.part, self.seed, self.facts, self.world = spec, part, seed, facts, world
        self.buckets = shapes.buckets(resolution, facts.spatial_factor, spec.aspect_ratio_buckets)
        self.mirrors = (False, True) if spec.random_flip else (False,)
        names = {kind: f"{kind}s-{short([VERSION, facts.identity[part_], spec.cache_dtype])}"
                 for kind, part_ in (("latent", "vae"), ("text", "text"))}
        self.names, self.folder, self.sets = names, folder, folder / "sets"
        try:
            self.sets.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{self.sets}: cannot make the cache folder ({error.strerror}); set data.cache_dir") from None
        sweep(self.sets)
        sweep(self.sets, "looks-")
        self.source, self.sure = source, sure
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
        """The report of an earlier build, if it is whole and its source has not changed. Rank 0 asks for the files' dates: so
        many calls to a shared disk are enough once."""
        if not self.sure:
            return None
        try:
            cache = Cache(self.manifest)
            unchanged = self.world.rank > 0 or all(_stat(path) == (size, mtime) for path, size, mtime in cache.files())
        except DataError:
            return None
        return {**cache.report, "encoded_images": 0, "encoded_prompts": 0} if unchanged else None

    def owns(self, key: bytes) -> bool:
        """Records are dealt out to the processes by their key, so the same picture in two rows is encoded once."""
        return int.from_bytes(key[:8], "big") % self.world.size == self.world.rank


def _build(job: _Job, encoders: Callable, progress: bool) -> dict:
    """Look, scan and encode; then all processes hear what the others could not do and reach the same end. An error in one of
    these steps is one of all processes, so that none waits for another."""
    run = job.world.gather(uuid.uuid4().hex)[0]  # of rank 0: two runs over one data set do not meet in each other's files
    looks = [job.sets / f"looks-{run}-{rank}.json" for rank in range(job.world.size)]
    tally, ledger, made = Tally(), Ledger(job.sets), []

    def scan() -> str:
        made.append(_Encoding(job, ledger, encoders))
        _scan(job, ledger, made[0], tally, looks, progress)
        return json.dumps({key.hex(): why for key, why in made[0].failed.items()})

    def finish() -> None:
        made.append(_finished(job, made[0], ledger, failed, tally))

    with ExitStack() as stack:
        stack.callback(looks[job.world.rank].unlink, missing_ok=True)
        together(job.world, lambda: _look_at_share(job, stack.enter_context(ledger), looks))
        failed = {key: why for text in together(job.world, scan, DataError) for key, why in json.loads(text).items()}
        together(job.world, finish)
    return made[1]


def _scan(job: _Job, ledger: Ledger, work: _Encoding, tally: Tally, looks: list[Path], progress: bool) -> None:
    """All rows, and this process's share of their records."""
    _hear_looks(job, ledger, looks)
    work.unconditional()
    for row in _bar(read_rows(job.spec, tally, part=job.part, seed=job.seed), progress and job.world.rank == 0, job.part):
        _take(row, job, work, ledger, tally)
    work.finish()


def _finished(job: _Job, work: _Encoding, ledger: Ledger, failed: dict[str, str], tally: Tally) -> dict:
    """The report; rank 0 has written the set."""
    _drop_failed(job, work, ledger, failed, tally)
    if not ledger.count("grouped"):
        raise nothing_left(job.spec, tally, job.part) if not work.identical else DataError(
            f"{source_path(job.spec, job.part)[0]}: no group is left; {work.identical} hold the same picture twice")
    ledger.number()
    report = _report(job, tally, ledger, work)
    if job.world.rank == 0:
        _write_set(job, ledger, work, report)
    return {**report, "renewed": work.latents.corrupt + work.texts.corrupt}


def _take(row: Row, job: _Job, work: _Encoding, ledger: Ledger, tally: Tally) -> None:
    try:
        found = [_look(ref, job, ledger) for ref in row.images]
        for ref, look in zip(row.images, found, strict=True):
            if ref.path is not None:
                ledger.file(ref.path, look.stat)
        hashes = [look.known(ref, "digest") for ref, look in zip(row.images, found, strict=True)]
        if len(hashes) > 1 and len(set(hashes)) == 1:
            work.identical += 1
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
    ledger.add(row.id, row.prompt, prompt_key(row.prompt), bucket, row.soft, row.where,
               [(b"".join(picture.keys), picture.sizes) for picture in pictures], row.utility)


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


def _look(ref: ImageRef, job: _Job, ledger: Ledger) -> _Look:
    """What another process, or this one, has seen; a look now where no process was told to."""
    known = ledger.look(str(ref.path)) if job.world.size > 1 and ref.path is not None else None
    if known is None:
        return _Look.at(ref, job.spec.max_pixels)
    size, changed, digest, height, width, problem = known
    return _Look((size, changed), digest, None if height is None else (height, width), problem)


def _look_at_share(job: _Job, ledger: Ledger, looks: list[Path]) -> None:
    """Several processes deal the files out, so that each is read for its hash and size by one of them only (and once more by
    who encodes it). Pictures inside tables are looked at by all, who have them in memory. One process: nothing.

    looks: the file by which each process tells the others.
    """
    if job.world.size == 1:
        return
    with suppress(DataError):  # of a table: it is raised when the rows are taken
        for row in read_rows(job.spec, Tally(), part=job.part, seed=job.seed):
            for ref in row.images:
                name = str(ref.path)
                if (ref.path is not None and job.owns(hashlib.sha256(os.fsencode(name)).digest())
                        and ledger.look(name) is None):
                    look = _Look.at(ref, job.spec.max_pixels)
                    ledger.add_look(name, *look.stat, look.digest, *(look.size or (None, None)), look.problem)
    write_aside(looks[job.world.rank], (
        json.dumps([os.fsdecode(path), size, changed, digest and digest.hex(), *rest]).encode() + b"\n"
        for path, size, changed, digest, *rest in ledger.looks()))


def _hear_looks(job: _Job, ledger: Ledger, looks: list[Path]) -> None:
    if job.world.size == 1:
        return
    for path in looks:
        # swept away by another run, where this one was halted for an hour: what is not known is looked at anew
        with suppress(FileNotFoundError), path.open("rb") as lines:
            for name, size, changed, digest, *rest in map(json.loads, lines):
                ledger.add_look(name, size, changed, digest and bytes.fromhex(digest), *rest)


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

    @property
    def sizes(self) -> tuple[int, ...]:
        """As ``Cache.size``."""
        return (*self.crop.original, self.crop.top, self.crop.left, self.crop.left_flipped)


class _Encoding:
    """Queues what is missing and encodes it in batches. failed: key -> why, for records that must not be used. identical:
    groups of identical pictures."""

    def __init__(self, job: _Job, ledger: Ledger, encoders: Callable):
        self.job, self.ledger, self.encoders, self.failed, self.identical = job, ledger, encoders, {}, 0
        self.latents, self.texts = (Store(job.folder / job.names[kind], kind, ledger) for kind in ("latent", "text"))
        batch = job.spec.encode_batch_size
        self._latents, self._texts = Writer(self.latents, multiple=batch), Writer(self.texts, multiple=batch)
        self._queue: dict[int, list] = {}  # bucket -> (key, pixels as uint8 picture, where)
        self._prompts: list[tuple[bytes, str, str]] = []
        self.encoded_images = self.encoded_prompts = 0
        self._dtype = np.dtype(job.spec.cache_dtype)

    def images(self, pictures: list[_Picture], read: list[Callable[[], bytes]]) -> None:
        """Decodes every missing picture of a row before the first is queued: a row is taken whole or not at all."""
        fresh = []
        for picture, content in zip(pictures, read, strict=True):
            wanted = [(key, mirrored) for key, mirrored in zip(picture.keys, self.job.mirrors, strict=True)
                      if self._missing("latent", key)]
            if wanted:
                image = self._decode(content(), picture)
                fresh += [(picture.bucket, key, shapes.apply(image, picture.crop, mirrored), picture.where)
                          for key, mirrored in wanted]
        for bucket, key, image, where in fresh:
            if self.ledger.queue("latent", key):  # not the same picture twice in one row
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
        if self._missing("text", key):
            self.ledger.queue("text", key)
            self._prompts.append((key, row.prompt, row.where))
            if len(self._prompts) >= self.job.spec.encode_batch_size:
                self._encode_prompts()

    def unconditional(self) -> None:
        if self.job.world.rank == 0 and not self.ledger.knows("text", UNCONDITIONAL):
            tokens, pooled = self.encoders().unconditional()
            self._texts.add(UNCONDITIONAL, self._text(tokens, pooled, 0))
            self._texts.close()  # a shard of its own: the prompts' batches and shards begin together

    def finish(self) -> None:
        for bucket in list(self._queue):
            self._encode_images(bucket)
        self._encode_prompts()
        self._latents.close()
        self._texts.close()

    def _missing(self, kind: str, key: bytes) -> bool:
        return self.job.owns(key) and not self.ledger.knows(kind, key)

    def _encode_images(self, bucket: int) -> None:
        import torch

        keys, images, places = zip(*self._queue.pop(bucket), strict=True)
        mean, std = self.encoders().encode_images(torch.from_numpy(pixels(self._whole(images))))
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
        tokens, pooled = self.encoders().encode_prompts(self._whole(prompts))
        for i, key in enumerate(keys):
            record = self._text(tokens, pooled, i)
            if all(np.isfinite(value).all() for value in record.values()):
                self._texts.add(key, record)
                self.encoded_prompts += 1
            else:
                self._fail(key, f"{places[i]}: the text encoders' embedding of {prompts[i][:80]!r} is not finite")

    def _whole(self, items: Sequence) -> list:
        """A whole batch, the last item repeated: a batch of another size is rounded in another way, and a record must not
        depend on how many processes share the work."""
        return [*items, *[items[-1]] * (self.job.spec.encode_batch_size - len(items))]

    def _text(self, tokens, pooled, i: int) -> dict[str, np.ndarray]:
        found = {"tokens": tokens} if pooled is None else {"tokens": tokens, "pooled": pooled}
        with np.errstate(over="ignore"):  # too large for float16 becomes infinite, and is refused as such
            return {name: value[i].detach().float().cpu().numpy().astype(self._dtype) for name, value in found.items()}

    def _fail(self, key: bytes, why: str) -> None:
        if self.job.spec.bad_rows == "refuse":
            raise DataError(why)
        self.failed[key] = why


def _drop_failed(job: _Job, work: _Encoding, ledger: Ledger, failed: dict[str, str], tally: Tally) -> None:
    """A group lives only if all its records are in the cache."""
    work.latents.refresh()
    work.texts.refresh()
    for number, keys in ledger.pictures():
        if None in _places(ledger, keys):
            ledger.lose("picture", number)
    for number, key in ledger.prompts():
        if ledger.place("text", key) is None:
            ledger.lose("prompt", number)
    for owner, name in ledger.lost():
        lost = [key for keys in ledger.lost_keys(owner) for key in _split(keys)]
        why = next((failed[key.hex()] for key in lost if key.hex() in failed), "could not be decoded or encoded")
        refuse_or_skip(job.spec, tally, DataError(why if why.startswith(name) else f"{name}: {why}"))
        ledger.drop(owner)


def _split(keys: bytes) -> list[bytes]:
    return [keys[i:i + 32] for i in range(0, len(keys), 32)]


def _places(ledger: Ledger, keys: bytes) -> list[tuple[int, int] | None]:
    """(shard, row) of a picture's latent, and of the mirrored one where the recipe flips."""
    return [ledger.place("latent", key) for key in _split(keys)]


def _report(job: _Job, tally: Tally, ledger: Ledger, work: _Encoding) -> dict:
    return {"part": job.part, "layout": tally.layout, "rows": tally.rows, "groups": ledger.count("grouped"),
            "ties": tally.ties, "ties_are": {"drop": "dropped", "soft": "kept as soft labels",
                                             "refuse": "refused"}[job.spec.ties],
            "identical": work.identical, "unlabelled": tally.unlabelled, "bad_rows": tally.bad_rows, "bad": tally.bad,
            "images": ledger.count("used_picture"), "prompts": ledger.count("used_prompt"),
            "encoded_images": work.encoded_images, "encoded_prompts": work.encoded_prompts}


def _write_set(job: _Job, ledger: Ledger, work: _Encoding, report: dict) -> None:
    """The tables, in blocks, then the manifest."""
    unconditional = ledger.place("text", UNCONDITIONAL)
    used = {"latent": {shard for keys, *_ in ledger.used_pictures() for shard, _ in _places(ledger, keys)},
            "text": {unconditional[0], *(ledger.place("text", key)[0] for _, key in ledger.used_prompts())}}
    # by name, so that a build which was killed writes the same tables as one that was not
    shards = {kind: sorted(used[kind], key=store.names.__getitem__)
              for kind, store in (("latent", work.latents), ("text", work.texts))}
    number = {kind: {shard: i for i, shard in enumerate(shards[kind])} for kind in shards}

    def renumbered(kind: str, places: list[tuple[int, int]]) -> list[int]:
        return [value for shard, row in places for value in (number[kind][shard], row)]

    rows = {
        "groups": (asdict(group) for bucket in range(len(job.buckets)) for group in ledger.groups(bucket)),
        "images": ({"place": renumbered("latent", _places(ledger, keys)), "size": size}
                   for keys, *size in ledger.used_pictures()),
        "prompts": ({"text": text, "place": renumbered("text", [ledger.place("text", key)])}
                    for text, key in ledger.used_prompts()),
        "files": ({"path": path, "stat": stat} for path, *stat in ledger.files())}
    tables = {name: publish_batches(schema, _blocks(rows[name], schema), job.sets, f"{name}-").name
              for name, schema in _schemas(len(job.mirrors)).items()}
    content = {
        "version": VERSION, "index": INDEX, "identity": _identity(job, ledger), "family": job.facts.family,
        "spatial_factor": job.facts.spatial_factor, "buckets": job.buckets, "sizes": ledger.sizes(len(job.buckets)),
        "mirrored": len(job.mirrors) > 1, "k": ledger.largest(), "soft": ledger.soft(), "stores": job.names,
        "shards": {kind: [store.names[shard] for shard in shards[kind]]
                   for kind, store in (("latent", work.latents), ("text", work.texts))},
        "unconditional": renumbered("text", [unconditional]), "report": report, "tables": tables}
    content["sha256"] = short(content, 64)
    write_aside(job.manifest, json.dumps(content, indent=1).encode())


def _schemas(latents: int) -> dict[str, pa.Schema]:
    """latents: of a picture, 2 where it is also held mirrored."""
    whole, number = pa.int64(), pa.int32()
    return {
        "groups": pa.schema({"row": whole, "bucket": number, "prompt": number, "images": pa.list_(number),
                             "utility": pa.list_(pa.float32()), "soft": pa.float32()}),
        "images": pa.schema({"place": pa.list_(number, 2 * latents), "size": pa.list_(whole, 5)}),
        "prompts": pa.schema({"text": pa.large_string(), "place": pa.list_(number, 2)}),
        "files": pa.schema({"path": pa.large_binary(), "stat": pa.list_(whole, 2)})}


def _blocks(rows: Iterator[dict], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Of BLOCK rows each; only a PIECE of them at a time as Python's objects, which take ten times the room of Arrow's."""
    pieces = (pa.RecordBatch.from_pylist(piece, schema) for piece in iter(lambda: list(islice(rows, PIECE)), []))
    while block := list(islice(pieces, BLOCK // PIECE)):
        yield from pa.Table.from_batches(block).combine_chunks().to_batches()


def _identity(job: _Job, ledger: Ledger) -> str:
    """Hash of everything training reads: which records, in which order, with which labels. Paths and dates don't count.

    Column by column, as tables were hashed that lay in memory: the identity of a data set is in its checkpoints.
    """
    digest = hashlib.sha256(json.dumps([job.names, job.facts.family, job.buckets]).encode())

    def column(name: str, count: int, values: Iterable) -> None:
        digest.update(f"{name}:{count}".encode())
        for value in values:
            digest.update(value if isinstance(value, bytes) else repr(value).encode())

    groups, images, prompts = (ledger.count(table) for table in ("grouped", "used_picture", "used_prompt"))
    for name in ("row", "prompt", "bucket"):
        column(f"groups.{name}", groups, (getattr(group, name) for group in ledger.groups()))
    column("groups.soft", groups, (math.nan if group.soft is None else group.soft for group in ledger.groups()))
    column("groups.image", groups, (list(group.images) for group in ledger.groups()))
    column("groups.utility", groups, (list(group.utility) for group in ledger.groups()))
    column("images.keys", images, (keys for keys, *_ in ledger.used_pictures()))
    column("images.size", images, (size for _, *size in ledger.used_pictures()))
    column("prompts.text", prompts, (text for text, _ in ledger.used_prompts()))
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
            tables = sorted(files_below(local, TABLES))
            return [str(local.resolve()), split, [[str(p.relative_to(local)), *_stat(p)] for p in tables]], True
        if archives := shards(path):
            return [[str(Path(name).resolve()), *_stat(Path(name))] for name in archives], True
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
    return iter(tqdm(rows, desc=f"encode {part}", unit=" groups", disable=None if visible else True))
