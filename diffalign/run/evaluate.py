"""``diffalign evaluate`` and ``diffalign grid``: base, aligned and other models side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .. import rng
from ..config import Evaluation, Recipe, as_tree, dump, load_recipe
from ..data.prompts import read_prompts
from ..errors import ConfigError
from ..evaluate.card import write_card
from ..evaluate.compare import Comparison, compare
from ..evaluate.files import write
from ..evaluate.report import Run, write_gallery, write_grids, write_report
from ..train.checkpoint import check_writable, claimed
from ..world import on_first, world_of
from . import parts
from .entrants import Entrants
from .optimised import training_rewards
from .words import SUMMARY, TRAINED, Printer, run_of, silent

if TYPE_CHECKING:
    from .codes import CodeEntrants

FACTS = ("base", "pairs", "step", "seconds", "wall_seconds", "heldout")  # of train.json, needed by a report
RESOLVED = "evaluation.resolved.yaml"  # the recipe with its overrides: what repeats the evaluation


def evaluate(recipe: Recipe | Evaluation, printer: Printer = silent) -> dict:
    """All models on the recipe's prompts: report.json, report.html, grid.png, grid.webp, README.md. Returns the report.

    Several processes share the drawing; the first one writes.
    """
    started = time.monotonic()
    facts = _facts(recipe)
    entrants = _entrants(recipe)
    output_dir, accelerator = Path(recipe.output_dir), _accelerator(recipe)
    with _claimed(output_dir, accelerator):
        comparison = _compare(recipe, entrants, accelerator)
        run = _run(recipe, entrants, facts, time.monotonic() - started)
        if not accelerator.is_main_process:
            return {}
        write(output_dir / RESOLVED, dump(recipe).encode())
        report = write_report(output_dir, run, comparison)
        if facts is not None and comparison.subject == "pictures":  # the card tells how pictures are drawn
            write_card(output_dir, run, report)
    printer(report["sentence"])
    if report["strengths"]:
        printer(report["strengths"]["sentence"])
    for name, alarm in comparison.alarms.items():
        printer(f"{alarm.verdict}, {name}: {alarm.sentence}")
    printer(f"report: {output_dir / 'report.html'}")
    return report


def grid(recipe: Recipe | Evaluation, printer: Printer = silent) -> dict:
    """The comparison grid alone, with all its seeds: only its own rows are drawn, no figure is made."""
    facts = _facts(recipe)
    entrants = _entrants(recipe)
    output_dir, accelerator = Path(recipe.output_dir), _accelerator(recipe)
    with _claimed(output_dir, accelerator):
        comparison = _compare(recipe, entrants, accelerator, rows_only=True)
        if not accelerator.is_main_process:
            return {}
        written = write_grids(output_dir, _run(recipe, entrants, facts, 0.0).title, comparison, page=True)
        if comparison.subject == "pictures":  # the arena shows them
            written["gallery.jsonl"] = write_gallery(output_dir / "gallery", comparison)
    for path in written.values():
        printer(f"grid: {path}")
    return {name: str(path) for name, path in written.items()}


@contextmanager
def _claimed(output_dir: Path, accelerator) -> Iterator[None]:
    """Nobody else writes there: two evaluations in one folder would mix their reports and pictures."""
    check_writable(output_dir)
    with ExitStack() as held:
        on_first(world_of(accelerator), lambda: held.enter_context(claimed(output_dir)))
        yield


def _facts(recipe: Recipe | Evaluation) -> dict | None:
    """train.json of the finished run, None without training. Raises ConfigError where something is missing."""
    if recipe.evaluate is None:
        raise ConfigError("evaluate: is missing; add the section, such as evaluate={prompts: prompts.txt, judge: scenes}")
    parts.check_evaluate(recipe)
    return None if isinstance(recipe, Evaluation) else _trained(recipe)


def _entrants(recipe: Recipe | Evaluation) -> Entrants | CodeEntrants:
    if not parts.is_text(recipe):
        return Entrants.of(recipe)
    from .codes import CodeEntrants  # a second's worth of transformers' models

    return CodeEntrants.of(recipe)


def _trained(recipe: Recipe) -> dict:
    path = Path(recipe.output_dir) / SUMMARY
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        base = {name: facts[name] for name in FACTS}["base"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path}: no finished training run here; run `diffalign train` first, "
                          "with the same output_dir") from None
    if base != parts.base_identity(recipe):
        raise ConfigError(f"model.pretrained_model_name_or_path: {recipe.model.pretrained_model_name_or_path} is not what "
                          f"{recipe.output_dir} was trained on; name that model, or train in another output_dir")
    return facts


def _accelerator(recipe: Recipe | Evaluation):
    cpu = recipe.cpu if isinstance(recipe, Evaluation) else recipe.train.cpu
    return parts.accelerator_to_draw(cpu, recipe.output_dir)


def _compare(recipe: Recipe | Evaluation, entrants: Entrants | CodeEntrants, accelerator,
             rows_only: bool = False) -> Comparison:
    spec = dataclasses.replace(recipe.evaluate, seed=recipe.seed if recipe.evaluate.seed is None else recipe.evaluate.seed)
    prompts = read_prompts(spec.prompts)
    texts, categories = prompts.texts, prompts.categories
    if rows_only:
        rows = sorted(rng.permutation(len(texts), spec.seed, "grid")[:spec.grid_prompts].tolist())
        texts, categories = [texts[i] for i in rows], None
    told = "\n".join(prompts.texts).encode()
    facts = {"prompts": {"path": spec.prompts, "count": len(prompts.texts), "sha256": hashlib.sha256(told).hexdigest()}}
    known = training_rewards(recipe)
    training, weights = (None, None) if known is None else zip(*known)
    return compare(entrants.stages(spec, accelerator.device), texts, spec, categories=categories, compared=entrants.compared,
                   strengths=entrants.strengths, training=training, weights=weights, facts=facts,
                   show_seeds=spec.seeds if rows_only else 1, extremes=0 if rows_only else 6, world=world_of(accelerator),
                   medium=entrants.medium, drawn_with=entrants.drawn_with(spec))


def _as_trained(recipe: Recipe) -> Recipe:
    """The recipe that made the weights, which may be another than the one given, with what that says of the evaluation."""
    path = Path(recipe.output_dir) / TRAINED
    if not path.is_file():
        return recipe
    return dataclasses.replace(load_recipe(path), output_dir=recipe.output_dir, evaluate=recipe.evaluate)


def _run(recipe: Recipe | Evaluation, entrants: Entrants | CodeEntrants, facts: dict | None, seconds: float) -> Run:
    command = f"diffalign evaluate {shlex.quote(str(Path(recipe.output_dir) / RESOLVED))}"
    if facts is not None:
        run = run_of(_as_trained(recipe), {**facts, "total_seconds": facts["wall_seconds"] + seconds})
        return dataclasses.replace(run, evaluate_command=command)
    base = recipe.model.pretrained_model_name_or_path
    return Run(title=f"{', '.join(entrants.compared)} beside {Path(base).name}", base_model=base, seed=recipe.seed,
               fuse_lora=recipe.model.fuse_lora, total_seconds=seconds, config=as_tree(recipe), command=command,
               evaluate_command=command)
