"""Judges of the sampler's steps that read the noisy latents themselves (``data/stepwise.py`` says what a judge is)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..models import latent_reward
from ..models.spec import ModelSpec
from ..rewards.latent import LatentModel


@dataclass(frozen=True, kw_only=True)
class LatentJudge:
    """A latent reward model scores the children as they are: no prediction of the picture, no decoder (LPO, arXiv 2502.01051).

    path: the model's folder. model: where the pipeline it was made of lies; its text encoders are used. time: the level that a
    child is scored at, its own, which is what the model was trained on, or its parent's, one step noisier, as the released
    code has it. same_latents: the user's word that another VAE file has the same latent space (SD 2.1 with SD 1.5's model).
    """

    path: str
    model: str | None = None
    time: Literal["own", "parent"] = "own"
    same_latents: bool = False
    batch_size: int = 64
    device: str | None = None
    title = "LPO"
    predicts = False
    differentiable = True
    forwards = 1  # passes a child: half a denoiser, with the prompt and without

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, x0: Tensor | None, prompts: Sequence[str], decode: Callable) -> Tensor:
        """Scores [N] float32 on the CPU, in logits."""
        scores = torch.cat([self._model(x[part], t[part], prompts[part]).cpu() for part in self._parts(x)])
        return torch.where(scores.isfinite(), scores, torch.nan)

    def slope(self, x: Tensor, t: Tensor, x0: Tensor | None, prompts: Sequence[str], decode: Callable) -> Tensor:
        """Gradient of the scores with respect to the noisy latents, [N, *S]: that of classifier guidance."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            scores = torch.cat([self._model(leaf[part], t[part], prompts[part]) for part in self._parts(x)])
            return torch.autograd.grad(scores.sum(), leaf)[0]

    def _parts(self, x: Tensor) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, len(x), self.batch_size)]

    def check_for(self, spec: ModelSpec) -> None:
        """Raises ModelError unless it reads the latents of this base model at its noise levels. Loads no weights."""
        self._model.check()
        latent_reward.check_latents(self.path, spec, same_latents=self.same_latents)

    def identity(self) -> str:
        """Hash of the weights: a run goes on with the judge it began with."""
        return latent_reward.identity(self.path)["weights"]

    @cached_property
    def _model(self) -> LatentModel:
        return LatentModel(path=self.path, model=self.model, device=self.device)
