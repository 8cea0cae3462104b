"""Rich feedback: a picture is criticised, the critique becomes edits, an editor carries them out, a reward names the better.

Rich Preference Optimization (arXiv 2503.11720): pairs of a picture and its edit differ in what was criticised. The paper's
thresholds are not public; the rules and defaults here are our own.

Stage by stage, so that one model is in memory at a time: records -> critiques -> edits in words -> edited pictures ->
scores -> pairs. Each stage keeps a journal of its own below ``work/``, named after everything that decides its content: a
killed run goes on without repeating a call, and another labeller starts from the pictures that are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from .. import rng
from ..data.columns import Row, Tally, detect_layout, nothing_left, read_rows
from ..data.images import decode
from ..data.spec import DataSpec, check_side
from ..data.store import write_aside
from ..errors import DataError
from ..rewards import Reward
from ..rewards import check as check_reward
from .editor import Editor
from .feedback import Critic, Failure, Instructor
from .fingerprint import MOST, probe
from .journal import Journal
from .judge import scored
from .pictures import MAX_PIXELS, fetch, store

PAIRS, RECORDS, FACTS, WORK = "pairs.jsonl", "records.parquet", "rich.json", "work"
UNIT = 32  # records that are asked about, or scored, between two writes
STATUSES = ("ok", "tie", "no_issue", "no_op", "broken", "parse_error", "unscored", "unanswered", "balanced_out")


@dataclass(frozen=True, kw_only=True)
class RichSpec:
    """What a recipe says about rich feedback.

    data: a data set of any layout with pictures; which: those of each group that are criticised, the one of the highest or of
    the lowest utility, or all; max_records: from the front. critic, instructor, editor, labeller: the stages.
    resolution: pictures of a larger area than its square are made smaller first, so that the editor does not; in any case
    both sides become multiples of the editor's. guard: the original of each pair goes through the editor too, with no edit,
    so that traces of the editor are on both pictures (at the cost of a second pass).
    tie: scores closer than this give no pair; null takes a tenth of the standard deviation of all scores. least_change,
    most_change: bounds on the root mean square difference of pixels in 0..1; below, nothing was edited; above, the picture was
    destroyed. least_score: edited pictures that score lower are broken too. balance: of the pairs that the edit wins and those
    that the original wins, keep equally many.
    """

    output_dir: str
    data: str
    critic: Critic
    instructor: Instructor
    editor: Editor
    labeller: Reward
    seed: int = 0
    which: Literal["all", "best", "worst"] = "all"
    max_records: int | None = None
    resolution: int | None = None
    guard: bool = True
    tie: float | None = None
    least_change: float = 0.01
    most_change: float = 0.5
    least_score: float | None = None
    balance: bool = False

    def __post_init__(self):
        for name in ("output_dir", "data"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; give a path")
        if self.max_records is not None and self.max_records < 1:
            raise ValueError(f"max_records must be at least 1, got {self.max_records}")
        check_side("resolution", self.resolution)
        if self.tie is not None and not 0 <= self.tie < math.inf:
            raise ValueError(f"tie must be a number from 0, got {self.tie}")
        if not 0 <= self.least_change < self.most_change <= 1:
            raise ValueError("least_change and most_change must lie in 0..1, least_change below most_change, got "
                             f"{self.least_change} and {self.most_change}")


@dataclass
class Record:
    """One picture and what became of it; the fields are filled stage by stage. image: as it was read, made to fit. original,
    edited: the two pictures that are compared; seed: the editor's. margin: the edit's score minus the original's. detail: why,
    in words. What is the same for all records, models and their options, is in rich.json.
    """

    id: str
    prompt: str
    source: str
    image: str
    critique: str | None = None
    instructions: list[str] = field(default_factory=list)
    seed: int | None = None
    original: str | None = None
    edited: str | None = None
    change: float | None = None
    score_original: float | None = None
    score_edited: float | None = None
    margin: float | None = None
    winner: Literal["edit", "original", "tie"] | None = None
    status: str | None = None
    detail: str | None = None

    def fail(self, failure: Failure) -> None:
        self.status, self.detail = ("unanswered" if failure.again else "parse_error"), failure.reason


def build_rich(spec: RichSpec, printer: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Write pairs.jsonl (prompt, chosen, rejected), records.parquet (every record with all that was said of it) and rich.json.

    Returns what rich.json holds: how many records have which status (their sum is the number of records), how often the edit
    won, and how well a probe tells edits from originals. Raises UserError children; DataError when no pair is left.
    """
    check(spec)
    folder = Path(spec.output_dir)
    records = _records(spec, folder)
    printer(f"{len(records)} pictures of {spec.data}")
    for stage, run in (("criticised", _criticise), ("instructed", _instruct), ("edited", _edit), ("scored", _label)):
        run(spec, folder, records)
        printer(f"{sum(record.status is None for record in records)} {stage}")
    tie = _verdicts(spec, records)
    if spec.balance:
        _balance(spec, records)
    facts = _facts(spec, folder, records, tie)
    _write(folder / RECORDS, _table(records))
    if not facts["statuses"]["ok"]:
        (folder / PAIRS).unlink(missing_ok=True)
        told = ", ".join(f"{count} {status}" for status, count in facts["statuses"].items() if count)
        raise DataError(f"{folder}: no pair is left of {len(records)} pictures ({told}); {RECORDS} says why of each")
    _write(folder / PAIRS, b"".join(_line(_pair(record)) for record in records if record.status == "ok"))
    _write(folder / FACTS, (json.dumps(facts, indent=2) + "\n").encode())
    printer(", ".join(f"{count} {status}" for status, count in facts["statuses"].items() if count))
    printer(f"done: {folder / PAIRS} ({facts['statuses']['ok']} pairs; the edit wins {facts['edit_wins']:.0%})")
    return facts


