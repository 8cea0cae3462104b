"""The models of a comparison of token music, and how they are brought into memory one at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..config import Recipe
from ..errors import ConfigError, DataError
from ..evaluate.compare import Stage
from ..evaluate.medium import CLIPS, Medium
from ..evaluate.sides import Draw
from ..evaluate.spec import ALIGNED, BASE, Entrant, EvaluateSpec
from ..methods import Context
from ..models import musicgen
from ..models.folder import content, digest
from ..models.lora import load_peft
from ..models.spec import LANGUAGE_MODEL, PEFT, ModelSpec
from ..sampling.music import CodeSampler, checked_sounds
from ..types import Memory, Sound
from .entrants import checkpoint_folder, own_weights, put_weights


@dataclass(frozen=True, kw_only=True)
class CodeModel:
    """spec: its folder. source: where its text encoder and codec lie, which training leaves as they are. weights: files that
    replace its own. adapter: folder of a LoRA in peft's layout.
    """

    spec: ModelSpec
    source: ModelSpec
    weights: tuple[Path, ...] = ()
    adapter: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What pins its clips."""
        return {"pretrained_model_name_or_path": self.spec.pretrained_model_name_or_path, "revision": self.spec.revision,
                "denoiser": musicgen.model_identity(self.spec), "weights": digest(self.weights) if self.weights else None,
                "lora": None if self.adapter is None else content(self.adapter / PEFT), "precision": "float32"}


@dataclass(frozen=True, kw_only=True)
class CodeEntrants:
    """What ``Entrants`` is to pipelines. models: by name, the base first. compared: those that get a verdict."""

    models: dict[str, CodeModel]
    compared: tuple[str, ...]
    strengths: dict[str, float] = field(default_factory=dict)
    medium: ClassVar[Medium] = CLIPS

    @classmethod
    def of(cls, recipe: Recipe) -> CodeEntrants:
        """From the recipe and the files of its run. Raises ConfigError or ModelError for what is not there."""
        base = CodeModel(spec=recipe.model, source=recipe.model)
        models = {BASE: base, ALIGNED: _trained(recipe, base)}
        models |= {name: _entrant(recipe, base, f"evaluate.models.{name}", entrant)
                   for name, entrant in recipe.evaluate.models.items()}
        for model in models.values():
            frames_of(model.spec, recipe.evaluate.seconds)
        return cls(models=models, compared=tuple(models)[1:])

    def stages(self, spec: EvaluateSpec, device: torch.device | str) -> list[Stage]:
        studio = _Studio(spec, device)
        return [Stage(names=(name,), facts={name: model.facts()}, open=partial(studio.opened, name, model))
                for name, model in self.models.items()]

    def drawn_with(self, spec: EvaluateSpec) -> dict[str, Any]:
        """For a report."""
        seconds = {seconds_of(model.spec, spec.seconds) for model in self.models.values()}
        return {"seconds": max(seconds), "temperature": CodeSampler().temperature, "seeds": spec.seeds, "seed": spec.seed,
                "batch_size": spec.batch_size}


class _Studio:
    """The one model in memory, with its tokenizer, text encoder and codec."""

    def __init__(self, spec: EvaluateSpec, device: torch.device | str):
        self.spec, self.device = spec, device
        self.model, self.denoiser, self.source, self.inputs = None, None, None, None

    @contextmanager
    def opened(self, name: str, model: CodeModel) -> Iterator[dict[str, Draw]]:
        if model != self.model:
            self.model, self.denoiser = None, None
            gc.collect()  # the old one goes before the new one comes
            self.denoiser = _loaded(model, self.device)
            self.model = model
        if model.source != self.source:
            self.inputs = musicgen.load_inputs(model.source, self.device)
            self.source = model.source
        yield {name: self._draw}

    def _draw(self, prompts: list[str], seeds: list[int]) -> list[Sound]:
        denoiser, inputs = self.denoiser, self.inputs
        ctx = Context(predict=lambda name, xt, t, cond: denoiser(xt, t, cond), process=denoiser.process, param=None, seed=0,
                      step=0, memory=Memory())
        sampler = CodeSampler(frames=frames_of(self.model.spec, self.spec.seconds))
        sounds = []
        for start in range(0, len(prompts), self.spec.batch_size):
            part = slice(start, start + self.spec.batch_size)
            codes = sampler(ctx, "policy", self._cond(prompts[part]), torch.tensor(seeds[part])[:, None], self.device)
            waves = inputs.decode(codes).numpy()[:, None]
            sounds += checked_sounds(waves, inputs.rate, prompts[part], seeds[part])
        return sounds

    def _cond(self, prompts: list[str]):
        try:
            return self.inputs.cond(prompts)
        except DataError as error:
            raise DataError(f"{self.spec.prompts}: {error}") from None


