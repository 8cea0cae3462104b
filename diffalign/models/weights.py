"""Named weight sets of one denoiser, read through one call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import rng
from ..errors import CheckpointError
from ..types import Cond
from . import lora as lora_files
from .base import Denoiser, unwrap
from .spec import LoRA

POLICY, REFERENCE = "policy", "reference"


@dataclass(kw_only=True)
class WeightBank:
    """ "policy" is trained; "reference" is the adapter switched off, or a frozen copy when all weights are trained.

    identity: what the reference is: "adapter_off:<hash>", "frozen:<hash>" (first 12 digits of the base's) or "none".
    names: the sets that ``predict`` knows.
    """

    denoiser: Denoiser
    identity: str
    names: tuple[str, ...]
    _bare: nn.Module                    # the model itself, whatever accelerate wraps around denoiser.module
    _frozen: nn.Module | None           # full fine-tunes
    _adapters: list                     # LoRA
    _trainable: dict[str, nn.Parameter]

    @classmethod
    def build(cls, denoiser: Denoiser, lora: LoRA | None, *, reads: tuple[str, ...], seed: int,
              forward_dtype: torch.dtype = torch.float32) -> WeightBank:
        """lora: None trains all weights, which must be float32. reads: names of the sets that the method needs.

        seed: the run's; LoRA is initialised from it. forward_dtype: what autocast computes the policy in; a frozen copy
        stores the weights of its linear and convolution layers in it, the very rounding that autocast makes at each step,
        so that policy and reference agree bit for bit at the start. Call this before accelerate wraps the module.
        Raises KeyError for an unknown set, ConfigError for LoRA targets that match nothing.
        """
        unknown = [name for name in reads if name not in (POLICY, REFERENCE)]
        if unknown:
            raise KeyError(f"unknown weight set {unknown[0]!r}: there are {POLICY!r} and {REFERENCE!r}")
        module = _deterministic(unwrap(denoiser.module))
        frozen = None
        if lora is not None:
            lora_files.attach(denoiser, lora, seed=rng.integer(seed, "lora"))
            trainable = lora_files.trained(module)
        else:
            frozen = _frozen_copy(module, forward_dtype) if REFERENCE in reads else None
            trainable = _train_all(module, denoiser.idle())
        if any(p.dtype != torch.float32 for p in trainable.values()):
            raise ValueError("trained weights must be float32: load the denoiser with dtype=torch.float32")
        kind = "none" if REFERENCE not in reads else "frozen" if lora is None else "adapter_off"
        return cls(denoiser=denoiser, names=tuple(dict.fromkeys((POLICY, *reads))), _bare=module, _frozen=frozen,
                   _adapters=lora_files.adapter_layers(module), _trainable=trainable,
                   identity="none" if kind == "none" else f"{kind}:{denoiser.identity[:12]}")

    def predict(self, name: str, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """xt [N, *S], t [N], cond of N rows -> raw [N, *S] under the named set.

        Only "policy" has gradients and goes through a DDP wrapper. Ask for the others first: the adapters are on again
        when this returns, also after an exception. Raises KeyError for a set that was not built.
        """
        if name not in self.names:
            raise KeyError(f"unknown weight set {name!r}: this bank has {', '.join(self.names)}")
        if name == POLICY:
            return self.denoiser(xt, t, cond)
        with torch.no_grad():
            if self._frozen is not None:
                return self.denoiser.run(self._frozen_on(xt.device), xt, t, cond)
            with lora_files.adapters_off(self._adapters):
                return self.denoiser.run(self._bare, xt, t, cond)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, sorted, float32; the names know nothing of DDP."""
        return self._trainable

    def advance(self, step: int) -> None:
        """After the optimizer's step: where moving sets move. Frozen ones do not."""

    def state(self) -> dict[str, Tensor]:
        """Trained weights under "policy/<name>", detached, not copied."""
        return {f"{POLICY}/{name}": parameter.detach() for name, parameter in self._trainable.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of ``state``. Raises CheckpointError unless names and shapes are exactly those of this bank."""
        own = self.state()
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            raise CheckpointError("weights in the checkpoint are not those of this model: "
                                  + (f"{len(missing)} missing, first {missing[0]}; " if missing else "")
                                  + (f"{len(extra)} unknown, first {extra[0]}" if extra else ""))
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(f"weight {name} has shape {list(tensor.shape)} in the checkpoint and "
                                      f"{list(own[name].shape)} in this model (another LoRA rank?)")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def save(self, folder: Path | str, metadata: dict[str, str], *, stem: str = lora_files.STEM) -> None:
        """Files people can use: the two LoRA files, or ``unet/`` (``transformer/``) for a full fine-tune."""
        if self._adapters:
            lora_files.save_lora(self.denoiser, folder, metadata, stem=stem)
        else:
            self._bare.save_pretrained(Path(folder) / self.denoiser.component, safe_serialization=True)

    def _frozen_on(self, device: torch.device) -> nn.Module:
        """The copy follows the policy, which accelerate moves after the bank was built."""
        if next(self._frozen.parameters()).device != device:
            self._frozen.to(device)
        return self._frozen


def _deterministic(module: nn.Module) -> nn.Module:
    """No dropout, in whichever mode the loop puts the policy: else policy and reference would differ by it."""
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module.eval()


def _train_all(module: nn.Module, idle: tuple[str, ...]) -> dict[str, nn.Parameter]:
    module.requires_grad_(True)
    for name in idle:
        for path, layer in module.named_modules():
            if path == name:
                layer.requires_grad_(False)
    return {name: p for name, p in sorted(module.named_parameters()) if p.requires_grad}


def _frozen_copy(module: nn.Module, forward_dtype: torch.dtype) -> nn.Module:
    frozen = copy.deepcopy(module).requires_grad_(False)
    for layer in frozen.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to(forward_dtype)
    return frozen
