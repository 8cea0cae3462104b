"""What is in a preference data set, before anything is encoded: counts, ties, duplicates, leakage, sizes, and a sample."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from .. import rng
from ..errors import DataError, ResourceError
from . import buckets as shapes
from .columns import Row, Tally, has_validation, normalised, nothing_left, read_rows
from .images import decode
from .prompts import read_prompts
from .spec import DataSpec

NAMED = 20  # examples of each finding
SIZES = 20  # most frequent picture sizes that are listed

Look = Callable[[Row, list[Image.Image], str], None]


def check(spec: DataSpec, *, resolution: int, spatial_factor: int = 8, seed: int = 0, sample_path: Path | str | None = None,
          samples: int = 12, look: Look | None = None) -> dict:
    """Reads every row and decodes every picture once; loads no model. Bad rows and ties are reported whatever the recipe says
    about them, and ``problems`` says what a training run would refuse or should be warned of.

    sample_path: PNG with some groups, the best picture beside the worst. look: is shown every group with its pictures and the
    layout's name. Returns a plain dict, ready for JSON. Raises DataError when no group is left or the data set cannot be read.
    """
    options = shapes.buckets(resolution, spatial_factor, spec.aspect_ratio_buckets)
    reading = replace(spec, bad_rows="skip", ties="soft" if spec.ties == "soft" else "drop")
    tally, found = Tally(), _Findings(options, spec, seed, samples)
    for row in read_rows(reading, tally, seed=seed):
        try:
            pictures = found.take(row)
        except DataError as error:
            tally.skip(str(error))
            continue
        if look is not None:
            look(row, pictures, tally.layout)
    if not found.groups:
        raise nothing_left(reading, tally, "train")
    result = found.result(tally)
    result["leakage"] = _leakage(spec, reading, found, seed)
    result["problems"] = _problems(spec, result)
    if sample_path is not None:
        found.draw(Path(sample_path))
        result["sample"] = str(sample_path)
    return result


@dataclass
class _Findings:
    """Counts over the rows; keeps hashes and prompts, and the pictures of the sample alone."""

    options: list[tuple[int, int]]
    spec: DataSpec
    seed: int
    samples: int
    groups: int = 0
    soft: int = 0
    unlike_sizes: int = 0
    enlarged: int = 0
    without_prompt: int = 0
    image_bytes: int = 0
    first_is_best: int = 0
    sides: int = 0
    images: set[bytes] = field(default_factory=set)
    prompts: dict[str, str] = field(default_factory=dict)  # normalised -> where first seen
    buckets: Counter = field(default_factory=Counter)
    candidates: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    labels: Counter = field(default_factory=Counter)
    pairs: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)  # prompt and pictures -> first row, its best picture
    repeated: list[str] = field(default_factory=list)
    conflicting: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    sample: list[tuple[str, Image.Image, Image.Image]] = field(default_factory=list)

    def take(self, row: Row) -> list[Image.Image]:
        """The row's pictures. Raises DataError for one that cannot be used; nothing of the row is counted then."""
        contents = [ref.read() for ref in row.images]
        pictures = [decode(content, ref.where, self.spec.max_pixels)
                    for content, ref in zip(contents, row.images, strict=True)]
        sizes = [(picture.height, picture.width) for picture in pictures]
        bucket = self.options[shapes.nearest(sizes, self.options)]
        for size, ref in zip(sizes, row.images, strict=True):
            shapes.plan(size, bucket, ref.where)
        self._count(row, sizes, bucket, contents)
        self._compare(row, [hashlib.sha256(content).digest() for content in contents])
        self._keep(row, pictures)
        return pictures

    def _count(self, row: Row, sizes: list[tuple[int, int]], bucket: tuple[int, int], contents: list[bytes]) -> None:
        self.groups += 1
        self.soft += row.soft is not None
        self.unlike_sizes += len(set(sizes)) > 1
        self.enlarged += sum(size[0] < bucket[0] or size[1] < bucket[1] for size in sizes)
        self.without_prompt += not row.prompt.strip()
        self.image_bytes += sum(map(len, contents))
        self.buckets[_size(bucket)] += 1
        self.candidates[len(sizes)] += 1
        self.sizes.update(map(_size, sizes))
        self.prompts.setdefault(normalised(row.prompt), row.where)
        if len(row.images) == 1:
            self.labels["liked" if row.utility[0] > 0 else "not liked"] += 1
        elif not row.tie:
            self.sides += 1
            self.first_is_best += row.utility[0] == max(row.utility)

    def _compare(self, row: Row, hashes: list[bytes]) -> None:
        self.images.update(hashes)
        if len(hashes) > 1 and len(set(hashes)) == 1:
            self.identical.append(row.where)
        best = b"" if row.tie else hashes[row.utility.index(max(row.utility))]
        key = hashlib.sha256(normalised(row.prompt).encode() + b"".join(sorted(hashes))).digest()
        where, first = self.pairs.setdefault(key, (row.where, best))
        if where != row.where:
            (self.repeated if first == best else self.conflicting).append(f"{where} and {row.where}")

    def _keep(self, row: Row, pictures: list[Image.Image]) -> None:
        """A keyed reservoir: every group has the same chance to be drawn."""
        place = len(self.sample)
        if place == self.samples:
            place = int(rng.generator(self.seed, "check", self.groups).integers(self.groups))
        if place < self.samples:
            best, worst = (pictures[row.utility.index(pick(row.utility))] for pick in (max, min))
            self.sample[place:place + 1] = [(row.prompt, best, worst)]

    def result(self, tally: Tally) -> dict:
        return {
            "layout": tally.layout, "rows": tally.rows, "groups": self.groups, "soft": self.soft,
            "ties": {"count": tally.ties, "policy": self.spec.ties}, "unlabelled": tally.unlabelled,
            "bad_rows": {"count": tally.bad_rows, "policy": self.spec.bad_rows, "named": tally.bad[:NAMED]},
            "candidates": {str(k): n for k, n in sorted(self.candidates.items())},
            "prompts": len(self.prompts), "groups_per_prompt": round(self.groups / len(self.prompts), 2),
            "images": len(self.images), "image_megabytes": round(self.image_bytes / 1e6, 1),
            "duplicates": {name: _named(rows) for name, rows in (
                ("same_pair", self.repeated), ("conflicting_labels", self.conflicting),
                ("identical_pictures", self.identical))},
            "first_is_best": round(self.first_is_best / self.sides, 4) if self.sides else None,
            "labels": dict(self.labels), "sizes": dict(self.sizes.most_common(SIZES)), "distinct_sizes": len(self.sizes),
            "unlike_sizes": self.unlike_sizes, "enlarged": self.enlarged, "without_prompt": self.without_prompt,
            "buckets": dict(self.buckets.most_common())}

    def draw(self, path: Path) -> None:
        from ..sampling.grid import grid

        prompts, best, worst = zip(*self.sample, strict=True)
        columns = {"picture": best} if set(self.candidates) == {1} else {"preferred": best, "rejected": worst}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            grid({name: list(column) for name, column in columns.items()}, list(prompts)).save(path)
        except OSError as error:
            raise ResourceError(f"{path}: cannot write the sample of the pairs ({error.strerror or error})") from None


