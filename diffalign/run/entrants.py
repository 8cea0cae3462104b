"""The models of a comparison: which there are, and how they are brought into memory one pipeline at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import Evaluation, Recipe
from ..errors import ConfigError, ModelError
from ..evaluate.compare import Stage, adapters_off, said
from ..evaluate.medium import CLIPS, PICTURES, Medium
from ..evaluate.sides import Draw, as_draw
from ..evaluate.spec import ALIGNED, BASE, Entrant, EvaluateSpec, strength_side
from ..models.folder import check_weights, content, digest, weight_files
from ..models.fuse import lora_file
from ..models.load import encoder_facts, inspect, load_pipeline, model_identity
from ..models.lora import adapter_layers
from ..models.lora import adapters_off as layers_off
from ..models.lora import load as load_lora
from ..models.spec import PEFT, ModelSpec
from ..sampling.scheduler import make_scheduler
from ..train.checkpoint import checkpoints
from .words import LORA_FILE, PIPELINE


@dataclass(frozen=True, kw_only=True)
class Model:
    """spec: its pipeline. weights: files that replace the denoiser's. lora: file put on top, at ``scale``."""

    spec: ModelSpec
    weights: tuple[Path, ...] = ()
    lora: Path | None = None
    scale: float = 1.0

    @property
    def pipeline(self) -> tuple[ModelSpec, tuple[Path, ...]]:
        """What must be loaded; models that have it in common differ by their LoRA alone."""
        return replace(self.spec, lora=None, distilled=None), self.weights

    def facts(self, spec: EvaluateSpec) -> dict[str, Any]:
        """What pins its pictures: hashes of all weights, and the scheduler's whole configuration."""
        folder, adapter = inspect(self.spec)
        scheduler = make_scheduler(folder.config("scheduler"), spec.scheduler, spec.timestep_spacing)
        lora = None if self.lora is None else {"file": str(self.lora), "sha256": content(self.lora), "scale": self.scale}
        return {"pretrained_model_name_or_path": self.spec.pretrained_model_name_or_path, "revision": self.spec.revision,
                "variant": self.spec.variant, "pipeline": adapter.pipeline, "denoiser": model_identity(self.spec),
                **encoder_facts(self.spec).identity, "weights": digest(self.weights) if self.weights else None, "lora": lora,
                "scheduler": {"_class_name": type(scheduler).__name__, **scheduler.config}, "precision": "float32"}


@dataclass(frozen=True, kw_only=True)
class Entrants:
    """models: by name, the base first. compared: those that get a verdict, the main one first. strengths: sides of the sweep,
    strength by name.
    """

    models: dict[str, Model]
    compared: tuple[str, ...]
    strengths: dict[str, float] = field(default_factory=dict)
    medium: Medium = PICTURES

    @classmethod
    def of(cls, recipe: Recipe | Evaluation) -> Entrants:
        """From the recipe and the files of its run. Raises ConfigError or ModelError for what is not there."""
        spec, base = recipe.evaluate, Model(spec=recipe.model)
        models = {BASE: base} if isinstance(recipe, Evaluation) else {BASE: base, ALIGNED: _trained(recipe)}
        models |= {name: _entrant(recipe, name, entrant) for name, entrant in spec.models.items()}
        compared = tuple(models)[1:]
        swept, strengths = _swept(models, compared[0], spec.strengths)
        return cls(models=models | swept, compared=compared, strengths=strengths,
                   medium=CLIPS if inspect(recipe.model)[1].audio else PICTURES)

    def drawn_with(self, spec: EvaluateSpec) -> dict[str, Any]:
        """For a report."""
        return said(spec)

    def stages(self, spec: EvaluateSpec, device: torch.device | str) -> list[Stage]:
        """One for each pipeline; a pipeline stays in memory until another is needed."""
        groups: dict[tuple, list[str]] = {}
        for name, model in self.models.items():
            groups.setdefault(model.pipeline, []).append(name)
        pipelines = _Pipelines(spec, device)
        return [Stage(names=tuple(names), facts={name: self.models[name].facts(spec) for name in names},
                      open=partial(pipelines.opened, {name: self.models[name] for name in names}))
                for names in groups.values()]


class _Pipelines:
    """The one pipeline in memory, with the scheduler of the ``evaluate`` section, and the LoRAs that were put on it."""

    def __init__(self, spec: EvaluateSpec, device: torch.device | str):
        self.spec, self.device = spec, device
        self.key, self.pipe = None, None
        self.adapters: dict[Path, str] = {}

    @contextmanager
    def opened(self, models: Mapping[str, Model]) -> Iterator[dict[str, Draw]]:
        """models: of one pipeline."""
        self._take(next(iter(models.values())))
        for model in models.values():
            if model.lora is not None and model.lora not in self.adapters:
                name = f"entrant_{len(self.adapters)}"
                load_lora(self.pipe, model.lora, name)
                self.adapters[model.lora] = name
        yield {name: partial(self._draw, model) for name, model in models.items()}

    def _take(self, model: Model) -> None:
        if model.pipeline == self.key:
            return
        self.key, self.pipe, self.adapters = None, None, {}
        gc.collect()  # the old one goes before the new one comes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        pipe = load_pipeline(model.spec)
        if model.weights:
            put_weights(getattr(pipe, inspect(model.spec)[1].component), model.weights,
                        model.spec.pretrained_model_name_or_path)
        spec = self.spec
        if spec.scheduler or spec.timestep_spacing:
            own = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
            pipe.scheduler = make_scheduler(own, spec.scheduler, spec.timestep_spacing)
        self.key, self.pipe = model.pipeline, pipe.to(self.device)

    def _draw(self, model: Model, prompts: list[str], seeds: list[int]) -> list:
        draw = as_draw(self.pipe, self.spec)
        if model.lora is not None:
            self._put_on(self.adapters[model.lora], model.scale)
            return draw(prompts, seeds)
        if not self.adapters:
            return draw(prompts, seeds)
        with adapters_off(self.pipe) if hasattr(self.pipe, "disable_lora") else layers_off(self._layers()):
            return draw(prompts, seeds)

    def _put_on(self, adapter: str, scale: float) -> None:
        """This LoRA alone."""
        if hasattr(self.pipe, "set_adapters"):
            self.pipe.enable_lora()
            self.pipe.set_adapters([adapter], [scale])
            return
        for layer in self._layers():  # of a pipeline that knows no LoRA
            layer.set_adapter(adapter)
            layer.set_scale(adapter, scale)

    def _layers(self) -> list:
        return adapter_layers(getattr(self.pipe, inspect(self.key[0])[1].component))


