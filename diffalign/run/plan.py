"""``diffalign plan CONFIG``: what a run will need, before anything is downloaded. Nothing is computed: the model is built on
the meta device and its operations and bytes are counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import Recipe
from ..data import detect_layout
from ..data.sources import Stored
from ..errors import ConfigError, ModelError
from ..evaluate.files import write_json
from ..likelihood import DenoisingELBO
from ..models import LoRA
from ..models.base import enable_gradient_checkpointing, narrow_norms, unwrap
from ..models.counts import flops, inputs, operations, peak_bytes
from ..models.load import inspect
from ..models.published import MODELS, on_meta
from ..models.weights import WeightBank
from ..process import CURRENT
from ..train.sharding import blocks
from . import parts
from .words import Printer, silent

GIB = 2**30
FACTOR = 8  # pixels a latent number, of every family here


@dataclass(frozen=True)
class Card:
    """memory: GiB. tflops: dense bfloat16 with float32 sums (a T4: float16), from its maker's data sheet."""

    memory: float
    tflops: float
    bf16: bool = True


CARDS = {
    "b200": Card(179, 2250), "h200": Card(140, 989), "h100": Card(80, 989), "a100-80": Card(80, 312), "a100-40": Card(40, 312),
    "l40s": Card(45, 362), "a10": Card(22.5, 125), "l4": Card(22.5, 121), "5090": Card(31.8, 209.5), "4090": Card(24, 165.2),
    "3090": Card(24, 71), "t4": Card(15, 65, bf16=False),
}
CUTS = ("none", "fsdp2", "zero2")
CONTEXT = 0.6 * GIB  # of CUDA and its libraries' kernels; an assumption
SLACK = 0.05  # of the rest, that the allocator leaves unused between blocks; an assumption


@dataclass(frozen=True, kw_only=True)
class Needs:
    """memory: bytes by part. tflop: of one group, which the method needs; spent: with what checkpointing runs again."""

    memory: dict[str, int]
    tflop: float
    spent: float

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def plan(recipe: Recipe, printer: Printer = silent, *, gpu: str = "h100", gpus: int = 1, sharding: str = "none",
         efficiency: float = 0.2, json: str | None = None) -> dict:
    """Memory, speed, hours and disk of ``train`` with this recipe on ``gpus`` of the named card. sharding: the name of a file
    in ``configs/accelerate`` by which the weights are cut over the cards. Raises UserError children.
    """
    card = CARDS.get(gpu.lower())
    if card is None:
        raise ConfigError(f"--gpu: no card called {gpu!r}; known are {', '.join(CARDS)}")
    if gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {gpus}")
    if not 0 < efficiency <= 1:
        raise ConfigError(f"--efficiency must be above 0 and at most 1, got {efficiency}")
    if not card.bf16 and recipe.train.mixed_precision == "bf16":
        raise ConfigError(f"train.mixed_precision: a {gpu} has no bfloat16; plan with train.mixed_precision=fp16")
    if sharding not in CUTS:
        raise ConfigError(f"--sharding: choose one of {', '.join(CUTS)}, got {sharding!r}")
    if sharding != "none" and not _can_be_cut(recipe, gpus):
        raise ConfigError(f"--sharding {sharding}: weights are cut over two GPUs or more (--gpus), with "
                          "train.optimizer=adamw and without train.mixed_precision=fp16")
    found = _Plan(recipe, gpus)
    printer(f"following one training pass of {found.facts['model']} without computing it (half a minute for SDXL)")
    needs = found.needs(recipe, sharding)
    count = found.count(recipe)
    result = found.facts | {"parameters": count.parameters, "trained": count.trained // 4,
                            "gpu": gpu.lower(), "gpus": gpus, "sharding": sharding, "efficiency": efficiency,
                            "memory_bytes": _budget(needs),
                            "tflop_per_group": needs.tflop, **_time(recipe, needs, card, gpus, efficiency)}
    total, limit = sum(result["memory_bytes"].values()), int(card.memory * GIB)
    result |= {"total_bytes": total, "limit_bytes": limit, "fits": total <= limit,
               "cache_bytes_per_1000_groups": found.cache_bytes(recipe)}
    result["instead"] = [] if result["fits"] else found.instead(limit, sharding)
    _say(result, printer)
    if json:
        write_json(Path(json), result)
    return result


