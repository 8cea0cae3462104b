"""What a recipe says about the training run. Names are the ecosystem's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LARGEST = 2**20  # of a batch or an accumulation: far beyond any use, far below what overflows an index


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One run of the loop.

    train_batch_size: groups (pairs) per process and micro-batch; a step sees train_batch_size x
    gradient_accumulation_steps x processes groups. lr_warmup_steps and all other steps are optimizer steps.
    ema_decay: null keeps no moving average. report_to: accelerate's tracker names; metrics.jsonl is always written.
    resume: "auto" continues from the newest valid checkpoint in output_dir, "never" refuses to touch an old run.
    validation_steps: every how many steps the held-out preference accuracy is measured (0: only at both ends).
    dataloader_num_workers: above 0, a thread takes the next step's batches meanwhile and pins them for the GPU; what lies on
    disk is read ahead in any case. allow_change: recipe keys that may differ from the checkpoint's on resume, such as
    ("train.learning_rate",). gradient_checkpointing: true keeps the inputs of blocks and runs the blocks again in the
    backward pass; selective also keeps what attention and convolutions gave (diffusers' UNets and transformers). compile:
    torch.compile of the transformer blocks, a minute or more at the start; where it does not work, or with auto is no faster,
    the run says so and goes on without. A clock decides auto, so that a run and its resumption may differ in the last bits.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    lr_warmup_steps: int = 0
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "bf16"
    gradient_checkpointing: bool | Literal["selective"] = False
    enable_xformers_memory_efficient_attention: bool = False
    allow_tf32: bool = True
    compile: Literal["off", "on", "auto"] = "off"
    ema_decay: float | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    resume: Literal["auto", "never"] = "auto"
    logging_steps: int = 10
    validation_steps: int = 0
    report_to: tuple[str, ...] = ()
    dataloader_num_workers: int = 0
    cpu: bool = False
    allow_change: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST:,}, got {getattr(self, name)}")
        for name in ("lr_warmup_steps", "logging_steps", "validation_steps", "dataloader_num_workers", "adam_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("learning_rate", "adam_epsilon"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.checkpoints_total_limit < 2:
            raise ValueError("checkpoints_total_limit must be at least 2: a single checkpoint would be lost with its file")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}")
