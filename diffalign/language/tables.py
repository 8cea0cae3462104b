"""Preference tables of pictures as TRL's columns, and back: a vision-language model learns to judge as people did.

| ours (``data.columns.Row``) | TRL's DPO columns |
|---|---|
| two pictures, one preferred | images [A, B]; prompt: which fits better; chosen "A", rejected "B", or the other way round |
| a ranking of K | a row for each two that differ |
| one picture, liked or not | images [A]; prompt: does it fit; chosen "yes", rejected "no", or the other way round |

Which picture is A is a keyed coin, so that the place says nothing. Ties are left out, as they are in our own training, and
a soft label counts as certain: TRL's pairs know neither. Tables whose answers are texts (a report of a picture, preferred
over another) are TRL's own already: ``images``, ``prompt``, ``chosen``, ``rejected``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .. import rng
from ..data.columns import Row
from ..errors import DataError

WHICH = "Which picture fits the caption better, the first (A) or the second (B)? Answer with A or B. Caption: {caption}"
FITS = "Does the picture fit the caption? Answer with yes or no. Caption: {caption}"


def to_trl(rows: Iterable[Row], *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows for ``datasets.Dataset.from_list`` and TRL's DPOTrainer with a vision-language model. Pictures stay bytes; columns
    caption and row lead back. Raises DataError for a picture that is gone.
    """
    for row in rows:
        pictures = [{"bytes": image.read(), "path": None} for image in row.images]
        if len(pictures) == 1:
            yield _asked(FITS, row, pictures, ("yes", "no") if row.utility[0] > 0 else ("no", "yes"))
        for a, b in itertools.combinations(range(len(pictures)), 2):
            if row.utility[a] == row.utility[b]:
                continue
            if rng.generator(seed, "judge", row.id, a, b).random() < 0.5:
                a, b = b, a
            better = ("A", "B") if row.utility[a] > row.utility[b] else ("B", "A")
            yield _asked(WHICH, row, [pictures[a], pictures[b]], better)


def _asked(question: str, row: Row, pictures: list[dict], answers: tuple[str, str]) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    return {"images": pictures, "prompt": [{"role": "user", "content": question.format(caption=row.prompt)}], "chosen": chosen,
            "rejected": rejected, "caption": row.prompt, "row": row.id}


def from_trl(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The way back: rows of our layouts "pickapic" (jpg_0, jpg_1, label_0, caption) and "unpaired" (prompt, image, label),
    for a parquet or JSONL file that ``data.path`` can name. Raises DataError for a record that ``to_trl`` did not make.
    """
    for number, record in enumerate(records):
        images, said = record.get("images"), _answer(record, number)
        caption = record.get("caption")
        if not isinstance(caption, str) or not isinstance(images, (list, tuple)):
            raise DataError(f"record {number}: has no caption or no images; only rows made by to_trl lead back")
        if len(images) == 2 and said in ("A", "B"):
            yield {"jpg_0": images[0]["bytes"], "jpg_1": images[1]["bytes"], "label_0": float(said == "A"), "caption": caption}
        elif len(images) == 1 and said in ("yes", "no"):
            yield {"prompt": caption, "image": images[0]["bytes"], "label": int(said == "yes")}
        else:
            raise DataError(f"record {number}: {len(images)} pictures and the answer {said!r}; needed are two with A or B, or "
                            "one with yes or no")


def _answer(record: dict[str, Any], number: int) -> str:
    try:
        return record["chosen"][-1]["content"].strip()
    except (KeyError, IndexError, TypeError, AttributeError):
        raise DataError(f"record {number}: chosen holds no message") from None
