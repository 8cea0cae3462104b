"""``diffalign train``: encode what is not cached yet, train or resume, write the files that people use."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from .. import data
from ..config import Recipe, as_tree, dump
from ..evaluate.card import write_card
from ..evaluate.files import write, write_json
from ..evaluate.preference import before_and_after, heldout_codes, heldout_preference, heldout_scores, heldout_text
from ..evaluate.report import write_report
from ..likelihood import CodeLikelihood, LatentScores, Simple
from ..methods import Preference
from ..models.base import Denoiser
from ..models.load import save_pipeline
from ..models.weights import WeightBank
from ..train import fit, make_accelerator
from ..train.checkpoint import check_writable, disk_errors
from ..world import world_of
from . import parts, reference
from .monitor import Monitor
from .words import PIPELINE, SUMMARY, TRAINED, Printer, derived, method_name, run_of, silent


def train(recipe: Recipe, printer: Printer = silent) -> dict:
    """Encode what is not cached yet, train or resume, write the files that people use. Returns what train.json holds.

    Raises UserError children; Preempted (exit code 75) when a signal asked to stop after a saved checkpoint.
    """
    started, output_dir = time.monotonic(), Path(recipe.output_dir)
    base = parts.base_identity(recipe)  # a wrong model is refused before anything is written
    parts.check_before(recipe)
    check_writable(output_dir)
    accelerator = make_accelerator(recipe.train, output_dir)
    say = printer if accelerator.is_main_process else silent
    pairs, heldout = parts.caches(recipe, accelerator, say)
    encode_seconds = time.monotonic() - started
    stored, method = parts.stored_of(recipe, pairs, world_of(accelerator)), parts.method_of(recipe)
    stored.reference = reference.find(recipe, pairs, stored, accelerator.device, say)
    # held-out pairs are measured against the reference too, at draws of their own
    bank = parts.bank_of(recipe, method, accelerator, pairs, measured=stored.reference is not None and heldout is None)
    if stored.reference is not None:
        reference.check(stored.reference, recipe, stored, parts.context(recipe, bank, accelerator), accelerator.device)
    if recipe.train.compile != "off":
        problem = parts.compiled(recipe, bank, stored, accelerator)
        say(f"compile: the blocks run uncompiled ({problem})" if problem else "compile: the repeated blocks are compiled")
    source = parts.source_of(recipe, stored, bank, accelerator)
    for line in derived(recipe, source, accelerator.num_processes):
        say(line)
    hooks = [_ResolvedConfig(recipe)] if accelerator.is_main_process else []
    known, looked = {}, {}  # the reference's errors on held-out pairs, at every validation the same; validations by step
    summary = fit(hooks=hooks, method=method, bank=bank, source=source, spec=recipe.train, seed=recipe.seed,
                  output_dir=output_dir, config=as_tree(recipe), accelerator=accelerator, identity=parts.identity_of(recipe),
                  metadata=_metadata(recipe), monitor=None if recipe.monitor is None else Monitor(recipe, accelerator),
                  validation=None if heldout is None else _validation(recipe, method, heldout, accelerator, known, looked))
    facts = {**dataclasses.asdict(summary), "pairs": source.groups, "objective": method_name(recipe), "base": base,
             "encode_seconds": encode_seconds, "wall_seconds": time.monotonic() - started, "seed": recipe.seed,
             "heldout": None if heldout is None else _heldout(recipe, method, bank, heldout, accelerator, known, looked,
                                                              summary.step)}
    if accelerator.is_main_process:
        _finish(recipe, bank, facts)
    say(f"done: {output_dir} ({summary.step} steps, {summary.seconds:.0f} s of training)"
        + (f"; ended early: {summary.stopped}" if summary.stopped else ""))
    return facts


class _ResolvedConfig:
    """config.resolved.yaml, written after the first step: a run that is refused leaves the file of the run before it."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.written = recipe, False

    def after_step(self, state, report) -> None:
        if not self.written:
            write(Path(self.recipe.output_dir) / TRAINED, dump(self.recipe).encode())
        self.written = True


