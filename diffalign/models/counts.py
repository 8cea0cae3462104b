"""What a pass costs, counted instead of timed: floating-point operations and the bytes kept for the backward pass.

Nothing is computed: the denoiser lies on the meta device (``published.on_meta``), so full-size models are counted anywhere.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from ..types import Cond
from .base import Denoiser, unwrap

TOKENS = 77  # of a CLIP prompt


def inputs(denoiser: Denoiser, rows: int, height: int, width: int, *, device: str = "meta",
           tokens: int = TOKENS) -> tuple[Tensor, Tensor, Cond]:
    """xt [N, C, height, width] (latent numbers, not pixels), t [N] and cond of N rows in this denoiser's shapes."""
    config = unwrap(denoiser.module).config
    width_of = {"sd": lambda: (config.cross_attention_dim, None),
                "sdxl": lambda: (config.cross_attention_dim,
                                 config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim),
                "sd3": lambda: (config.joint_attention_dim, config.pooled_projection_dim)}
    text, pooled = width_of[denoiser.family]()
    xt, t = torch.zeros(rows, config.in_channels, height, width, device=device), torch.ones(rows, device=device)
    cond = Cond(tokens=torch.zeros(rows, tokens, text, device=device),
                pooled=None if pooled is None else torch.zeros(rows, pooled, device=device),
                extra={"time_ids": torch.zeros(rows, 6, device=device)} if denoiser.family == "sdxl" else {})
    return xt, t, cond


def flops(denoiser: Denoiser, rows: int, height: int, width: int) -> tuple[int, int]:
    """Of one forward pass of N rows, and of that and its backward; 2 a multiply-add, matrix products and convolutions only.

    What gradient checkpointing runs again is counted in the second.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        raw = denoiser(*inputs(denoiser, rows, height, width))
        forward = counter.get_total_flops()
        raw.float().square().mean().backward()
    unwrap(denoiser.module).zero_grad()
    return forward, counter.get_total_flops()


def operations(run: Callable[[], object]) -> int:
    """What ``flops`` counts, of any call, without gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def saved_bytes(denoiser: Denoiser, rows: int, height: int, width: int, *, dtype: torch.dtype) -> int:
    """What one training pass of N rows keeps in memory for its backward, with fused attention. dtype: of autocast.

    Weights are not counted, their casts are. By autocast's rules on CUDA, which computes norms in float32 (unless they were
    told otherwise: ``base.narrow_norms``).
    """
    kept: dict[int, tuple] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept.setdefault(storage._cdata, (storage, storage.nbytes()))  # held, so that no other gets its number
        return x

    with _imitated(denoiser, dtype) as denoiser:
        own = {p.untyped_storage()._cdata for p in unwrap(denoiser.module).parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            denoiser(*inputs(denoiser, rows, height, width, device="cpu"))
    return sum(size for number, (_, size) in kept.items() if number not in own)


@contextmanager
def _imitated(denoiser: Denoiser, dtype: torch.dtype):
    """A fake copy of the denoiser, under autocast as it is on CUDA. On the CPU: meta tensors would have no fused attention."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    denoiser = copy.copy(denoiser)
    denoiser.module = copy.deepcopy(unwrap(denoiser.module))
    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), _WideNorms():
        _imitate(denoiser.module)
        yield denoiser


def peak_bytes(denoiser: Denoiser, rows: int, height: int, width: int, *, dtype: torch.dtype) -> int:
    """The most that one training pass of N rows and its backward hold at once, beside weights and their gradients (which are
    there before, as when gradients are accumulated), with fused attention. dtype: of autocast. Allocators add to it.
    """
    with _imitated(denoiser, dtype) as denoiser:
        held = list(unwrap(denoiser.module).parameters())
        for p in held:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        with _Peak([*held, *(p.grad for p in held if p.grad is not None)]) as tracker:
            denoiser(*inputs(denoiser, rows, height, width, device="cpu")).float().square().mean().backward()
    return tracker.peak


class _WideNorms(TorchFunctionMode):
    """What autocast does to norms on CUDA, and not on the CPU: float32 in and out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.group_norm, F.layer_norm) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


class _Peak(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as somebody holds them. known: tensors that don't count."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(x.untyped_storage() for x in known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.untyped_storage() not in self._seen:
                storage = x.untyped_storage()
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _imitate(module: nn.Module) -> None:
    """Parameters and buffers on the meta device -> fake ones on the CPU, inside a ``FakeTensorMode``."""
    for layer in module.modules():
        for name, p in layer._parameters.items():
            if p is not None:
                layer._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, x in layer._buffers.items():
            if x is not None:
                layer._buffers[name] = torch.empty(x.shape, dtype=x.dtype)