def frames_of(spec: ModelSpec, seconds: float | None) -> int:
    """Frames of the codec in a clip; for None, as many as the model makes. Raises ConfigError, ModelError."""
    rate, longest = _frame_rate(spec)
    frames = longest if seconds is None else round(seconds * rate)
    if not 1 <= frames <= longest:
        raise ConfigError(f"evaluate.seconds: {seconds:g} s are {frames} frames of {spec.pretrained_model_name_or_path}, "
                          f"which makes 1 to {longest} ({longest / rate:.4g} s)")
    return frames


def seconds_of(spec: ModelSpec, seconds: float | None) -> float:
    """How long its clips are."""
    return frames_of(spec, seconds) / _frame_rate(spec)[0]


def _frame_rate(spec: ModelSpec) -> tuple[float, int]:
    """Frames a second, and frames of the longest clip."""
    from transformers import EncodecConfig

    config = musicgen.inspect(spec)[1]
    codec, decoder = EncodecConfig(**(config.get("audio_encoder") or {})), config["decoder"]
    return codec.sampling_rate / codec.hop_length, decoder["max_position_embeddings"] - decoder["num_codebooks"]


def _loaded(model: CodeModel, device: torch.device | str) -> musicgen.MusicGen:
    denoiser = musicgen.load_denoiser(model.spec, device=device)
    if model.weights:
        put_weights(denoiser.module, model.weights, model.spec.pretrained_model_name_or_path)
    if model.adapter is not None:
        load_peft(denoiser.module, model.adapter / PEFT)
    return denoiser


def _trained(recipe: Recipe, base: CodeModel) -> CodeModel:
    """What the run has written for people."""
    output_dir = Path(recipe.output_dir)
    there, option = (PEFT, "a model.lora") if recipe.model.lora is not None else (LANGUAGE_MODEL, "model.lora=null")
    if not (output_dir / there).exists():
        raise ConfigError(f"{output_dir / there}: is missing; run `diffalign train` first, with {option}")
    return _written(output_dir, base)


def _written(folder: Path, base: CodeModel) -> CodeModel | None:
    """The model in a folder that training wrote, or None."""
    if (folder / PEFT).is_file():
        return replace(base, adapter=folder)
    if (folder / LANGUAGE_MODEL).is_dir():
        return replace(base, spec=replace(base.spec, pretrained_model_name_or_path=str(folder / LANGUAGE_MODEL), revision=None,
                                          lora=None))
    own = own_weights(folder)
    return None if own is None else replace(base, weights=(own,))


def _entrant(recipe: Recipe, base: CodeModel, option: str, entrant: Entrant) -> CodeModel:
    if entrant.lora_scale != 1:
        raise ConfigError(f"{option}.lora_scale: a LoRA of token music has strength 1 only; leave it out")
    if entrant.checkpoint is not None:
        folder = checkpoint_folder(recipe, f"{option}.checkpoint", entrant.checkpoint)
        found = _written(folder, base)
        if found is None:
            raise ConfigError(f"{option}.checkpoint: {folder} holds no weights; choose another checkpoint")
        return found
    if entrant.pretrained_model_name_or_path is not None:
        spec = ModelSpec(pretrained_model_name_or_path=entrant.pretrained_model_name_or_path, revision=entrant.revision)
        musicgen.inspect(spec)
        base = CodeModel(spec=spec, source=spec)
    if entrant.lora is None:
        return base
    if not (Path(entrant.lora) / PEFT).is_file():
        raise ConfigError(f"{option}.lora: no {PEFT} in {entrant.lora}; name a folder that a run with model.lora wrote")
    return replace(base, adapter=Path(entrant.lora))