def _leakage(spec: DataSpec, reading: DataSpec, found: _Findings, seed: int) -> dict:
    """Held-out prompts that are trained on: against ``heldout_prompts``, and against the validation part."""
    leaks = {}
    if spec.heldout_prompts is not None:
        leaks["heldout_prompts"] = _shared(found, read_prompts(spec.heldout_prompts, "data.heldout_prompts").texts)
    if has_validation(spec):
        rows = read_rows(replace(reading, bad_rows="skip"), Tally(), part="validation", seed=seed)
        leaks["validation"] = _shared(found, (row.prompt for row in rows))
    return leaks


def _shared(found: _Findings, prompts: Iterable[str]) -> dict:
    held_out = {normalised(prompt) for prompt in prompts}
    shared = sorted(held_out & set(found.prompts))
    # the same words in another order may mean something else: worth a look, but no problem by itself
    trained = {words(prompt): prompt for prompt in sorted(found.prompts)}
    near = [(prompt, trained[words(prompt)]) for prompt in sorted(held_out - set(shared)) if words(prompt) in trained]
    return {"prompts": len(held_out), "shared": len(shared), "named": [f"{found.prompts[p]}: {p}" for p in shared[:NAMED]],
            "near": len(near), "near_named": [f"{found.prompts[own]}: {own} ~ {held}" for held, own in near[:NAMED]]}


def words(prompt: str) -> frozenset[str]:
    """The distinct words of a prompt, without case, order or punctuation."""
    return frozenset(re.findall(r"\w+", normalised(prompt)))


def _problems(spec: DataSpec, result: dict) -> list[str]:
    """What a run would stop at, then what it would not see."""
    problems = []
    if result["bad_rows"]["count"] and spec.bad_rows == "refuse":
        problems.append(f"{result['bad_rows']['count']} bad rows stop the run; mend them or set data.bad_rows=skip")
    if result["ties"]["count"] and spec.ties == "refuse":
        problems.append(f"{result['ties']['count']} ties stop the run; remove them or set data.ties to drop or soft")
    for name, found in result["duplicates"].items():
        if found["count"]:
            problems.append(f"{found['count']} x {name.replace('_', ' ')}")
    if result["without_prompt"]:
        problems.append(f"{result['without_prompt']} groups have an empty prompt: they teach what is drawn without one")
    if result["enlarged"]:
        problems.append(f"{result['enlarged']} pictures are smaller than what they are trained at: enlarged, they teach blur")
    for name, found in result["leakage"].items():
        if found["shared"]:
            problems.append(f"{found['shared']} of {found['prompts']} prompts of {name} are trained on")
    if result["layout"] in ("pickapic", "scored") and result["groups"] >= 20 and result["first_is_best"] in (0.0, 1.0):
        problems.append("the preferred picture is always on the same side: fine for training, but check that labels are real")
    return problems


def _named(rows: list[str]) -> dict:
    return {"count": len(rows), "named": rows[:NAMED]}


def _size(size: tuple[int, int]) -> str:
    """Width x height, as people write it."""
    return f"{size[1]}x{size[0]}"
