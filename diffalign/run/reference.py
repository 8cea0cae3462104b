"""``diffalign encode CONFIG --reference``: the frozen reference's errors, once for every run over the same data.

They do not depend on the objective, its beta and link, or the learning rate: a sweep over these never runs the reference
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import data
from ..config import Recipe, as_tree
from ..data.cache import Cache, short
from ..data.reference import ReferenceErrors, prepare, write
from ..data.sources import Stored
from ..errors import DataError
from ..likelihood import DenoisingELBO
from ..methods import Context
from ..models.base import Denoiser
from ..models.load import model_identity
from ..objectives import title_of
from ..process import CURRENT
from ..train.feed import to_device
from ..types import Batch
from ..world import Single, together, world_of
from . import parts

VERSION = 2  # of everything that decides a number and is not in the identity: order, keys, noising, norms, the error itself
BLOCK = 1024  # groups a file, in whole steps: what a killed build loses at most, a process
ROUNDING = {"no": 1e-3, "bf16": 3e-2, "fp16": 1e-2}  # largest relative difference of an error that other kernels may make

Say = Callable[[str], None]


def unfit(recipe: Recipe) -> str | None:
    """Why the reference's error of a candidate is not a number that could be measured beforehand, or None."""
    title, estimator = title_of(recipe.objective), recipe.likelihood
    if recipe.objective.reference_free:
        return f"objective: {title} compares with no reference, so there is nothing to measure beforehand"
    if not isinstance(estimator, DenoisingELBO):
        return "likelihood.kind: only the errors of likelihood.kind=denoising can be measured beforehand"
    if not isinstance(recipe.source, Stored):
        return ("source.kind: with candidates that the model draws, the reference's errors cannot be measured beforehand; use "
                "source.kind=stored, or leave --reference out")
    if recipe.reference.moves:
        return ("reference.kind: the errors of a reference that moves cannot be measured beforehand; use "
                "reference.kind=frozen, or leave --reference out")
    if estimator.noise.forwards:
        return ("likelihood.noise: noise that inverts with the policy changes with it, so the reference's errors cannot be "
                "measured beforehand; use kind=shared or independent, or leave --reference out")
    if parts.method_of(recipe).anchor:
        return f"objective: {title} reads the base model's predictions, not only its errors; leave --reference out"
    return None


def folder_of(recipe: Recipe, cache: Cache, stored: data.Offline, device: torch.device) -> Path:
    """Where they lie. The name holds a hash of all that a number depends on beyond rounding: model, data and their order,
    seed, times, noise, draws, precision, kind of device. Batch size, number of processes and length of the run change
    nothing; with several buckets the size of a step does, which decides whose turn it is.
    """
    spec, estimator = recipe.train, recipe.likelihood
    several = sum(len(members) > 0 for members in cache.members) > 1
    kernels = [device.type, spec.enable_xformers_memory_efficient_attention, device.type == "cuda" and spec.allow_tf32]
    content = [VERSION, model_identity(recipe.model), cache.identity, recipe.seed, estimator.draws,
               *(as_tree(part) for part in (estimator.noise, estimator.times, estimator.sequence)),
               recipe.data.caption_dropout, recipe.data.random_flip, *map(str, parts.precision_of(recipe)), *kernels,
               stored.order.groups_per_step if several else None]
    return parts.cache_dir(recipe) / f"reference-{short(content)}"


def find(recipe: Recipe, cache: Cache, stored: data.Offline, device: torch.device, say: Say) -> ReferenceErrors | None:
    """The errors of every group of the run, where they were measured; None where the reference has to run."""
    if unfit(recipe) is not None:
        return None
    found = ReferenceErrors(folder_of(recipe, cache, stored, device))
    needed = recipe.train.max_train_steps * stored.order.groups_per_step
    count = found.holds(0, needed)
    if count == needed:
        say(f"reference: the errors of all {needed} groups were measured beforehand, so it does not run")
        return found
    if found.damaged:
        say(f"reference: {found.damaged} damaged files in {found.folder} were renamed to .corrupt; `diffalign encode CONFIG "
            "--reference` measures their groups again")
    if count:
        say(f"reference: {count} of the run's {needed} groups were measured beforehand, so it runs; `diffalign encode CONFIG "
            "--reference` with this number of steps, batch and processes measures the rest")
    return None


