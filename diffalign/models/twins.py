"""Plain twins of modules whose weights FSDP2 has cut: what saves files, and what is left when training is over."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..world import whole


def hollow(module: nn.Module) -> nn.Module:
    """A copy without memory: the same layers and buffers, its weights on the meta device. Call it before the cut."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
             for p in module.parameters()}
    return copy.deepcopy(module, empty)


def gathered(module: nn.Module, keep: bool, names: set[str] | None = None, device: str | torch.device = "cpu"
             ) -> dict[str, Tensor]:
    """Collective: the module's whole tensors on ``device``, where ``keep``; else nothing. names: only these."""
    found = {}
    for name, tensor in module.state_dict().items():
        if names is None or name in names:
            value = whole(tensor)  # all processes, one tensor at a time
            if keep:
                found[name] = value.to(device)
    return found


def fill(twin: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The twin with these weights; the others stay where they are."""
    twin.load_state_dict(tensors, strict=False, assign=True)
    return twin