def check(spec: RichSpec) -> None:
    """What can be refused before a picture is read, files before services. Raises UserError children.

    A service is looked for only where nothing was asked yet: a finished stage needs it no more.
    """
    folder = Path(spec.output_dir)
    if detect_layout(DataSpec(path=spec.data)) == "prompts":
        raise DataError(f"{spec.data}: has prompts and no pictures to criticise; draw some with `diffalign build` first")
    for part, stage in ((spec.editor, "pictures_edited"), (spec.critic, "critiques"), (spec.instructor, "edits")):
        if hasattr(part, "check") and not any(_journal(folder, stage, _identity(spec, stage))):
            part.check()
    check_reward(spec.labeller)


# --- the stages ------------------------------------------------------------------------------------------------------

def _records(spec: RichSpec, folder: Path) -> list[Record]:
    """Each picture with its prompt once, decoded and made to fit once."""
    fitted = {"resolution": spec.resolution, "multiple": spec.editor.multiple}
    journal, found = _journal(folder, "pictures", fitted), {}
    known = {line["id"]: line["image"] for line in journal}
    tally = Tally()
    reading = DataSpec(path=spec.data, ties="soft")
    for row in read_rows(reading, tally):
        for number in _chosen(row, spec.which):
            content = row.images[number].read()
            name = hashlib.sha256(row.prompt.encode() + b"\0" + hashlib.sha256(content).digest()).hexdigest()[:24]
            if name in found:
                continue
            if name not in known or not (folder / known[name]).is_file():
                where = row.images[number].where
                image = fit(decode(content, where, MAX_PIXELS), where=where, **fitted)
                known[name] = store(folder, image)
                journal.add({"id": name, "image": known[name]})
            found[name] = Record(id=name, prompt=row.prompt, source=row.images[number].where, image=known[name])
        if spec.max_records is not None and len(found) >= spec.max_records:
            break
    journal.close()
    if not found:
        raise nothing_left(reading, tally, "train")
    return list(found.values())[:spec.max_records]


def _chosen(row: Row, which: str) -> Sequence[int]:
    if which == "all":
        return range(len(row.images))
    return [row.utility.index((max if which == "best" else min)(row.utility))]