def check(found: ReferenceErrors, recipe: Recipe, stored: data.Offline, context: Context, device: torch.device) -> None:
    """One micro-batch again, by the model that training starts from: a number that another machine or library rounded
    differently beyond reason is refused. Raises DataError.
    """
    batch = stored.take(0)[0]
    there = batch.reference_error
    here = errors_of(recipe.likelihood, batch, context, device, CURRENT)
    apart = ((here - there).abs() / here.clamp(min=1e-12)).max().item()
    if not apart <= ROUNDING[recipe.train.mixed_precision]:
        raise DataError(f"{found.folder}: the reference's errors on disk differ from this model's by {apart:.1%}: they were "
                        "measured with another machine or library; remove the folder, or measure them again with `diffalign "
                        "encode CONFIG --reference`")


def measure(recipe: Recipe, cache: Cache, accelerator, say: Say) -> dict:
    """Measure what is missing, each process its own blocks of steps. Returns counts of groups. Raises UserError children."""
    world = world_of(accelerator)
    spec = recipe.train
    # a step of the whole world, in the micro-batches that training will take: the same kernels, hence the same bits
    whole = replace(spec, gradient_accumulation_steps=spec.gradient_accumulation_steps * world.size)
    stored = parts.stored_of(replace(recipe, train=whole), cache, Single())
    folder = folder_of(recipe, cache, stored, accelerator.device)
    groups = stored.order.groups_per_step

    def own() -> str:
        prepare(folder)
        there = ReferenceErrors(folder)
        steps = [step for step in range(spec.max_train_steps) if _block(step, groups) % world.size == world.rank]
        missing = [step for step in steps if there.holds(step * groups, (step + 1) * groups) < groups]
        if missing:
            _measure(missing, recipe, stored, folder, accelerator)
        return str(len(missing) * groups)

    counts = {"groups": spec.max_train_steps * groups, "measured": sum(map(int, together(world, own, DataError)))}
    say(f"reference: errors of {counts['groups']} groups ({counts['measured']} measured now) in {folder.name}")
    return counts


def _block(step: int, groups: int) -> int:
    return step // max(1, BLOCK // groups)


def _measure(steps: list[int], recipe: Recipe, stored: data.Offline, folder: Path, accelerator) -> None:
    """steps: rising. A file is a run of consecutive steps of one block."""
    context = base_passes(recipe, accelerator)
    groups, keys, errors = stored.order.groups_per_step, [], []
    visible = tqdm(steps, desc="reference", unit=" steps", disable=None if accelerator.is_main_process else True)
    for step, following in zip(visible, [*steps[1:], None]):
        for batch in stored.take(step):
            keys.append(batch.key)
            errors.append(errors_of(recipe.likelihood, batch, context, accelerator.device))
        if following != step + 1 or _block(following, groups) != _block(step, groups):
            count = sum(map(len, keys))
            write(folder, (step + 1) * groups - count, torch.cat(keys), torch.cat(errors))
            keys, errors = [], []


def base_passes(recipe: Recipe, accelerator) -> Context:
    """Passes of the model that training starts from, in the recipe's precision."""
    return parts.context(recipe, _Base(parts.base_of(recipe, accelerator)), accelerator)


@dataclass(frozen=True)
class _Base:
    """A bank of one weight set, the model that training starts from: it needs no adapter and no second copy."""

    denoiser: Denoiser

    def predict(self, _: str, *args):
        return self.denoiser(*args)


@torch.inference_mode()
def errors_of(estimator: DenoisingELBO, batch: Batch, context: Context, device: torch.device,
              name: str = "reference") -> Tensor:
    """What the named set makes of a batch, [B, K, draws] on the CPU."""
    return estimator.error(name, to_device(batch, device), context).cpu()
