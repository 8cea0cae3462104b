"""``diffalign evaluate`` and ``diffalign grid``: base and aligned side by side."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import rng
from ..config import Recipe
from ..data.prompts import read_prompts
from ..errors import ConfigError
from ..evaluate.card import write_card
from ..evaluate.compare import Comparison, compare, lora_off_and_on
from ..evaluate.report import write_grid, write_report
from ..models.load import load_pipeline, model_identity
from ..models.lora import load as load_lora
from ..sampling.scheduler import make_scheduler
from . import parts
from .words import LORA_FILE, PIPELINE, SUMMARY, Printer, run_of, silent, title

FACTS = ("base", "pairs", "step", "seconds", "wall_seconds", "heldout")  # of train.json, needed by a report


def evaluate(recipe: Recipe, printer: Printer = silent) -> dict:
    """Base beside aligned on the recipe's prompts: report.json, report.html, grid.png, README.md. Returns the report."""
    started, output_dir = time.monotonic(), Path(recipe.output_dir)
    facts = _trained(recipe)
    comparison = _compare(recipe)
    facts["total_seconds"] = facts["wall_seconds"] + time.monotonic() - started
    run = run_of(recipe, facts)
    report = write_report(output_dir, run, comparison)
    write_card(output_dir, run, report)
    printer(report["sentence"])
    for drift in comparison.drift:
        if drift.flagged:
            printer(f"look out: {drift.name} moved from {drift.base:.3g} to {drift.aligned:.3g}")
    printer(f"report: {output_dir / 'report.html'}")
    return report


def grid(recipe: Recipe, printer: Printer = silent) -> dict:
    """The comparison grid alone: only its own rows are drawn, no figure is made."""
    _trained(recipe)
    comparison = _compare(recipe, rows_only=True)
    path = Path(recipe.output_dir) / "grid.png"
    write_grid(path, title(recipe), comparison)
    printer(f"grid: {path}")
    return {"grid": str(path)}


def _trained(recipe: Recipe) -> dict:
    """train.json of a finished run. Raises ConfigError where there is none."""
    if recipe.evaluate is None:
        raise ConfigError("evaluate: is missing; add the section, such as evaluate={prompts: prompts.txt, judge: scenes}")
    parts.check_evaluate(recipe)
    path = Path(recipe.output_dir) / SUMMARY
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        base = {name: facts[name] for name in FACTS}["base"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path}: no finished training run here; run `diffalign train` first, "
                          "with the same output_dir") from None
    if base != model_identity(recipe.model):
        raise ConfigError(f"model.pretrained_model_name_or_path: {recipe.model.pretrained_model_name_or_path} is not what "
                          f"{recipe.output_dir} was trained on; name that model, or train in another output_dir")
    return facts


def _compare(recipe: Recipe, rows_only: bool = False) -> Comparison:
    spec = recipe.evaluate
    prompts = read_prompts(spec.prompts)
    texts = prompts.texts
    if rows_only:
        spec = dataclasses.replace(spec, seeds=1)
        seed = spec.seed if spec.seed is not None else recipe.seed
        texts = [texts[i] for i in sorted(rng.permutation(len(texts), seed, "grid")[:spec.grid_prompts].tolist())]
    with _both_sides(recipe) as (base, aligned):
        return compare(base, aligned, texts, spec.judge, spec, run_seed=recipe.seed,
                       categories=prompts.categories if not rows_only else None)


@contextmanager
def _both_sides(recipe: Recipe):
    """Base and aligned as stock diffusers pipelines, through the files that users get."""
    device = "cuda" if torch.cuda.is_available() and not recipe.train.cpu else "cpu"
    output_dir = Path(recipe.output_dir)
    pipe = _drawing(recipe, load_pipeline(recipe.model)).to(device)
    if recipe.model.lora is not None:
        if not (output_dir / LORA_FILE).is_file():
            raise ConfigError(f"{output_dir / LORA_FILE}: is missing; run `diffalign train` first")
        load_lora(pipe, output_dir / LORA_FILE)
        yield lora_off_and_on(pipe, recipe.evaluate)
        return
    if not (output_dir / PIPELINE).is_dir():  # or its name would pass for a hub id
        raise ConfigError(f"{output_dir / PIPELINE}: is missing; run `diffalign train` first, with model.lora=null")
    # the saved weights hold what was fused into their base
    aligned = load_pipeline(dataclasses.replace(recipe.model, pretrained_model_name_or_path=str(output_dir / PIPELINE),
                                                revision=None, variant=None, pretrained_vae_model_name_or_path=None,
                                                fuse_lora=None))
    yield pipe, _drawing(recipe, aligned).to(device)


def _drawing(recipe: Recipe, pipe):
    """The pipeline with the scheduler of the ``evaluate`` section."""
    spec = recipe.evaluate
    if spec.scheduler or spec.timestep_spacing:
        own = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
        pipe.scheduler = make_scheduler(own, spec.scheduler, spec.timestep_spacing)
    return pipe
