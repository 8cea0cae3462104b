"""Wiring: a recipe in, files out. What the command line does, as functions; each returns what it found as a plain dict.

``printer`` takes one line of text: ``print`` for people, nothing for programs.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from . import build, data
from .config import Recipe, as_tree, dump
from .data.check import check as look_at
from .errors import ConfigError, ResourceError, UserError
from .evaluate.card import fused_name, write_card
from .evaluate.compare import Comparison, compare, lora_off_and_on, said
from .evaluate.files import write, write_json
from .evaluate.preference import before_and_after, heldout_preference
from .evaluate.prompts import read_prompts
from .evaluate.report import Run, write_grid, write_report
from .likelihood import Simple, implied_nats
from .methods import Preference
from .models.base import Denoiser
from .models.load import (
    encoder_facts,
    load_denoiser,
    load_pipeline,
    model_identity,
    save_pipeline,
)
from .models.lora import load as load_lora
from .models.weights import WeightBank
from .objectives import title_of
from .rewards import load_reward
from .sampling.scheduler import make_scheduler
from .train import fit, make_accelerator, world_of
from .train.checkpoint import check_writable, disk_errors

Printer = Callable[[str], None]
FACTS = ("base", "pairs", "step", "seconds", "wall_seconds", "heldout")  # of train.json, needed by a report
SUMMARY, LORA_FILE, PIPELINE = "train.json", "pytorch_lora_weights.safetensors", "pipeline"


def _silent(_: str) -> None:
    pass


# --- train ----------------------------------------------------------------------------------------------------------

def train(recipe: Recipe, printer: Printer = _silent) -> dict:
    """Encode what is not cached yet, train or resume, write the files that people use. Returns what train.json holds.

    Raises UserError children; Preempted (exit code 75) when a signal asked to stop after a saved checkpoint.
    """
    started, output_dir = time.monotonic(), Path(recipe.output_dir)
    base = model_identity(recipe.model)  # a wrong model is refused before anything is written
    build.check_before(recipe)
    check_writable(output_dir)
    accelerator = make_accelerator(recipe.train, output_dir)
    say = printer if accelerator.is_main_process else _silent
    pairs, heldout = build.caches(recipe, accelerator, say)
    encode_seconds = time.monotonic() - started
    stored, method = build.stored_of(recipe, pairs, world_of(accelerator)), build.method_of(recipe)
    bank = build.bank_of(recipe, method, accelerator, pairs)
    source = build.source_of(recipe, stored, bank, accelerator)
    for line in _derived(recipe, source, accelerator.num_processes):
        say(line)
    hooks = [_ResolvedConfig(recipe)] if accelerator.is_main_process else []
    summary = fit(hooks=hooks, method=method, bank=bank, source=source, spec=recipe.train, seed=recipe.seed,
                  output_dir=output_dir, config=as_tree(recipe), accelerator=accelerator, identity={"base": base},
                  metadata=_metadata(recipe),
                  validation=None if heldout is None else _validation(recipe, method, heldout, accelerator))
    facts = {**dataclasses.asdict(summary), "pairs": source.groups, "objective": _method_name(recipe), "base": base,
             "encode_seconds": encode_seconds, "wall_seconds": time.monotonic() - started, "seed": recipe.seed,
             "heldout": None if heldout is None else _heldout(recipe, method, bank, heldout, accelerator)}
    if accelerator.is_main_process:
        _finish(recipe, bank, facts)
    say(f"done: {output_dir} ({summary.step} steps, {summary.seconds:.0f} s of training)")
    return facts


class _ResolvedConfig:
    """config.resolved.yaml, written after the first step: a run that is refused leaves the file of the run before it."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.written = recipe, False

    def after_step(self, state, report) -> None:
        if not self.written:
            write(Path(self.recipe.output_dir) / "config.resolved.yaml", dump(self.recipe).encode())
        self.written = True


def _finish(recipe: Recipe, bank: WeightBank, facts: dict) -> None:
    """Files for people: the LoRA is written by the loop; a full fine-tune becomes a whole pipeline folder."""
    output_dir = Path(recipe.output_dir)
    if recipe.model.lora is None:
        _replace_pipeline(recipe, bank.denoiser, output_dir / PIPELINE)
        shutil.rmtree(output_dir / bank.denoiser.component, ignore_errors=True)  # the loop's copy of the same weights
    write_json(output_dir / SUMMARY, facts)
    run = _run(recipe, facts)
    write_report(output_dir, run, None)
    write_card(output_dir, run, json.loads((output_dir / "report.json").read_text()))


