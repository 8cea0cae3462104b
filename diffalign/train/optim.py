"""Optimizers, learning rates and the moving average. Their state is saved by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import _compat  # noqa: F401  (before diffusers)
from ..errors import ConfigError
from ..world import cut_like, is_cut, joined_as, local
from .spec import TrainSpec

Params = dict[str, nn.Parameter]


def build_optimizer(params: Params, spec: TrainSpec) -> torch.optim.Optimizer:
    """One parameter group, in the order of ``params``. Trainable weights must be float32: bfloat16 ones would not move."""
    if not params:
        raise ValueError("the weight bank has nothing to train")
    for name, p in params.items():
        if p.dtype != torch.float32 or not p.requires_grad:
            raise ValueError(f"trainable weight {name} must be float32 with requires_grad, got {p.dtype}, {p.requires_grad}")
    return OPTIMIZERS[spec.optimizer](list(params.values()), spec)


def _adamw(params: Iterable[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    fused = all(p.device.type == "cuda" for p in params)
    return torch.optim.AdamW(params, lr=spec.learning_rate, betas=(spec.adam_beta1, spec.adam_beta2),
                             eps=spec.adam_epsilon, weight_decay=spec.adam_weight_decay, fused=fused or None)


def _adamw_8bit(params: Iterable[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError("train.optimizer: adamw_8bit needs bitsandbytes, which is not installed; run "
                          "`pip install 'diffalign[8bit]'` or set train.optimizer=adamw") from error
    return bitsandbytes.optim.AdamW8bit(params, lr=spec.learning_rate, betas=(spec.adam_beta1, spec.adam_beta2),
                                        eps=spec.adam_epsilon, weight_decay=spec.adam_weight_decay)


def _adafactor(params: Iterable[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor
    return Adafactor(params, lr=spec.learning_rate, weight_decay=spec.adam_weight_decay, scale_parameter=False,
                     relative_step=False, warmup_init=False, clip_threshold=1.0)


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit, "adafactor": _adafactor}


def learning_rates(spec: TrainSpec) -> Callable[[int], float]:
    """The learning rate of each optimizer step (0 is the first) from diffusers' schedules, a pure function: nothing to save.

    Counted in optimizer steps whatever the number of processes; accelerate's scheduler would multiply by it.
    """
    from diffusers.optimization import get_scheduler
    idle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=spec.learning_rate)
    schedule = get_scheduler(spec.lr_scheduler, idle, num_warmup_steps=spec.lr_warmup_steps,
                             num_training_steps=spec.max_train_steps)
    return lambda step: spec.learning_rate * schedule.lr_lambdas[0](step)


def set_learning_rate(optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_state(optimizer, params: Params) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors as ``parameter/entry`` and plain numbers as {parameter: {entry: value}}; step counts are exact in both."""
    tensors, scalars, names = {}, {}, list(params)
    for index, entries in optimizer.state_dict()["state"].items():
        name = names[index]
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def _flat(entries: dict) -> Iterator[tuple[str, object]]:
    """bitsandbytes hands out its quantised entries as a dictionary inside (0.50 does), and takes them back without."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def load_optimizer_state(optimizer, params: Params, tensors: dict[str, Tensor], scalars: dict[str, dict]) -> None:
    """Inverse of ``optimizer_state``; hyper-parameters stay those of the recipe."""
    state = {name: dict(entries) for name, entries in scalars.items()}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state.setdefault(name, {})[key] = cut_like(tensor, params[name]) if tensor.shape == params[name].shape else tensor
    index = {name: i for i, name in enumerate(params)}
    optimizer.load_state_dict({"state": {index[name]: entries for name, entries in state.items()},
                               "param_groups": optimizer.state_dict()["param_groups"]})


class Average:
    """Exponential moving average of the trainable weights: diffusers' EMAModel, saved by name."""

    def __init__(self, params: Params, decay: float):
        from diffusers.training_utils import EMAModel
        self.params = params
        self.model = EMAModel(self._own(), decay=decay, foreach=True)

    def _own(self) -> list[nn.Parameter]:
        """What this process holds, in the model's own memory."""
        return [nn.Parameter(local(p)) if is_cut(p) else p for p in self.params.values()]

    def update(self) -> None:
        self.model.step(self._own())

    def copy_to_model(self) -> None:
        """Leave the average in the model, for good."""
        self.model.copy_to(self._own())

    @contextmanager
    def swapped_in(self):
        """The average is in the model inside the block; the trained weights return after it, also on an error."""
        self.model.store(self._own())
        try:
            self.copy_to_model()
            yield
        finally:
            self.model.restore(self._own())

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors by parameter, cut as it is."""
        shadows = zip(self.params.items(), self.model.shadow_params)
        return ({name: joined_as(shadow, p) for (name, p), shadow in shadows},
                {"optimization_step": self.model.optimization_step})

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, int]) -> None:
        for name, shadow in zip(self.params, self.model.shadow_params):
            shadow.copy_(local(cut_like(tensors[name], self.params[name])))
        self.model.optimization_step = scalars["optimization_step"]