def _finish(recipe: Recipe, bank: WeightBank, facts: dict) -> None:
    """Files for people: the LoRA is written by the loop; a full fine-tune becomes a whole pipeline folder."""
    output_dir, lora = Path(recipe.output_dir), recipe.model.lora is not None
    if isinstance(recipe.likelihood, LatentScores) or parts.is_text(recipe) or (lora and parts.is_audio(recipe)):
        # the loop has written it; there is no pipeline to make a card for
        write_json(output_dir / SUMMARY, facts)
        write_report(output_dir, run_of(recipe, facts), None)
        return
    if recipe.model.lora is None:
        _replace_pipeline(recipe, bank.denoiser, output_dir / PIPELINE)
        shutil.rmtree(output_dir / bank.denoiser.component, ignore_errors=True)  # the loop's copy of the same weights
    write_json(output_dir / SUMMARY, facts)
    run = run_of(recipe, facts)
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
    facts = {"objective": method_name(recipe), "base_model": recipe.model.pretrained_model_name_or_path,
             "fuse_lora": recipe.model.fuse_lora, "data": recipe.data.path, "beta": getattr(recipe.objective, "beta", None),
             "learning_rate": recipe.train.learning_rate}
    return {name: str(value) for name, value in facts.items() if value is not None}


# --- held-out preference accuracy ---

def _validation(recipe: Recipe, method: Preference, cache, accelerator, known: dict, looked: dict) -> Callable:
    def measure(bank, step: int) -> dict[str, float]:
        looked[step] = found = _measure(recipe, method, bank, cache, accelerator, known)
        return {} if found is None else found.figures()  # single pictures make no pair
    return measure


def _measure(recipe: Recipe, method: Preference, bank: WeightBank, cache, accelerator, known: dict | None = None):
    """The processes share the held-out set, and all know the figure; the draws are keyed, so it is that of one process. known:
    of earlier measurements in this run (``heldout_preference``), for what is compared with never moves."""
    ctx, world = parts.context(recipe, bank, accelerator), world_of(accelerator)
    batches = data.fixed_batches(cache, max(1, 2 * recipe.train.train_batch_size), seed=recipe.seed)
    if isinstance(recipe.likelihood, LatentScores):
        return heldout_scores(ctx, batches, noise=recipe.likelihood.noise, device=accelerator.device, world=world)
    if isinstance(recipe.likelihood, CodeLikelihood):
        return heldout_codes(ctx, batches, recipe.likelihood, against=_base_set(method, bank), device=accelerator.device,
                             world=world)
    if parts.is_text(recipe):
        return heldout_text(ctx, batches, recipe.likelihood, against=_base_set(method, bank), device=accelerator.device,
                            world=world)
    return heldout_preference(ctx, batches, against=_base_set(method, bank), known=known, device=accelerator.device,
                              world=world, weighting=getattr(recipe.likelihood, "weighting", Simple()))


def _base_set(method: Preference, bank: WeightBank) -> str | None:
    """What "before" is: the base, as origin or as a reference that stays; None where it is not in memory."""
    if method.objective.reference_free:
        return None
    if "origin" in bank.names:
        return "origin"
    return "reference" if "reference" in bank.names and not bank.rule.moves else None


def _heldout(recipe: Recipe, method: Preference, bank: WeightBank, cache, accelerator, known: dict, looked: dict,
             step: int) -> dict | None:
    """For train.json. What a validation has measured is not measured again; of a resumed run some is missing."""
    after = looked[step] if step in looked else _measure(recipe, method, bank, cache, accelerator, known)
    if isinstance(recipe.likelihood, LatentScores):  # before training it knows nothing: validation_start has the figure
        return None if after is None else after.tree()
    if after is None:
        return None
    before = None
    if _base_set(method, bank) is None:
        before = looked[0] if 0 in looked else _likelihood_before(recipe, cache, accelerator)
    return before_and_after(after, before)


def _likelihood_before(recipe: Recipe, cache, accelerator):
    """Where training kept no base to measure: read it again, once, after training, to compute as the policy does."""
    base = WeightBank.build(parts.base_of(recipe, accelerator), recipe.model.lora, reads=("policy",), seed=recipe.seed)
    return _measure(recipe, parts.method_of(recipe), base, cache, accelerator)
