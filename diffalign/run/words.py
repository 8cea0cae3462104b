"""What the commands have in common: names of files, and what a recipe and a run are called."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from .. import data
from ..config import Recipe, as_tree
from ..data.stepwise import Stepwise
from ..evaluate.card import fused_name
from ..evaluate.compare import said
from ..evaluate.report import Run
from ..likelihood import CodeLikelihood, LatentScores, MaskedELBO, implied_nats
from ..models.spec import LANGUAGE_MODEL, LATENT_REWARD
from ..objectives import title_of
from .parts import made_by

Printer = Callable[[str], None]  # takes one line of text: ``print`` for people, nothing for programs
SUMMARY, LORA_FILE, PIPELINE = "train.json", "pytorch_lora_weights.safetensors", "pipeline"
TRAINED = "config.resolved.yaml"  # the recipe that a run was trained with
_SUBJECTS = {MaskedELBO: "answers", CodeLikelihood: "clips"}  # what a language model makes


def silent(_: str) -> None:
    pass


def derived(recipe: Recipe, source: data.Offline, processes: int) -> list[str]:
    spec = recipe.train
    per_step = spec.train_batch_size * spec.gradient_accumulation_steps * processes
    return [f"{source.groups} groups, {per_step} a step, {spec.max_train_steps} steps = "
            f"{spec.max_train_steps * per_step / source.groups:.2f} epochs", *betas(recipe, source.elements)]


def betas(recipe: Recipe, elements: int) -> list[str]:
    """The same beta in other conventions, for a latent of ``elements`` numbers."""
    beta = getattr(recipe.objective, "beta", None)
    if beta is None or recipe.objective.reference_free:
        return []
    if isinstance(recipe.likelihood, MaskedELBO):
        return [f"beta {beta:g} on log-likelihood bounds in nats per answer ({elements} tokens on average)"]
    if isinstance(recipe.likelihood, CodeLikelihood):
        return [f"beta {beta:g} on log-likelihoods in nats per clip ({elements} codes on average)"]
    unit = getattr(recipe.objective, "beta_unit", 1.0)
    other = implied_nats(unit * beta, elements)
    factor = {1.0: "1/2"}.get(unit, f"{unit / 2:g}")
    return [f"beta {beta:g} (mean error, factor {factor}) = kappa {other['kappa']:g} on mean errors = "
            f"{other['beta_eq14']:.4g} on summed errors (the paper's Eq. 14; {elements} latent elements)"]


def run_of(recipe: Recipe, facts: dict) -> Run:
    output_dir, lora = Path(recipe.output_dir), recipe.model.lora
    files = sorted(p.name for p in output_dir.glob("*.safetensors")) if lora else [whole_of(recipe)]
    return Run(title=title(recipe), method=method_name(recipe), base_model=recipe.model.pretrained_model_name_or_path,
               fuse_lora=recipe.model.fuse_lora, sampling=said(recipe.evaluate) if recipe.evaluate else {},
               data=recipe.data.path, rank=lora.rank if lora else None, beta=_beta(recipe),
               seed=recipe.seed, pairs=facts["pairs"], steps=facts["step"], train_seconds=facts["seconds"],
               total_seconds=facts.get("total_seconds", facts["wall_seconds"]), heldout=facts["heldout"],
               subject=_SUBJECTS.get(type(recipe.likelihood)) or made_by(recipe),
               metrics=output_dir / "metrics.jsonl", config=as_tree(recipe), files=tuple(files),
               command=f"diffalign train {shlex.quote(str(output_dir / TRAINED))}")


def _beta(recipe: Recipe) -> float | None:
    """As reports show it, with its unit, which is that of pictures."""
    other = isinstance(recipe.likelihood, (LatentScores, MaskedELBO, CodeLikelihood))
    return None if other else getattr(recipe.objective, "beta", None)


def whole_of(recipe: Recipe) -> str:
    """The folder that a run without LoRA writes: a pipeline, a latent reward model or a language model."""
    if isinstance(recipe.likelihood, (MaskedELBO, CodeLikelihood)):
        return LANGUAGE_MODEL
    return LATENT_REWARD if isinstance(recipe.likelihood, LatentScores) else PIPELINE


def title(recipe: Recipe) -> str:
    kind = "full fine-tune" if recipe.model.lora is None else "LoRA"
    fused = f" + {fused_name(recipe.model.fuse_lora)}" if recipe.model.fuse_lora else ""
    return f"{method_name(recipe)}, {kind}, on {Path(recipe.model.pretrained_model_name_or_path).name}{fused}"


def method_name(recipe: Recipe) -> str:
    """What papers call it: a method of steps by its judge, any other by its objective."""
    if isinstance(recipe.source, Stepwise):
        return recipe.source.judge.title
    own = " on its own samples" if recipe.source.reads_prompts_only else ""
    return (getattr(recipe.likelihood, "title", None) or title_of(recipe.objective)) + own
