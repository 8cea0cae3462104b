"""Denoisers, encoders, LoRA and weight sets. Importing this package is cheap; the names below load torch when used."""

from .spec import LoRA, ModelSpec

_LOAD = ("FAMILIES", "encoder_facts", "inspect", "load_denoiser", "load_encoders", "load_pipeline", "is_distilled",
         "model_identity", "save_pipeline")
_LORA = ("attach", "lora_state", "save_lora")
_BASE = ("Adapter", "Denoiser", "enable_gradient_checkpointing", "narrow_norms", "unwrap")

__all__ = ["EncoderFacts", "Encoders", "LoRA", "ModelSpec", "WeightBank", *_LOAD, *_LORA, *_BASE]


def __getattr__(name: str):
    if name in _LOAD:
        from . import load as module
    elif name in _LORA:
        from . import lora as module
    elif name in _BASE:
        from . import base as module
    elif name in ("EncoderFacts", "Encoders"):
        from . import encoders as module
    elif name == "WeightBank":
        from . import weights as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