@dataclass(frozen=True, kw_only=True)
class Count:
    """Of a model as it is trained. Bytes, with all weights trained in float32: weights, trained, copies (other weight sets),
    once and row (of a pass and its backward, whatever the rows, and of each); block and rest: of weights that are gathered
    together where they are cut, the largest block and what is in none. parameters: numbers. needed, spent: operations a row
    with its references, and with what checkpointing runs again.
    """

    parameters: int
    weights: int
    trained: int
    copies: int
    once: int
    row: int
    block: int
    rest: int
    needed: int
    spent: int


class _Plan:
    """The model on the meta device, and counts of it that several recipes share."""

    def __init__(self, recipe: Recipe, gpus: int = 1):
        _refuse(recipe)
        name = recipe.model.pretrained_model_name_or_path
        if os.path.isdir(os.path.expanduser(name)):
            folder, adapter = inspect(replace(recipe.model, fuse_lora=None))
            if adapter.audio:
                raise ConfigError("model: `diffalign plan` is not for audio; it counts models of pictures")
            self.layout = adapter.family, folder.config(adapter.component), folder.config("scheduler")
            source = "its folder"
        elif name in MODELS:
            self.layout, source = MODELS[name], "the published configuration"
        else:
            raise ModelError(f"model.pretrained_model_name_or_path: {name} is no folder here, and no configuration of it is "
                             f"shipped; download it, or plan with one of {', '.join(MODELS)}")
        self.recipe, self.gpus, self._counted = recipe, gpus, {}
        size = self.layout[1].get("sample_size") or 64
        self.side = (recipe.data.resolution or FACTOR * (min(size) if isinstance(size, list) else size)) // FACTOR
        self.candidates = _candidates(recipe)
        self.facts = {"model": name, "configuration": source, "resolution": FACTOR * self.side,
                      "candidates": self.candidates,
                      "groups_per_step": recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps}

    def needs(self, recipe: Recipe, sharding: str = "none") -> Needs:
        count, parts = self.count(recipe), self.gpus if sharding != "none" else 1
        draws = recipe.likelihood.draws
        rows, per_group = self.candidates * recipe.train.train_batch_size * draws, self.candidates * draws
        state = {"adamw": 2.0, "adamw_8bit": 0.5, "adafactor": 0.01}[recipe.train.optimizer]
        memory = {"weights": count.weights, "gradients": count.trained, "optimizer": int(state * count.trained),
                  "reference": count.copies, "moving average": count.trained if recipe.train.ema_decay else 0}
        memory = {name: size // parts for name, size in memory.items()}
        memory |= {"gathered": _gathered(count, sharding), "activations": count.once + rows * count.row}
        return Needs(memory={name: size for name, size in memory.items() if size},
                     tflop=per_group * count.needed / 1e12, spent=per_group * count.spent / 1e12)

    def count(self, recipe: Recipe) -> Count:
        """Of the model as this recipe trains it; not counted again where only the optimizer or the batch differs."""
        train = recipe.train
        key = recipe.model.lora, train.mixed_precision, train.gradient_checkpointing
        if key not in self._counted:
            self._counted[key] = _counted(recipe, self.layout, self.side)
        return self._counted[key]

    def cache_bytes(self, recipe: Recipe) -> int:
        """Of 1,000 groups whose prompts and pictures all differ: at most that."""
        width = {"float32": 4, "float16": 2}[recipe.data.cache_dtype]
        denoiser = on_meta(*self.layout)
        xt, _, cond = inputs(denoiser, 1, self.side, self.side)
        text = sum(x.numel() for x in (cond.tokens, cond.pooled) if x is not None)
        return 1000 * width * (self.candidates * 2 * xt.numel() * (1 + recipe.data.random_flip) + text)

    def instead(self, limit: int, sharding: str = "none") -> list[dict]:
        """Changes, each on top of those before, until it fits; all of them where nothing does."""
        def total(recipe: Recipe, sharding: str) -> int:
            return sum(_budget(self.needs(recipe, sharding)).values())

        tried, options = [], []
        for recipe, cut, option in _changes(self.recipe, sharding, self.gpus, lambda *how: total(*how) <= limit):
            options = [*options, option]
            tried.append({"options": options, "total_bytes": total(recipe, cut), "fits": total(recipe, cut) <= limit})
            if tried[-1]["fits"]:
                break
        return tried


def _counted(recipe: Recipe, layout: tuple, side: int) -> Count:
    method = parts.method_of(recipe)
    forward, stored = parts.precision_of(recipe)
    denoiser = on_meta(*layout, dtype=stored)
    if recipe.train.mixed_precision == "bf16":
        narrow_norms(denoiser)
    with torch.device("meta"):
        bank = WeightBank.build(denoiser, recipe.model.lora, reads=parts.sets_of(recipe, method), seed=recipe.seed,
                                forward_dtype=forward, rule=recipe.reference)
    denoiser.module.train()
    needed = flops(denoiser, 1, side, side)[1]
    spent = needed
    if recipe.train.gradient_checkpointing:
        enable_gradient_checkpointing(denoiser, selective=recipe.train.gradient_checkpointing == "selective")
        spent = flops(denoiser, 1, side, side)[1]
    # of one row and of two: the casts of weights do not grow with the rows
    one, two = (peak_bytes(denoiser, rows, side, side, dtype=forward) for rows in (1, 2))
    # a frozen copy in half precision needs autocast, which meta tensors have not; it has the policy's operations
    references = sum(operations(lambda name=name: bank.predict(CURRENT if recipe.model.lora is None else name,
                                                               *inputs(denoiser, 1, side, side)))
                     for name in set(method.reads) - {"policy", CURRENT})
    module = unwrap(denoiser.module)
    rest, *gathered = _apart(module)
    return Count(parameters=sum(p.numel() for p in module.parameters()), weights=_bytes(module.parameters()),
                 trained=_bytes(bank.trainable().values()), copies=_bytes(bank.copies()), once=2 * one - two, row=two - one,
                 block=max(gathered, default=0), rest=rest,
                 needed=needed + references, spent=spent + references)


def _apart(module: torch.nn.Module) -> list[int]:
    """Bytes of the weights that FSDP2 gathers together: those in no block, then each block's."""
    sizes, seen = [], set()
    for block in blocks(module):
        own = [p for p in block.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        sizes.append(_bytes(own))
    return sizes[::-1]


def _gathered(count: Count, sharding: str) -> int:
    """What is whole at a time of cut weights. fsdp2: what is in no block, a block and the next one's buffer, and as much of
    gradients that are about to be shared out. zero2: everything and a block's buffer, when the backward begins."""
    if sharding == "none":
        return 0
    if sharding == "zero2":
        return count.weights + count.block
    return count.rest + 2 * count.block + int(2 * count.block * count.trained / count.weights)


def _can_be_cut(recipe: Recipe, gpus: int) -> bool:
    return gpus > 1 and recipe.train.optimizer == "adamw" and recipe.train.mixed_precision != "fp16"


def _refuse(recipe: Recipe) -> None:
    if not isinstance(recipe.likelihood, DenoisingELBO):
        raise ConfigError("likelihood.kind: `diffalign plan` counts likelihood.kind=denoising only")
    if not isinstance(recipe.source, Stored):
        raise ConfigError("source.kind: `diffalign plan` does not count the drawing of candidates; use source.kind=stored")


def _candidates(recipe: Recipe) -> int:
    """Pictures of a group: as the recipe or the first row on this machine says, else two."""
    if recipe.source.k:
        return recipe.source.k
    unpaired = Path(recipe.data.path).exists() and detect_layout(recipe.data) == "unpaired"
    return 1 if unpaired or recipe.data.layout == "unpaired" else 2


def _bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _budget(needs: Needs) -> dict[str, int]:
    return needs.memory | {"allocator's slack": int(SLACK * needs.total), "CUDA context": int(CONTEXT)}


def _time(recipe: Recipe, needs: Needs, card: Card, gpus: int, efficiency: float) -> dict:
    tf32 = recipe.train.mixed_precision == "no"  # half of the rate of bfloat16 on every card that has both
    per_second = gpus * efficiency * card.tflops / (2 if tf32 else 1) / needs.spent
    groups = recipe.train.max_train_steps * recipe.train.train_batch_size * recipe.train.gradient_accumulation_steps * gpus
    return {"groups_per_s": per_second, "groups": groups, "hours": groups / per_second / 3600}


def _changes(recipe: Recipe, cut: str, gpus: int, fits: Callable[[Recipe, str], bool]) -> Iterator[tuple[Recipe, str, str]]:
    """(recipe, sharding, what was changed). Cheapest first: what costs nothing but time before what changes the run. The batch
    is halved as often as it must."""
    train, before = recipe.train, recipe.train.train_batch_size
    while train.train_batch_size % 2 == 0 and not fits(recipe, cut):
        train = replace(train, train_batch_size=train.train_batch_size // 2,
                        gradient_accumulation_steps=2 * train.gradient_accumulation_steps)
        recipe = replace(recipe, train=train)
    if train.train_batch_size < before:
        yield recipe, cut, (f"train.train_batch_size={train.train_batch_size} "
                            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}")
    if train.gradient_checkpointing is not True:
        kept = replace(recipe, train=replace(train, gradient_checkpointing="selective"))
        if not train.gradient_checkpointing and fits(kept, cut):  # less is run again
            yield kept, cut, "train.gradient_checkpointing=selective"
            return
        train = replace(train, gradient_checkpointing=True)
        recipe = replace(recipe, train=train)
        yield recipe, cut, "train.gradient_checkpointing=true"
    if cut == "none" and _can_be_cut(recipe, gpus):
        cut = "fsdp2"
        yield recipe, cut, "configs/accelerate/fsdp2.yaml"
    if recipe.model.lora is None and train.optimizer == "adamw" and cut == "none":
        train = replace(train, optimizer="adamw_8bit")
        recipe = replace(recipe, train=train)
        yield recipe, cut, "train.optimizer=adamw_8bit"
    if train.mixed_precision == "no":
        train = replace(train, mixed_precision="bf16")
        recipe = replace(recipe, train=train)
        yield recipe, cut, "train.mixed_precision=bf16"
    plain = replace(recipe, train=replace(train, optimizer="adamw"))
    if recipe.model.lora is None and cut == "none" and _can_be_cut(plain, gpus):
        cut, train, recipe = "fsdp2", plain.train, plain
        yield recipe, cut, "train.optimizer=adamw configs/accelerate/fsdp2.yaml"
    if recipe.model.lora is None:
        recipe = replace(recipe, model=replace(recipe.model, lora=LoRA(rank=64)), train=replace(train, optimizer="adamw"))
        yield recipe, cut, "model.lora.rank=64 train.optimizer=adamw"


def _say(result: dict, printer: Printer) -> None:
    printer(f"{result['model']}, {result['resolution']} pixels ({result['configuration']}; nothing was downloaded): "
            f"{result['parameters'] / 1e6:,.1f} M weights, {result['trained'] / 1e6:,.1f} M of them trained")
    cut = "" if result["sharding"] == "none" else f" of {result['gpus']} that share the weights ({result['sharding']})"
    printer(f"memory of one {result['gpu']}{cut}, {result['candidates']} pictures a group:")
    for name, size in result["memory_bytes"].items():
        printer(f"  {name:20} {size / GIB:8.2f} GiB")
    verdict = "fits" if result["fits"] else "does not fit"
    printer(f"  {'together':20} {result['total_bytes'] / GIB:8.2f} GiB of {result['limit_bytes'] / GIB:.1f}: {verdict}")
    for change in result["instead"]:
        verdict = "fits" if change["fits"] else "does not fit"
        printer(f"  with {' '.join(change['options'])}: {change['total_bytes'] / GIB:.2f} GiB, {verdict}")
    printer(f"speed: {result['tflop_per_group']:.4g} TFLOP a group, at {result['efficiency']:.0%} of the data sheet's rate "
            f"(an assumption) {result['groups_per_s']:.3g} groups/s on {result['gpus']} x {result['gpu']}")
    unit, number = next((unit, number) for unit, each in (("hours", 1), ("minutes", 60), ("seconds", 3600))
                        if (number := result["hours"] * each) >= 1 or unit == "seconds")
    printer(f"time: {result['groups']:,} groups in {number:.3g} {unit}")
    printer(f"disk: at most {result['cache_bytes_per_1000_groups'] / GIB:.3g} GiB of cache for 1,000 groups")