def _trained(recipe: Recipe) -> Model:
    """What the run has written for people."""
    output_dir = Path(recipe.output_dir)
    if recipe.model.lora is not None:
        lora = _lora_in(output_dir)
        if lora is None:
            raise ConfigError(f"{output_dir / LORA_FILE}: is missing; run `diffalign train` first")
        return Model(spec=recipe.model, lora=lora)
    if not (output_dir / PIPELINE).is_dir():  # or its name would pass for a hub id
        raise ConfigError(f"{output_dir / PIPELINE}: is missing; run `diffalign train` first, with model.lora=null")
    # the saved weights hold what was fused into their base
    return Model(spec=replace(recipe.model, pretrained_model_name_or_path=str(output_dir / PIPELINE), revision=None,
                              variant=None, pretrained_vae_model_name_or_path=None, fuse_lora=None))


def _lora_in(folder: Path) -> Path | None:
    """The LoRA that training wrote there: diffusers' layout, or peft's for pipelines that load none."""
    return next((folder / name for name in (LORA_FILE, PEFT) if (folder / name).is_file()), None)


def _entrant(recipe: Recipe | Evaluation, name: str, entrant: Entrant) -> Model:
    option = f"evaluate.models.{name}"
    if entrant.checkpoint is not None:
        return _checkpoint(recipe, f"{option}.checkpoint", entrant)
    spec = recipe.model
    if entrant.pretrained_model_name_or_path is not None:
        spec = ModelSpec(pretrained_model_name_or_path=entrant.pretrained_model_name_or_path, revision=entrant.revision,
                         variant=entrant.variant)
        try:
            inspect(spec)
        except ModelError as error:
            raise ModelError(f"{option}.pretrained_model_name_or_path: {error}") from None
    file = None if entrant.lora is None else _lora_in(Path(entrant.lora)) or lora_file(entrant.lora, f"{option}.lora")
    if file is not None:
        check_weights([file], f"{option}.lora")
    return Model(spec=spec, lora=file, scale=entrant.lora_scale)


def _checkpoint(recipe: Recipe | Evaluation, option: str, entrant: Entrant) -> Model:
    """A checkpoint's weights: the LoRA or folder that people use; where it has none of these (above 1 GiB), the loop's own."""
    folder = checkpoint_folder(recipe, option, entrant.checkpoint)
    if (lora := _lora_in(folder)) is not None:
        return Model(spec=recipe.model, lora=lora, scale=entrant.lora_scale)
    component = inspect(recipe.model)[1].component
    if (folder / component).is_dir():
        return Model(spec=recipe.model, weights=tuple(weight_files(folder / component, None, str(folder))))
    own = own_weights(folder)
    if own is None:
        raise ConfigError(f"{option}: {folder} holds no weights; choose another checkpoint")
    return Model(spec=recipe.model, weights=(own,))


def checkpoint_folder(recipe: Recipe | Evaluation, option: str, number: int) -> Path:
    """Raises ConfigError naming those that are there."""
    folder = Path(recipe.output_dir) / f"checkpoint-{number}"
    if not folder.is_dir():
        there = ", ".join(path.name for path in checkpoints(folder.parent)) or "none"
        raise ConfigError(f"{option}: there is no {folder} (there: {there}); older ones are removed, see "
                          "train.checkpoints_total_limit")
    return folder


def own_weights(folder: Path) -> Path | None:
    """The loop's own file of a checkpoint, the moving average first."""
    return next((folder / name for name in ("ema.safetensors", "weights.safetensors") if (folder / name).is_file()), None)


def put_weights(module: torch.nn.Module, files: tuple[Path, ...], name: str) -> None:
    """The policy's tensors of a checkpoint's files into the module of the model ``name``. Raises ConfigError, ModelError."""
    from safetensors.torch import load_file

    check_weights(files, str(files[0].parent))
    tensors = {key.removeprefix("policy/"): tensor for file in files for key, tensor in load_file(file).items()
               if not key.startswith("reference/")}
    unknown = module.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise ConfigError(f"{files[0].parent}: its weights are not for {name} (first: {unknown[0]}); name the model that it "
                          "was trained on")


def _swept(models: Mapping[str, Model], main: str, strengths: tuple[float, ...]) -> tuple[dict[str, Model], dict[str, float]]:
    """Sides that the sweep adds, and the strength of each of its sides, rising; what is there already is not drawn twice."""
    if not strengths:
        return {}, {}
    model = models[main]
    if model.lora is None:
        raise ConfigError(f'evaluate.strengths: "{main}" is no LoRA, so it has no strength to vary; leave them out')
    added, found = {}, {}
    for strength in sorted(strengths):
        wanted = replace(model, scale=strength) if strength else replace(model, lora=None, scale=1.0)
        name = next((name for name in (BASE, main) if models[name] == wanted), strength_side(strength))
        added |= {} if name in models else {name: wanted}
        found[name] = strength
    return added, found
