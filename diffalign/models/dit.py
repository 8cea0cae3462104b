"""Adapter for SD3 and SD3.5: a diffusion transformer that predicts the velocity of a rectified flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..process import RectifiedFlow, Velocity
from ..types import Cond
from .base import Adapter, unwrap


def schedule(scheduler_config: dict[str, Any]) -> RectifiedFlow:
    return RectifiedFlow(timestep_scale=float(scheduler_config.get("num_train_timesteps", 1000)))


def unsupported(scheduler_config: dict[str, Any]) -> str | None:
    """Why this schedule is not that of a rectified flow, or None."""
    scheduler = scheduler_config.get("_class_name", "")
    return None if "FlowMatch" in scheduler else f"its scheduler {scheduler or '(none named)'} is not a flow-matching one"


@dataclass(kw_only=True)
class SD3(Adapter):
    """Stable Diffusion 3 and 3.5. Cond: tokens [N, L_clip + L_t5, D], pooled [N, D1+D2].

    The scheduler's ``shift`` bends the times of sampling, not what the transformer is told, so it plays no part here.
    """

    family, pipeline, component = "sd3", "StableDiffusion3Pipeline", "transformer"
    module_class = "SD3Transformer2DModel"
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # T5 may be left out
    pooled_is_projected = True
    # both streams of the joint attention, and SD3.5-medium's second image attention (attn2) by the same names
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    kohya_prefix = "lora_transformer"
    kohya_metadata = {"ss_base_model_version": "sd3", "modelspec.architecture": "stable-diffusion-3-medium/lora"}

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return module(hidden_states=xt.to(self.dtype), timestep=self.process.timestep(t),
                      encoder_hidden_states=cond.tokens.to(self.dtype),
                      pooled_projections=cond.pooled.to(self.dtype), return_dict=False)[0]

    def idle(self) -> tuple[str, ...]:
        # the last block drops its text stream, and with it whatever the text's queries attend to
        last = f"transformer_blocks.{len(unwrap(self.module).transformer_blocks) - 1}.attn"
        return f"{last}.add_q_proj", f"{last}.norm_added_q"

    @classmethod
    def assemble(cls, module: nn.Module, scheduler_config: dict[str, Any], identity: str = "unsaved") -> SD3:
        return cls(module=module, process=schedule(scheduler_config), param=Velocity(), identity=identity)

    @staticmethod
    def unsupported(config: dict[str, Any], scheduler_config: dict[str, Any]) -> str | None:
        if (problem := unsupported(scheduler_config)) is not None:
            return problem
        inner, outer = config.get("in_channels", 16), config.get("out_channels", 16)
        return None if outer in (None, inner) else f"its transformer takes {inner} channels and returns {outer}"

    @staticmethod
    def encode(pipe, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=pipe.text_encoder.device,
                                                  do_classifier_free_guidance=False)
        return tokens, pooled

    @staticmethod
    def unconditional(pipe) -> tuple[Tensor, Tensor]:
        _, tokens, _, pooled = pipe.encode_prompt([""], None, None, device=pipe.text_encoder.device)
        return tokens, pooled
