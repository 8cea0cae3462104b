"""Scored candidates -> groups -> filters -> the table, and the counts of every stage."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.store import write_aside
from ..errors import DataError
from .draw import Plan
from .judge import Key
from .select import SELECTS
from .spec import BuildSpec
from .types import Candidate, Filter, Group
from .utility import utilities

SCORES = "scores.parquet"
SCHEMA = {"id": pa.string(), "prompt": pa.string(), "image": pa.string(), "model": pa.string(), "number": pa.int32(),
          "seed": pa.int64()}


def groups_of(spec: BuildSpec, plan: Plan, images: Mapping[tuple[str, int], str], scores: Mapping[Key, float]) -> list[Group]:
    """All groups with all their candidates, models outside, samples inside; utility NaN where a score is missing.

    Raises DataError naming what has not been drawn or scored.
    """
    names, groups = list(spec.rewards), []
    for row, (ident, prompt, category) in enumerate(zip(plan.ids, plan.prompts, plan.categories)):
        candidates = []
        for model, wanted in plan.wanted.items():
            for one in wanted[row * plan.samples:(row + 1) * plan.samples]:
                image = _there(images, (model, one.place), "picture")
                own = {name: _there(scores, (name, model, one.place, image), f"score of {name}") for name in names}
                candidates.append(Candidate(image=image, scores=own, model=model, seed=one.seed))
        utility = utilities(spec.utility, [one.scores for one in candidates], names)
        groups.append(Group(id=ident, prompt=prompt, candidates=tuple(candidates), utility=tuple(utility), category=category))
    return groups


def _there(table: Mapping, key: tuple, noun: str):
    if key not in table:
        raise DataError(f"the {noun} of {key} is missing although every process has finished; run the same command again")
    return table[key]


def scored_only(group: Group) -> Group:
    """Without the candidates that could not be scored."""
    kept = [n for n, value in enumerate(group.utility) if not math.isnan(value)]
    return Group(id=group.id, prompt=group.prompt, category=group.category, utility=tuple(group.utility[n] for n in kept),
                 candidates=tuple(group.candidates[n] for n in kept))


def filtered(groups: list[Group], filters: Sequence[Filter], folder: Path, seed: int) -> tuple[list[Group], list[dict]]:
    """The filters in turn, and what each reports. Raises DataError naming the one that left nothing, and why."""
    reports = []
    for one in filters:
        before, kept = len(groups), one(groups, folder=folder, seed=seed)
        groups = kept.groups
        reports.append({"filter": type(one).__name__, "groups_before": before, "groups_after": len(groups), **kept.report})
        if before and not groups:
            why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in kept.report.get("dropped", {}).items()
                            if count)
            raise DataError(f"filters: {type(one).__name__} leaves none of {before} groups ({why}); loosen its options, or "
                            "leave it out")
    return groups, reports


def make(spec: BuildSpec, plan: Plan, images: Mapping[tuple[str, int], str], scores: Mapping[Key, float],
         folder: Path) -> dict[str, Any]:
    """Write the table and scores.parquet; the counts, statistics and reports for build.json. Raises DataError when no row is
    left, with the counts that tell why.
    """
    every = groups_of(spec, plan, images, scores)
    groups = [group for group in map(scored_only, every) if len(group.candidates) > 1]
    lost = sum(math.isnan(value) for group in every for value in group.utility)
    left, reports = filtered(groups, spec.filters, folder, spec.seed)
    rows = {group.id: spec.select(group) for group in left}
    counts = {"prompts": len(every), "pictures": plan.pictures, "distinct_pictures": len(set(images.values())),
              "pictures_not_scored": lost, "groups_scored": len(groups), "groups_filtered": len(left),
              "groups_selected": sum(map(bool, rows.values())), "rows": sum(map(len, rows.values()))}
    _write(folder / SCORES, _score_table(every, list(spec.rewards), plan.samples))
    if not counts["rows"]:
        raise DataError(f"{folder}: no row is left: {counts['prompts']} prompts, {counts['groups_scored']} with two or more "
                        f"scored pictures, {counts['groups_filtered']} after the filters, none whose utilities differ by "
                        f"select.min_gap = {spec.select.min_gap:g}")
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for group in left for row in _plain(rows[group.id]))
    _write(folder / spec.select.table, "".join(f"{line}\n" for line in lines).encode())
    for other in {known.table for known in SELECTS.values()} - {spec.select.table}:
        (folder / other).unlink(missing_ok=True)  # of an earlier choice: a folder with two tables would not say which is meant
    return {"counts": counts, "filters": reports, "rewards": {name: _statistics(every, name) for name in spec.rewards},
            "models": _shares([group for group in left if rows[group.id]], spec)}


def _plain(rows: list[dict]) -> list[dict]:
    """NaN, of a reward that the utility does not read, becomes null."""
    def plain(value):
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value
    return [{name: plain(value) for name, value in row.items()} for row in rows]


def _score_table(groups: Sequence[Group], names: Sequence[str], samples: int) -> bytes:
    """Every candidate with its raw scores and its utility; null where it could not be scored."""
    rows = [{"id": group.id, "prompt": group.prompt, "image": one.image, "model": one.model, "number": n % samples,
             "seed": one.seed, **{f"score_{name}": _null(one.scores[name]) for name in names}, "utility": _null(utility)}
            for group in groups for n, (one, utility) in enumerate(zip(group.candidates, group.utility))]
    schema = {**SCHEMA, **{f"score_{name}": pa.float32() for name in names}, "utility": pa.float32()}
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), sink)
    return sink.getvalue()


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _statistics(groups: Sequence[Group], name: str) -> dict[str, Any]:
    """Of the raw scores of all pictures. spread: mean over groups of the standard deviation inside a group."""
    values = np.array([one.scores[name] for group in groups for one in group.candidates])
    inside = [np.std(own) for group in groups if len(own := [one.scores[name] for one in group.candidates
                                                             if not math.isnan(one.scores[name])]) > 1]
    known = values[~np.isnan(values)]
    if not known.size:
        return {"scored": 0, "not_scored": len(values)}
    low, median, high = np.quantile(known, (0.05, 0.5, 0.95))
    return {"scored": len(known), "not_scored": len(values) - len(known), "mean": known.mean(), "std": known.std(),
            "spread": float(np.mean(inside)) if inside else None, "least": known.min(), "p05": low, "median": median,
            "p95": high, "greatest": known.max()}


def _shares(groups: Sequence[Group], spec: BuildSpec) -> dict[str, dict[str, float]]:
    """By model: its share of the candidates, and of the groups that it won (equal best ones share a group).

    Where one model wins far more than its share, the data teach to look like it.
    """
    wins, candidates = dict.fromkeys(spec.models, 0.0), dict.fromkeys(spec.models, 0)
    groups = [group for group in groups if all(one.model is not None for one in group.candidates)]  # not drawn here: real rows
    for group in groups:
        best = [one.model for one, value in zip(group.candidates, group.utility) if value == max(group.utility)]
        for model in best:
            wins[model] += 1 / len(best)
        for one in group.candidates:
            candidates[one.model] += 1
    total = max(1, sum(candidates.values()))
    return {name: {"candidates": candidates[name] / total, "wins": wins[name] / max(1, len(groups))} for name in spec.models}


def _write(path: Path, content: bytes) -> None:
    write_aside(path, content, path.name, "choose an output_dir on another disk")
