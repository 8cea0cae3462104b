"""Named weight sets of one denoiser, read through one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import rng
from ..errors import CheckpointError, ConfigError
from ..process import CURRENT
from ..types import Cond
from ..world import cut_like, local, whole
from . import lora as lora_files
from .base import Denoiser, unwrap
from .references import Frozen, Moving, Past, Reference
from .spec import LoRA
from .twins import fill, gathered, hollow

POLICY, REFERENCE, ORIGIN = "policy", "reference", "origin"
FROZEN = Frozen()
Tensors = dict[str, Tensor]


@dataclass(kw_only=True)
class WeightBank:
    """policy: what is trained. current: the same without gradients, for sampling and inversions. origin: the model training
    started from, which is the adapter switched off, or a frozen copy when all weights are trained. reference: the origin,
    unless ``rule`` moves it; then a set of trained tensors of its own over the same base.

    identity: what the reference is: "adapter_off:<hash>", "frozen:<hash>" (first 12 digits of the base's), the same with
    the rule's name in front, or "none". names: the sets that ``predict`` knows. divergence: asked by a gated rule, how much
    worse (mean error) a set denoises a fixed set of winners than the origin; the same number on all ranks. renewed: whether
    the last ``advance`` put other weights in the reference's place, or mixed in half of them or more: running means of
    log-ratios against the old one are then void.
    """

    denoiser: Denoiser
    identity: str
    names: tuple[str, ...]
    rule: Reference = Frozen()
    divergence: Callable[[WeightBank, str], float] | None = None
    renewed: bool = False
    _seed: int = 0
    _bare: nn.Module                    # the model itself, whatever accelerate wraps around denoiser.module
    _frozen: nn.Module | None           # full fine-tunes
    _adapters: list                     # LoRA
    _trainable: dict[str, nn.Parameter]
    _moved: list[Tensors] = field(default_factory=list)  # Moving: the reference; Past: the kept checkpoints, base first
    _twins: tuple = ()                  # cut weights: hollow twins of the model and of the frozen copy
    _forget: Callable[[nn.Module], None] | None = None
    _mark: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))  # Moving: closed; Past: kept, picked

    @classmethod
    def build(cls, denoiser: Denoiser, lora: LoRA | None, *, reads: tuple[str, ...], seed: int,
              forward_dtype: torch.dtype = torch.float32, rule: Reference = FROZEN, measured: bool = False) -> WeightBank:
        """lora: None trains all weights, which must be float32. reads: names of the sets that the method needs. measured: a
        frozen reference's errors come with the batches, so that a full fine-tune keeps no copy of it.

        seed: the run's; LoRA is initialised from it. forward_dtype: what autocast computes the policy in; a frozen copy
        stores the weights of its linear and convolution layers in it, the very rounding that autocast makes at each step,
        so that policy and reference agree bit for bit at the start. Call this before accelerate wraps the module.
        Raises KeyError for an unknown set, ConfigError for LoRA targets that match nothing or a rule that needs a LoRA.
        """
        known = (POLICY, CURRENT, REFERENCE, ORIGIN)
        if not set(reads) <= set(known):
            raise KeyError(f"unknown weight set {sorted(set(reads) - set(known))[0]!r}: there are {', '.join(known)}")
        moves = rule.moves and REFERENCE in reads
        if moves and lora is None and isinstance(rule, Past):
            raise ConfigError(f"reference: past keeps {rule.keep} checkpoints in memory, which only a LoRA makes small; set "
                              "model.lora, or use reference.kind=moving")
        kept = tuple(name for name in reads if not (measured and lora is None and name == REFERENCE))
        needs_origin = ORIGIN in kept or (REFERENCE in kept and not moves) or (moves and rule.needs_origin)
        module = _deterministic(unwrap(denoiser.module))
        frozen = None
        if lora is not None:
            lora_files.attach(denoiser, lora, seed=rng.integer(seed, "lora"))
            trainable = lora_files.trained(module)
        else:
            frozen = _frozen_copy(module, forward_dtype) if needs_origin else None
            trainable = _train_all(module, denoiser.idle())
        if any(p.dtype != torch.float32 for p in trainable.values()):
            raise ValueError("trained weights must be float32: load the denoiser with dtype=torch.float32")
        kind = "frozen" if lora is None else "adapter_off"
        if moves:
            kind = f"{type(rule).__name__.lower()}:{kind}"
        names = (POLICY, CURRENT, *kept, *((ORIGIN,) if needs_origin or lora is not None else ()))
        bank = cls(denoiser=denoiser, names=tuple(dict.fromkeys(names)), _bare=module, _frozen=frozen, _trainable=trainable,
                   _adapters=lora_files.adapter_layers(module), rule=rule if moves else Frozen(), _seed=seed,
                   identity=f"{kind}:{denoiser.identity[:12]}" if {REFERENCE, ORIGIN} & set(reads) else "none")
        if moves:
            bank._moved = [bank._copy() for _ in range(rule.keep if isinstance(rule, Past) else 1)]
            bank._mark[0] = isinstance(rule, Past)  # one checkpoint is kept: the base
        return bank

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
            if name == CURRENT:
                return self.denoiser.run(self._bare, xt, t, cond)
            if name == REFERENCE and self._moved:
                return self._run_moved(self._on(xt.device), xt, t, cond)
            if self._frozen is not None:
                return self.denoiser.run(self._frozen_on(xt.device), xt, t, cond)
            with lora_files.adapters_off(self._adapters):
                return self.denoiser.run(self._bare, xt, t, cond)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, sorted, float32; the names know nothing of DDP."""
        return self._trainable

    def advance(self, step: int) -> dict[str, float]:
        """After the optimizer's step ``step`` (from 0): where moving sets move. Returns figures for the log."""
        self.renewed = False
        if not self._moved or (step + 1) % self.rule.every:
            return {}
        return self._move() if isinstance(self.rule, Moving) else self._keep(step + 1)

    def state(self) -> Tensors:
        """Trained weights under "policy/<name>", moved ones under "reference/<number>/<name>"; detached, not copied."""
        state = {f"{POLICY}/{name}": parameter.detach() for name, parameter in self._trainable.items()}
        for number, tensors in enumerate(self._moved):
            state |= {f"{REFERENCE}/{number}/{name}": tensor for name, tensor in tensors.items()}
        return state | ({f"{REFERENCE}/mark": self._mark} if self._moved else {})

    def load_state(self, tensors: Tensors) -> None:
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
                own[name].copy_(cut_like(tensor, own[name]))

    def shard(self, cut: Callable[[nn.Module], None], forget: Callable[[nn.Module], None]) -> None:
        """Keep a part of every weight only. cut(module): shards it in place (``train.sharding``). forget(module): drops
        gathered weights that are outdated. The bank's tensors are cut from here on; ``predict`` is collective then, and so
        all processes must ask for the same passes.
        """
        modules = [module for module in (self._bare, self._frozen) if module is not None]
        self._twins, self._forget = tuple(hollow(module) for module in modules), forget
        for module in modules:
            cut(module)
        self._renew_trainable()
        self._moved = [self._copy() for _ in self._moved]

    def gather(self, keep: bool) -> None:
        """Collective, before ``save`` on the process that has ``keep``: what goes into the files, whole, in its memory."""
        if self._twins:
            names = set(self._trainable) if self._adapters else None
            fill(self._twins[0], gathered(self._bare, keep, names))

    def unshard(self) -> None:
        """Collective: every process holds everything, in plain modules, as before ``shard``."""
        if not self._twins:
            return
        device, (twin, *frozen) = next(self._bare.parameters()).device, self._twins
        self._moved = [{name: whole(tensor) for name, tensor in tensors.items()} for tensors in self._moved]
        for of, plain in zip((self._bare, self._frozen), self._twins):
            fill(plain, gathered(of, True, device=device)).to(device).train(of.training)
        self._bare = self.denoiser.module = twin
        self._frozen, self._twins = frozen[0] if frozen else None, ()
        self._renew_trainable()
        self._adapters = lora_files.adapter_layers(twin)

    def save(self, folder: Path | str, metadata: dict[str, str], *, stem: str = lora_files.STEM) -> None:
        """Files people can use: the LoRA's, or ``unet/`` (``transformer/``, ``model/``) for a full fine-tune."""
        denoiser, module = self.denoiser, self._bare
        if self._twins:  # what ``gather`` has put together
            module = self._twins[0]
            denoiser = replace(denoiser, module=module)
        if self._adapters and hasattr(denoiser, "save_lora"):  # of a language model, which diffusers does not load
            denoiser.save_lora(folder, metadata)
        elif self._adapters:
            lora_files.save_lora(denoiser, folder, metadata, stem=stem)
        else:
            module.save_pretrained(Path(folder) / denoiser.component, safe_serialization=True)

    def _renew_trainable(self) -> None:
        """The same names, in the module that is there now."""
        parameters = dict(self._bare.named_parameters())
        self._trainable = {name: parameters[name] for name in self._trainable}

    def copies(self) -> Iterator[Tensor]:
        """The tensors of the weight sets beside the one that is trained."""
        if self._frozen is not None:
            yield from self._frozen.parameters()
        for tensors in self._moved:
            yield from tensors.values()

    # moving sets

    def _run_moved(self, tensors: Tensors, *args) -> Tensor:
        """The forward with these tensors in the place of the trained ones."""
        if not self._twins:
            return self.denoiser.run(_Swapped(self._bare, tensors), *args)
        trained = [local(parameter) for parameter in self._trainable.values()]  # cut: gathering reads these very rows
        kept = [rows.clone() for rows in trained]
        try:
            self._put(trained, [local(tensors[name]) for name in self._trainable])
            return self.denoiser.run(self._bare, *args)
        finally:
            self._put(trained, kept)

    def _put(self, rows: list[Tensor], values: list[Tensor]) -> None:
        for row, value in zip(rows, values):
            row.copy_(value)
        self._forget(self._bare)

    def _copy(self) -> Tensors:
        return {name: parameter.detach().clone() for name, parameter in self._trainable.items()}

    def _on(self, device: torch.device) -> Tensors:
        """The reference's tensors. They follow the policy, which accelerate moves after the bank was built."""
        picked = int(self._mark[1]) if isinstance(self.rule, Past) else 0
        if next(iter(self._moved[picked].values())).device != device:
            self._moved = [{name: tensor.to(device) for name, tensor in tensors.items()} for tensors in self._moved]
        return self._moved[picked]

    @torch.no_grad()
    def _move(self) -> dict[str, float]:
        rule, closed, figures = self.rule, bool(self._mark[0]), {}
        if rule.gate is not None and (not closed or rule.thaw):
            if self.divergence is None:
                raise ValueError("a gated reference needs WeightBank.divergence")
            figures["reference_divergence"] = self.divergence(self, CURRENT if rule.judge == "candidate" else REFERENCE)
            closed = not figures["reference_divergence"] <= rule.gate
            self._mark[0] = closed
        if not closed:
            own = self._on(next(iter(self._trainable.values())).device)
            for name, parameter in self._trainable.items():
                own[name].copy_(parameter) if rule.mix == 1 else own[name].lerp_(parameter, rule.mix)
        self.renewed = not closed and rule.mix >= 0.5
        return {**figures, "reference_copied": float(not closed)}

    def _keep(self, step: int) -> dict[str, float]:
        """A new checkpoint joins, and lots are drawn for the next stage."""
        rule, (kept, old) = self.rule, self._mark.tolist()
        full = kept == rule.keep
        if full:  # full: the oldest but the base makes room
            self._moved.append(self._moved.pop(1))
            kept -= 1
        with torch.no_grad():
            for name, parameter in self._trainable.items():
                self._moved[kept][name].copy_(parameter)
        kept += 1
        choice = {"first": 0, "latest": kept - 1}.get(rule.pick)
        if choice is None:
            choice = int(rng.generator(self._seed, "past", step).integers(kept))
        self._mark[0], self._mark[1] = kept, choice
        self.renewed = choice != (old - 1 if full and old else old) or (full and old == 1)
        return {"reference_picked": float(choice), "reference_kept": float(kept)}

    def _frozen_on(self, device: torch.device) -> nn.Module:
        """The copy follows the policy, which accelerate moves after the bank was built."""
        if next(self._frozen.parameters()).device != device:
            self._frozen.to(device)
        return self._frozen


class _Swapped:
    """A module that runs with other tensors in the place of its trained ones."""

    def __init__(self, module: nn.Module, tensors: Tensors):
        self._module, self._tensors = module, tensors

    def __call__(self, *args, **kwargs):
        return functional_call(self._module, self._tensors, args, kwargs)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


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
