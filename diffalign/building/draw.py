"""Candidates: pictures of every prompt from every model, each a function of its own prompt, model and number.

The pictures of a model are cut into batches of a fixed grid, so that a process that goes on after a kill, or takes another
share of the work, draws in the same batches as one that was left alone, hence the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.prompts import Prompts
from ..errors import ModelError, UserError
from ..models import lora
from ..models.folder import check_components, check_weights, content
from ..models.fuse import lora_file
from ..models.load import encoder_facts, inspect, load_pipeline, model_identity
from ..sampling.generate import generate, picture_seed
from ..sampling.scheduler import make_scheduler
from .journal import Journal
from .pictures import store
from .spec import BuildSpec, Drawer, Sampling

OPTION = re.compile(r"\bmodel\.(lora|fuse_lora|revision|variant|pretrained_\w+)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """One candidate to be drawn. place: its number among the model's pictures, prompts outside, samples inside."""

    place: int
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All the pictures of a build, before any is drawn. ids, prompts, categories: per group; wanted: by model, of all groups.

    An id depends on the prompt and on how often it came before, not on its place in the file.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    wanted: dict[str, tuple[Wanted, ...]]
    samples: int

    @classmethod
    def of(cls, spec: BuildSpec, prompts: Prompts) -> Plan:
        texts = prompts.texts[:spec.max_prompts]
        seen, before = Counter(), []
        for text in texts:
            before.append(seen[text])
            seen[text] += 1
        ids = [hashlib.sha256(f"{text}|{n}".encode()).hexdigest()[:16] for text, n in zip(texts, before)]
        wanted = {name: tuple(_wanted(spec, name, texts, before)) for name in spec.models}
        categories = prompts.categories[:spec.max_prompts] if prompts.categories else [None] * len(texts)
        return cls(ids=tuple(ids), prompts=tuple(texts), categories=tuple(categories), wanted=wanted, samples=spec.samples)

    @property
    def pictures(self) -> int:
        return sum(map(len, self.wanted.values()))


def _wanted(spec: BuildSpec, name: str, texts: Sequence[str], before: Sequence[int]) -> Iterator[Wanted]:
    """A prompt that comes again gets other seeds."""
    for row, (text, times) in enumerate(zip(texts, before)):
        for n in range(spec.samples):
            yield Wanted(place=row * spec.samples + n, prompt=text,
                         seed=picture_seed(spec.seed, f"{name}|{text}", times * spec.samples + n))


def check(spec: BuildSpec) -> None:
    """Raises a UserError for models, LoRAs and schedulers that cannot be used, from their headers alone."""
    for name, drawer in spec.models.items():
        with named(f"models.{name}", drawer):
            check_drawer(drawer, drawer.sampling or spec.sampling)


def check_drawer(drawer: Drawer, sampling: Sampling) -> None:
    """The same for one model. Raises a UserError that names the options of a training recipe: see ``named``."""
    folder, _ = inspect(drawer.model)
    check_components(folder, folder.components)
    if drawer.lora is not None:
        check_weights([_lora(drawer)], "model.lora")
    make_scheduler(folder.config("scheduler"), sampling.scheduler, sampling.timestep_spacing, sampling.num_inference_steps)


def facts(spec: BuildSpec) -> dict[str, Any]:
    """What decides the pictures besides seed and prompts: hashes of all weights, and the sampling. Reads the files once."""
    models = {name: drawer_facts(one) for name, one in spec.models.items()}
    common = any(one.sampling is None for one in spec.models.values())
    return {"models": models, "sampling": _decisive(spec.sampling) if common else None}


def drawer_facts(drawer: Drawer) -> dict[str, Any]:
    """What decides one model's pictures, but for a sampling that is not its own."""
    return {"weights": model_identity(drawer.model), "encoders": encoder_facts(drawer.model).identity,
            "lora": None if drawer.lora is None else content(_lora(drawer)), "lora_scale": drawer.lora_scale,
            "sampling": None if drawer.sampling is None else _decisive(drawer.sampling)}


