"""Scores of a trained latent reward model (LPO, arXiv 2502.01051), for pictures and for noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..errors import ModelError
from ..models import latent_reward
from ..models.encoders import Encoders
from ..models.load import load_encoders
from ..models.spec import ModelSpec
from ..types import Cond
from .preprocess import Preprocess, score_batches
from .weights import on_device

KEPT = 4096  # prompts whose embedding is remembered


@dataclass(frozen=True, kw_only=True)
class LatentModel:
    """A latent reward model from a folder, with the encoders of the pipeline it was made of, loaded when first asked.

    path: the folder ``latent_reward/`` of a training run. model: where that pipeline lies now, a folder or hub id; null takes
    the name that the training's recipe had. device: null is CUDA where there is one.
    """

    path: str
    model: str | None = None
    device: str | None = None

    def check(self) -> None:
        """Raises ModelError unless the model and its encoders are there and belong together. Loads no weights."""
        try:
            latent_reward.check_texts(self.path, self.spec)
        except ModelError as error:
            raise ModelError(f"{error} (the option model names the pipeline that it was made of)") from error
        latent_reward.check_latents(self.path, self.spec)

    @property
    def spec(self) -> ModelSpec:
        if self.model is not None:
            return ModelSpec(pretrained_model_name_or_path=self.model)
        return latent_reward.read_facts(self.path).spec

    @cached_property
    def encoders(self) -> Encoders:
        return load_encoders(self.spec, on_device(self.device))

    @cached_property
    def _scorer(self) -> latent_reward.Scorer:
        self.check()
        return latent_reward.load_scorer(self.path, on_device(self.device))

    @cached_property
    def _texts(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    def __call__(self, xt: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """xt [N, *S] at levels t [N] -> scores [N] float32 in logits, on the model's device, with gradient to xt."""
        device, cond = on_device(self.device), self._cond(prompts)
        return self._scorer(xt.to(device, torch.float32), self._scorer.process.snap(t.to(device)), cond)

    def noisy(self, x0: Tensor, t: float, draw: int) -> tuple[Tensor, Tensor]:
        """x0 [N, *S] -> x_t and t [N]. All pictures get the same noise, so that a score is a function of the picture alone."""
        noise = rng.normal(0, "latent_reward", torch.tensor([[draw]]), tuple(x0.shape[1:])).to(x0.device).expand_as(x0)
        noised = self._scorer.process.noise(x0, torch.full((len(x0),), t, device=x0.device), noise)
        return noised.xt, noised.t

    def _cond(self, prompts: Sequence[str]) -> Cond:
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if fresh:
            if len(self._texts) + len(fresh) > KEPT:
                self._texts.clear()
                fresh = list(dict.fromkeys(prompts))
            tokens, pooled = self.encoders.encode_prompts(fresh)
            self._texts.update(zip(fresh, zip(tokens, pooled, strict=True), strict=True))
        tokens, pooled = zip(*(self._texts[prompt] for prompt in prompts), strict=True)
        return Cond(tokens=torch.stack(tokens), pooled=torch.stack(pooled))


@dataclass(frozen=True, kw_only=True)
class Latent:
    """exp(tau) * cosine of a noised picture's latent and its prompt; differences are logits of the preference.

    t: noise level that a picture is brought to; the paper's models order clean pictures better at 0.2 than at 0 (67.2 and
    69.3 % against 65.5 and 67.4 on Pick-a-Pic). draws: noises that are averaged, always the same ones. Pictures are cut to
    the base model's own resolution. path, model, device: see ``LatentModel``.
    """

    path: str
    t: float = 0.2
    draws: int = 1
    model: str | None = None
    batch_size: int = 16
    device: str | None = None
    name = "latent"
    differentiable = True
    columns = ()

    def __post_init__(self):
        if not 0 <= self.t <= 1:
            raise ValueError(f"t must lie between 0 (clean) and 1 (noise), got {self.t}")
        for option in ("draws", "batch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Scores [N] float32, NaN where a picture cannot be decoded; with gradient to float tensors that ask for it."""
        model = self._model
        fit = Preprocess(size=model.encoders.default_resolution)

        def score(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
            x0, _ = model.encoders.posterior(2 * pictures - 1)
            return torch.stack([model(*model.noisy(x0, self.t, draw), prompts) for draw in range(self.draws)]).mean(0)

        return score_batches(score, fit.unit, images, prompts, self.batch_size)

    def check(self) -> None:
        """Raises ModelError unless the model and its encoders are there and belong together. Loads no weights."""
        self._model.check()

    def identity(self) -> dict[str, Any]:
        return {**latent_reward.identity(self.path), "t": self.t, "draws": self.draws, "scale": "exp(tau) * cosine"}

    @cached_property
    def _model(self) -> LatentModel:
        return LatentModel(path=self.path, model=self.model, device=self.device)
