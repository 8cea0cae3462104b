"""Repairs to other people's packages; import this before diffusers or transformers.

torchvision wheels for CUDA do not load their compiled operators beside a CPU-only torch, and then fail at import because
they describe operators that do not exist ("operator torchvision::nms does not exist"). diffusers and transformers import
torchvision when it is installed. Declaring the two operators first lets all of them import; nothing here calls them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

_OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
              "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_library: torch.library.Library | None = None   # kept alive: the declarations vanish with it


def declare_torchvision_operators() -> bool:
    """True if the declarations were needed. Harmless without torchvision, with a sound one, and when called again."""
    global _library
    if _library is not None or "torchvision" in sys.modules or not _torchvision_is_broken():
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for signature in _OPERATORS:
        _library.define(signature)
    return True


def _torchvision_is_broken() -> bool:
    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    extensions = sorted(Path(spec.submodule_search_locations[0]).glob("_C*.so"))
    if not extensions:
        return False
    try:
        torch.ops.load_library(str(extensions[0]))   # torchvision does the same; loading twice is a no-op
    except (OSError, RuntimeError):
        return True
    return False


declare_torchvision_operators()