def fit(image: Image.Image, *, resolution: int | None, multiple: int, where: str) -> Image.Image:
    """At most ``resolution``^2 pixels, never enlarged or stretched, cropped in the middle to multiples. Raises DataError for a
    picture with a side below one multiple."""
    area = image.width * image.height
    factor = min(1.0, resolution / math.sqrt(area)) if resolution else 1.0
    if factor < 1:
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))),
                             Image.Resampling.LANCZOS)
    width, height = (side // multiple * multiple for side in image.size)
    if not width or not height:
        raise DataError(f"{where}: {image.width} x {image.height} pixels, less than the {multiple} that the editor needs")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _criticise(spec: RichSpec, folder: Path, records: list[Record]) -> None:
    def ask(part: list[Record]) -> list:
        return spec.critic([one.prompt for one in part], [fetch(folder, one.image) for one in part])

    for record, said in _stage("critiques", spec, folder, records, ask):
        if "error" in said:
            record.fail(Failure(reason=said["error"], again=said.get("again", False)))
        else:
            record.critique = said["answer"]


def _instruct(spec: RichSpec, folder: Path, records: list[Record]) -> None:
    def ask(part: list[Record]) -> list:
        return spec.instructor([one.prompt for one in part], [fetch(folder, one.image) for one in part],
                               [one.critique for one in part])

    for record, said in _stage("edits", spec, folder, records, ask):
        if "error" in said:
            record.fail(Failure(reason=said["error"], again=said.get("again", False)))
        elif not said["answer"]:
            record.status = "no_issue"
        else:
            record.instructions = said["answer"]


def _edit(spec: RichSpec, folder: Path, records: list[Record]) -> None:
    def draw(part: list[Record]) -> list:
        images = [fetch(folder, one.image) for one in part]
        seeds = [_seed(spec, one) for one in part]
        edited = spec.editor(images, [one.instructions for one in part], seeds)
        plain = spec.editor(images, [[] for _ in part], seeds) if spec.guard else images
        for one, image, *drawn in zip(part, images, plain, edited, strict=True):
            if any(picture.size != image.size for picture in drawn):
                raise ValueError(f"{type(spec.editor).__name__} made {drawn[1].size} of a picture of {image.size} ({one.id})")
        return [[store(folder, before), store(folder, after)] for before, after in zip(plain, edited, strict=True)]

    def there(line: dict) -> bool:
        return all((folder / name).is_file() for name in line["answer"])

    # the batches of an editor are part of its arithmetic, so a batch that a kill has cut is drawn again as it was
    for record, said in _stage("pictures_edited", spec, folder, records, draw, unit=spec.editor.batch_size, whole=True,
                                there=there):
        record.seed = _seed(spec, record)
        record.original, record.edited = said["answer"]
        record.change = _difference(fetch(folder, record.original), fetch(folder, record.edited))
        if record.change < spec.least_change:
            record.status = "no_op"
        elif record.change > spec.most_change:
            record.status = "broken"


def _seed(spec: RichSpec, record: Record) -> int:
    return rng.integer(spec.seed, f"edit|{record.id}") % 2**32


def _label(spec: RichSpec, folder: Path, records: list[Record]) -> None:
    def score(part: list[Record]) -> list:
        images = [fetch(folder, name) for one in part for name in (one.original, one.edited)]
        values = scored(spec.labeller, images, [one.prompt for one in part for _ in range(2)])
        return [values[i:i + 2] for i in range(0, len(values), 2)]

    for record, said in _stage("scores", spec, folder, records, score):
        record.score_original, record.score_edited = said["answer"]
        if None in said["answer"]:
            record.status = "unscored"


def _stage(name: str, spec: RichSpec, folder: Path, records: Sequence[Record], work: Callable[[list[Record]], list], *,
           unit: int = UNIT, whole: bool = False,
           there: Callable[[dict], bool] = lambda line: True) -> Iterator[tuple[Record, dict]]:
    """Every open record with its line of the stage's journal, made where it is missing. work: records -> answers, of which a
    Failure that may pass is not written down. whole: a unit of which anything is missing is worked on as a whole. there:
    whether what a line names still is.
    """
    todo = [record for record in records if record.status is None]
    journal = _journal(folder, name, _identity(spec, name))
    done = {line["id"]: line for line in journal if there(line)}
    with tqdm(total=len(todo), desc=name.replace("_", " "), unit="picture", disable=None) as bar:
        for start in range(0, len(todo), unit):
            part = todo[start:start + unit]
            missing = [record for record in part if record.id not in done]
            asked = part if whole and missing else missing
            for record, answer in zip(asked, work(asked) if asked else [], strict=True):
                line = {"id": record.id, **({"error": answer.reason} if isinstance(answer, Failure) else {"answer": answer})}
                if isinstance(answer, Failure) and answer.again:
                    line["again"] = True
                elif record.id not in done:
                    journal.add(line)
                done[record.id] = line
            bar.update(len(part))
    journal.close()
    return iter([(record, done[record.id]) for record in todo])


def _identity(spec: RichSpec, name: str) -> dict[str, Any]:
    """Everything that decides the content of a stage: its own part and those before it."""
    own = {"pictures": {"resolution": spec.resolution, "multiple": spec.editor.multiple}, "critiques": _part(spec.critic),
           "edits": _part(spec.instructor), "scores": _part(spec.labeller),
           "pictures_edited": {**_part(spec.editor), "seed": spec.seed, "guard": spec.guard}}
    order = ("pictures", "critiques", "edits", "pictures_edited", "scores")
    return {stage: own[stage] for stage in order[:order.index(name) + 1]}


def _part(part: Any) -> dict[str, Any]:
    return {"kind": type(part).__qualname__, **(part.identity() if hasattr(part, "identity") else {"options": repr(part)})}


def _journal(folder: Path, name: str, identity: dict[str, Any]) -> Journal:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return Journal(folder / WORK / f"{name}-{digest}")


def _difference(one: Image.Image, other: Image.Image) -> float:
    """Root mean square over pixels and channels, in 0..1."""
    a, b = (np.asarray(image, dtype=np.float64) / 255 for image in (one, other))
    return float(np.sqrt(np.square(a - b).mean()))


# --- the pairs -------------------------------------------------------------------------------------------------------

def _verdicts(spec: RichSpec, records: list[Record]) -> float:
    """Says who won, and returns the width of a tie. The edit is never assumed to win."""
    open_ = [record for record in records if record.status is None]
    scores = [score for record in open_ for score in (record.score_original, record.score_edited)]
    tie = spec.tie if spec.tie is not None else 0.1 * float(np.std(scores)) if scores else 0.0
    for record in open_:
        record.margin = record.score_edited - record.score_original
        if spec.least_score is not None and record.score_edited < spec.least_score:
            record.status = "broken"
        elif record.margin == 0 or abs(record.margin) < tie:
            record.status = record.winner = "tie"
        else:
            record.status, record.winner = "ok", "edit" if record.margin > 0 else "original"
    return tie


def _balance(spec: RichSpec, records: list[Record]) -> None:
    sides = [[one for one in records if one.status == "ok" and one.winner == winner] for winner in ("edit", "original")]
    fewer, more = sorted(sides, key=len)
    for record in sorted(more, key=lambda one: (rng.integer(spec.seed, f"balance|{one.id}"), one.id))[len(fewer):]:
        record.status = "balanced_out"


def _pair(record: Record) -> dict[str, Any]:
    """A row of the layout "chosen_rejected". The prompt is the input's, and no word of an edit is in it."""
    sides = {"edit": (record.edited, record.score_edited), "original": (record.original, record.score_original)}
    (chosen, high), (rejected, low) = sides[record.winner], sides["original" if record.winner == "edit" else "edit"]
    return {"id": record.id, "prompt": record.prompt, "chosen": chosen, "rejected": rejected, "chosen_score": high,
            "rejected_score": low, "gap": high - low, "winner": record.winner}


def _facts(spec: RichSpec, folder: Path, records: list[Record], tie: float) -> dict[str, Any]:
    counts = Counter(record.status for record in records)
    pairs = [record for record in records if record.status == "ok"]
    some = pairs[:MOST]
    told = probe([fetch(folder, one.original) for one in some], [fetch(folder, one.edited) for one in some])
    return {"records": len(records), "statuses": {status: counts[status] for status in STATUSES},
            "edit_wins": sum(one.winner == "edit" for one in pairs) / len(pairs) if pairs else None, "tie": tie,
            "guard": spec.guard, "probe": told, "labeller": spec.labeller.name,
            "stages": {name: _identity(spec, name)[name] for name in ("critiques", "edits", "pictures_edited", "scores")}}


def _table(records: Sequence[Record]) -> bytes:
    text, number = pa.string(), pa.float64()
    schema = pa.schema({"id": text, "prompt": text, "source": text, "image": text, "critique": text,
                        "instructions": pa.list_(text), "seed": pa.int64(), "original": text, "edited": text, "change": number,
                        "score_original": number, "score_edited": number, "margin": number, "winner": text, "status": text,
                        "detail": text})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([vars(record) for record in records], schema=schema), sink)
    return sink.getvalue()


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    write_aside(path, content, path.name, "choose an output_dir on another disk")
