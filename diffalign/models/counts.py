"""What a pass costs, counted instead of timed: floating-point operations and the bytes kept for the backward pass.

Nothing is computed: the denoiser lies on the meta device (``published.on_meta``), so full-size models are counted anywhere.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..types import Cond
from .base import Denoiser, unwrap

TOKENS = 77  # of a CLIP prompt
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock")  # what gradient checkpointing runs again


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


def saved_bytes(denoiser: Denoiser, rows: int, height: int, width: int, *, dtype: torch.dtype) -> int:
    """What one training pass of N rows keeps in memory for its backward, with fused attention. dtype: of autocast.

    Weights are not counted, their casts are. By the rules of autocast on the CPU: on CUDA it computes norms in float32.
    """
    with _recorded(denoiser, dtype) as (denoiser, kept):
        own = {p.untyped_storage()._cdata for p in unwrap(denoiser.module).parameters()}
        denoiser(*inputs(denoiser, rows, height, width, device="cpu"))
    return sum(size for number, (_, size) in kept.items() if number not in own)


@contextmanager
def _recorded(denoiser: Denoiser, dtype: torch.dtype):
    """A fake copy of the denoiser on the CPU, and what its passes keep meanwhile: storage's number -> (storage, bytes)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    denoiser = copy.copy(denoiser)
    denoiser.module = copy.deepcopy(unwrap(denoiser.module))
    kept: dict[int, tuple] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept.setdefault(storage._cdata, (storage, storage.nbytes()))  # held, so that no other gets its number
        return x

    with FakeTensorMode():  # of the CPU, where meta tensors would have no fused attention
        _imitate(denoiser.module)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), \
                torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            yield denoiser, kept


def largest_block(denoiser: Denoiser, rows: int, height: int, width: int, *, dtype: torch.dtype) -> int:
    """Bytes that the greediest block keeps for its backward: what gradient checkpointing holds beside the blocks' inputs."""
    sizes: list[int] = []

    def enter(module, _):
        module._kept_before = sum(size for _, size in kept.values())

    def leave(module, *_):
        sizes.append(sum(size for _, size in kept.values()) - module._kept_before)

    with _recorded(denoiser, dtype) as (denoiser, kept):
        for layer in unwrap(denoiser.module).modules():
            if type(layer).__name__ in BLOCKS:
                layer.register_forward_pre_hook(enter)
                layer.register_forward_hook(leave)
        denoiser(*inputs(denoiser, rows, height, width, device="cpu"))
    return max(sizes)


def _imitate(module: nn.Module) -> None:
    """Parameters and buffers on the meta device -> fake ones on the CPU, inside a ``FakeTensorMode``."""
    for layer in module.modules():
        for name, p in layer._parameters.items():
            if p is not None:
                layer._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for name, x in layer._buffers.items():
            if x is not None:
                layer._buffers[name] = torch.empty(x.shape, dtype=x.dtype)
