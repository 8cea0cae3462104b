"""``diffalign encode`` and ``diffalign check``: what comes before training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..config import Recipe
from ..data.check import check as look_at
from ..errors import ConfigError
from ..evaluate.check_page import page
from ..evaluate.files import clean, write_json, write_text
from ..evaluate.labels import Examples, Labels
from ..likelihood import CodeLikelihood
from ..models.load import encoder_facts
from ..rewards import check as check_reward
from ..train import make_accelerator
from ..train.checkpoint import check_writable
from . import parts
from . import reference as reference_errors
from .words import Printer, betas, silent


def encode(recipe: Recipe, printer: Printer = silent, reference: bool = False) -> dict:
    """Build the cache of latents and text embeddings; several processes share the work. reference: then the frozen
    reference's errors too. Raises UserError children.
    """
    _no_text(recipe, "encode", "text needs no cache: it is tokenised when a run starts")
    problem = reference_errors.unfit(recipe) if reference else None
    if problem:
        raise ConfigError(problem)
    accelerator = make_accelerator(recipe.train, Path(recipe.output_dir))
    say = printer if accelerator.is_main_process else silent
    caches = parts.caches(recipe, accelerator, say)
    found = {name: dict(cache.report) for name, cache in zip(("train", "validation"), caches) if cache is not None}
    return found | ({"reference": reference_errors.measure(recipe, caches[0], accelerator, say)} if reference else {})


def check(recipe: Recipe, printer: Printer = silent) -> dict:
    """Counts, ties, duplicates, balance, leakage, sizes, derived numbers, and where ``check.reward`` says so agreement with a
    reward: check.json, check.html with pairs to look at, check.png. Without that reward it loads no weights.
    """
    _no_text(recipe, "check", "it looks at pictures; `diffalign train` names the bad rows of text before it loads the model")
    facts, output_dir = encoder_facts(recipe.model), Path(recipe.output_dir)
    parts.check_before(recipe)
    if recipe.check.reward is not None:
        check_reward(recipe.check.reward)
    check_writable(output_dir)
    resolution = recipe.data.resolution or facts.default_resolution
    labels = Labels(recipe.check.reward, Examples(recipe.check.examples, recipe.seed))
    found = look_at(recipe.data, resolution=resolution, spatial_factor=facts.spatial_factor, seed=recipe.seed,
                    sample_path=output_dir / "check.png", look=labels.take)
    found |= labels.result()
    found["problems"] += labels.problems
    for line in _facts(found):
        printer(line)
    spec = recipe.train
    per_step = spec.train_batch_size * spec.gradient_accumulation_steps
    printer(f"{'groups a step':24} {per_step} ({spec.train_batch_size} x {spec.gradient_accumulation_steps} accumulated) "
            "for each process")
    printer(f"{'epochs':24} {spec.max_train_steps * per_step / max(1, found['groups']):.2f} with one process")
    elements = facts.latent_channels * (resolution // facts.spatial_factor) ** 2
    for line in betas(recipe, elements):
        printer(line)
    for problem in found["problems"]:
        printer(f"problem: {problem}")
    write_json(output_dir / "check.json", clean(found))
    write_text(output_dir / "check.html", page(recipe.data.path, found, labels.examples.kinds()))
    printer(f"pairs to look at: {output_dir / 'check.html'}")
    return found


def _no_text(recipe: Recipe, command: str, why: str) -> None:
    if isinstance(recipe.likelihood, CodeLikelihood):
        raise ConfigError(f"likelihood.kind: `diffalign {command}` is not for token music; it is read when a run starts")
    if parts.is_text(recipe):
        raise ConfigError(f"likelihood.kind: `diffalign {command}` is not for language models ({why})")
    if parts.is_audio(recipe):
        raise ConfigError(f"model: `diffalign {command}` is not for audio; it is encoded when a run starts")


SUCH_AS = "such as "


def _facts(found: dict) -> Iterator[str]:
    """What was counted, a line each; what was not asked for is left out. All of it is in check.json."""
    for name, value in found.items():
        if name == "problems" or value is None:
            continue
        for part, inner in value.items() if name == "leakage" else [("", value)]:
            yield f"{f'{name} {part}'.strip().replace('_', ' '):24} {_brief(inner) or 'none'}"


def _brief(value) -> str:
    """Empty where there is nothing; of a list, whose length stands beside it, the first."""
    if isinstance(value, dict):
        texts = [(str(key).replace("_", " "), _brief(item)) for key, item in list(value.items())[:8] if item != 0]
        return ", ".join(text if text.startswith(SUCH_AS) else f"{key}: {text}" for key, text in texts if text)
    if isinstance(value, (list, tuple)):
        return f"{SUCH_AS}{value[0]}" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