def _decisive(sampling: Sampling) -> dict[str, Any]:
    """All but the batch size, which may be lowered to go on after memory has run out."""
    return {name: value for name, value in asdict(sampling).items() if name != "batch_size"}


def drawn(folder: Path, journal: Journal) -> dict[tuple[str, int], str]:
    """(model, place) -> image, of those whose files are there."""
    found = {(record["model"], place): image for record in journal for place, image in record["images"]}
    return {key: image for key, image in found.items() if (folder / image).is_file()}


def draw(spec: BuildSpec, plan: Plan, folder: Path, journal: Journal, *, rank: int = 0, world: int = 1,
         device: str | torch.device = "cpu", progress: bool = True) -> None:
    """This process's share of the pictures that are not there yet; one model in memory at a time.

    Raises UserError children: a model that cannot be loaded or draws NaN, memory or disk that is full.
    """
    done = drawn(folder, journal)
    for name, wanted in plan.wanted.items():
        sampling = spec.models[name].sampling or spec.sampling
        todo = [[one for one in wanted[start:start + sampling.batch_size] if (name, one.place) not in done]
                for start in range(rank * sampling.batch_size, len(wanted), world * sampling.batch_size)]
        batches = [batch for batch in todo if batch]
        if batches:
            with named(f"models.{name}", spec.models[name]):
                pipe = pipeline(spec.models[name], sampling, device)
                _draw(pipe, name, batches, sampling, folder, journal, progress)
                del pipe
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    journal.close()


def _draw(pipe, name: str, batches: Sequence[list[Wanted]], sampling: Sampling, folder: Path, journal: Journal,
          progress: bool) -> None:
    total = sum(map(len, batches))
    with tqdm(total=total, desc=f"drawing with {name}", unit="picture", disable=None if progress else True) as bar:
        for batch in batches:
            images = generate(pipe, [one.prompt for one in batch], [one.seed for one in batch], progress=None,
                              **how(sampling))
            names = [store(folder, image) for image in images]
            journal.add({"model": name, "images": [[one.place, image] for one, image in zip(batch, names)]})
            bar.update(len(batch))


def how(sampling: Sampling) -> dict[str, Any]:
    """What ``generate`` is told."""
    return {name: getattr(sampling, name) for name in ("num_inference_steps", "guidance_scale", "negative_prompt", "height",
                                                       "width", "batch_size")}


def pipeline(drawer: Drawer, sampling: Sampling, device: str | torch.device = "cpu"):
    """The stock pipeline with its LoRA and scheduler. Raises ModelError, ConfigError."""
    pipe = load_pipeline(drawer.model)
    if drawer.lora is not None:
        lora.load(pipe, _lora(drawer))
        pipe.set_adapters(pipe.get_active_adapters(), [drawer.lora_scale])
    if sampling.scheduler or sampling.timestep_spacing:
        own = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
        pipe.scheduler = make_scheduler(own, sampling.scheduler, sampling.timestep_spacing)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, getattr(torch, sampling.dtype))  # diffusers' own warns of layers that no family here has
    return pipe.to(device)


def _lora(drawer: Drawer) -> Path:
    try:
        return lora_file(drawer.lora)
    except ModelError as error:
        raise ModelError(str(error).replace("model.fuse_lora", "model.lora")) from None


@contextmanager
def named(where: str, drawer: Drawer):
    """Errors of the rooms below name the options of a training recipe; here they get those of this one. where: the model's
    option, such as "models.base".
    """
    section = "sampling" if drawer.sampling is None else f"{where}.sampling"
    try:
        yield
    except UserError as error:
        text = OPTION.sub(lambda found: f"{where}.{found[1]}", str(error).replace("evaluate.", f"{section}."))
        raise type(error)(text if text.startswith((where, "sampling.")) else f"{where}: {text}") from error