def _replace_pipeline(recipe: Recipe, denoiser: Denoiser, folder: Path) -> None:
    """An earlier pipeline of this run goes only when the new one is whole."""
    fresh = folder.with_name(f"{folder.name}.new")
    for leftover in (fresh, *folder.parent.glob(f".{fresh.name}.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    with disk_errors(f"cannot save {folder}", folder.parent, sum(p.nbytes for p in denoiser.module.parameters())):
        save_pipeline(recipe.model, denoiser, fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def _metadata(recipe: Recipe) -> dict[str, str]:
    """What travels in the header of the weights that people load."""
    facts = {"objective": _method_name(recipe), "base_model": recipe.model.pretrained_model_name_or_path,
             "fuse_lora": recipe.model.fuse_lora, "data": recipe.data.path, "beta": getattr(recipe.objective, "beta", None),
             "learning_rate": recipe.train.learning_rate}
    return {name: str(value) for name, value in facts.items() if value is not None}


# --- held-out preference accuracy -----------------------------------------------------------------------------------

def _validation(recipe: Recipe, method: Preference, cache, accelerator) -> Callable:
    def measure(bank, step: int) -> dict[str, float]:
        found = _measure(recipe, method, bank, cache, accelerator)
        return {} if found is None else found.figures()  # single pictures make no pair
    return measure


def _measure(recipe: Recipe, method: Preference, bank: WeightBank, cache, accelerator):
    """Every rank measures the whole held-out set, so all know the figure; the draws are keyed, so all get the same."""
    ctx = build.context(recipe, bank, accelerator)
    batches = data.fixed_batches(cache, max(1, 2 * recipe.train.train_batch_size), seed=recipe.seed)
    return heldout_preference(ctx, batches, against=_base_set(method, bank), device=accelerator.device,
                              weighting=getattr(recipe.likelihood, "weighting", Simple()))


def _base_set(method: Preference, bank: WeightBank) -> str | None:
    """What "before" is: the base, as origin or as a reference that stays; None where it is not in memory."""
    if method.objective.reference_free:
        return None
    if "origin" in bank.names:
        return "origin"
    return "reference" if "reference" in bank.names and not bank.rule.moves else None


def _heldout(recipe: Recipe, method: Preference, bank: WeightBank, cache, accelerator) -> dict | None:
    after = _measure(recipe, method, bank, cache, accelerator)
    known = _base_set(method, bank) is not None
    before = None if known or after is None else _likelihood_before(recipe, bank, cache, accelerator)
    return None if after is None else before_and_after(after, before)


def _likelihood_before(recipe: Recipe, bank: WeightBank, cache, accelerator):
    """Where training kept no base to measure: read it again, once, after training."""
    del bank
    base = WeightBank.build(load_denoiser(recipe.model, device=accelerator.device), recipe.model.lora, reads=("policy",),
                            seed=recipe.seed)
    return _measure(recipe, build.method_of(recipe), base, cache, accelerator)


# --- encode, check --------------------------------------------------------------------------------------------------

def encode(recipe: Recipe, printer: Printer = _silent) -> dict:
    """Build the cache of latents and text embeddings; several processes share the work."""
    accelerator = make_accelerator(recipe.train, Path(recipe.output_dir))
    caches = build.caches(recipe, accelerator, printer if accelerator.is_main_process else _silent)
    return {name: dict(cache.report) for name, cache in zip(("train", "validation"), caches) if cache is not None}


def check(recipe: Recipe, printer: Printer = _silent) -> dict:
    """Counts, ties, duplicates, leakage, sizes and derived numbers; draws sample pairs. Loads no weights."""
    facts, output_dir = encoder_facts(recipe.model), Path(recipe.output_dir)
    build.check_before(recipe)
    check_writable(output_dir)
    resolution = recipe.data.resolution or facts.default_resolution
    found = look_at(recipe.data, resolution=resolution, spatial_factor=facts.spatial_factor, seed=recipe.seed,
                    sample_path=output_dir / "check.png")
    for name, value in found.items():
        if name != "problems":
            printer(f"{name:24} {_brief(value)}")
    spec = recipe.train
    per_step = spec.train_batch_size * spec.gradient_accumulation_steps
    printer(f"{'groups a step':24} {per_step} ({spec.train_batch_size} x {spec.gradient_accumulation_steps} accumulated) "
            "for each process")
    printer(f"{'epochs':24} {spec.max_train_steps * per_step / max(1, found['groups']):.2f} with one process")
    elements = facts.latent_channels * (resolution // facts.spatial_factor) ** 2
    for line in _betas(recipe, elements):
        printer(line)
    for problem in found["problems"]:
        printer(f"problem: {problem}")
    write_json(output_dir / "check.json", found)
    return found


def _brief(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_brief(item)}" for key, item in list(value.items())[:8]) or "none"
    if isinstance(value, (list, tuple)):
        return f"{len(value)}" + (f" (first: {value[0]})" if value else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _derived(recipe: Recipe, source: data.Offline, processes: int) -> list[str]:
    spec = recipe.train
    per_step = spec.train_batch_size * spec.gradient_accumulation_steps * processes
    return [f"{source.groups} groups, {per_step} a step, {spec.max_train_steps} steps = "
            f"{spec.max_train_steps * per_step / source.groups:.2f} epochs", *_betas(recipe, source.elements)]


def _betas(recipe: Recipe, elements: int) -> list[str]:
    """The same beta in other conventions, for a latent of ``elements`` numbers."""
    beta = getattr(recipe.objective, "beta", None)
    if beta is None or recipe.objective.reference_free:
        return []
    unit = getattr(recipe.objective, "beta_unit", 1.0)
    other = implied_nats(unit * beta, elements)
    factor = {1.0: "1/2"}.get(unit, f"{unit / 2:g}")
    return [f"beta {beta:g} (mean error, factor {factor}) = kappa {other['kappa']:g} on mean errors = "
            f"{other['beta_eq14']:.4g} on summed errors (the paper's Eq. 14; {elements} latent elements)"]


# --- evaluate, grid -------------------------------------------------------------------------------------------------

def evaluate(recipe: Recipe, printer: Printer = _silent) -> dict:
    """Base beside aligned on the recipe's prompts: report.json, report.html, grid.png, README.md. Returns the report."""
    started, output_dir = time.monotonic(), Path(recipe.output_dir)
    facts = _trained(recipe)
    comparison = _compare(recipe)
    facts["total_seconds"] = facts["wall_seconds"] + time.monotonic() - started
    run = _run(recipe, facts)
    report = write_report(output_dir, run, comparison)
    write_card(output_dir, run, report)
    printer(report["sentence"])
    for drift in comparison.drift:
        if drift.flagged:
            printer(f"look out: {drift.name} moved from {drift.base:.3g} to {drift.aligned:.3g}")
    printer(f"report: {output_dir / 'report.html'}")
    return report


def grid(recipe: Recipe, printer: Printer = _silent) -> dict:
    """The comparison grid alone: only its own rows are drawn, no figure is made."""
    _trained(recipe)
    comparison = _compare(recipe, rows_only=True)
    path = Path(recipe.output_dir) / "grid.png"
    write_grid(path, _title(recipe), comparison)
    printer(f"grid: {path}")
    return {"grid": str(path)}


def _trained(recipe: Recipe) -> dict:
    """train.json of a finished run. Raises ConfigError where there is none."""
    if recipe.evaluate is None:
        raise ConfigError("evaluate: is missing; add the section, such as evaluate={prompts: prompts.txt, judge: scenes}")
    build.check_evaluate(recipe)
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
    judge = None if spec.judge is None else load_reward(spec.judge)
    if rows_only:
        spec = dataclasses.replace(spec, seeds=1)
        from . import rng
        seed = spec.seed if spec.seed is not None else recipe.seed
        texts = [texts[i] for i in sorted(rng.permutation(len(texts), seed, "grid")[:spec.grid_prompts].tolist())]
    with _both_sides(recipe) as (base, aligned):
        return compare(base, aligned, texts, judge, spec, run_seed=recipe.seed,
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


# --- words ----------------------------------------------------------------------------------------------------------

def _run(recipe: Recipe, facts: dict) -> Run:
    output_dir, lora = Path(recipe.output_dir), recipe.model.lora
    files = sorted(p.name for p in output_dir.glob("*.safetensors")) if lora else [PIPELINE]
    return Run(title=_title(recipe), method=_method_name(recipe), base_model=recipe.model.pretrained_model_name_or_path,
               fuse_lora=recipe.model.fuse_lora, sampling=said(recipe.evaluate) if recipe.evaluate else {},
               data=recipe.data.path, rank=lora.rank if lora else None, beta=getattr(recipe.objective, "beta", None),
               seed=recipe.seed, pairs=facts["pairs"], steps=facts["step"], train_seconds=facts["seconds"],
               total_seconds=facts.get("total_seconds", facts["wall_seconds"]), heldout=facts["heldout"],
               metrics=output_dir / "metrics.jsonl", config=as_tree(recipe), files=tuple(files),
               command=f"diffalign train {shlex.quote(str(output_dir / 'config.resolved.yaml'))}")


def _title(recipe: Recipe) -> str:
    kind = "full fine-tune" if recipe.model.lora is None else "LoRA"
    fused = f" + {fused_name(recipe.model.fuse_lora)}" if recipe.model.fuse_lora else ""
    return f"{_method_name(recipe)}, {kind}, on {Path(recipe.model.pretrained_model_name_or_path).name}{fused}"


def _method_name(recipe: Recipe) -> str:
    """What papers call it."""
    return title_of(recipe.objective)


__all__ = ["ResourceError", "UserError", "check", "encode", "evaluate", "grid", "train"]
