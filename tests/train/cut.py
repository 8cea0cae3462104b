"""One rank whose weights FSDP2 has cut. A tiny UNet, real banks.

Runs the scenarios, goes on with a run that one process began, and begins one that another will end.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from diffalign.evaluate.preference import heldout_preference
from diffalign.methods import Context
from diffalign.models import LoRA, ModelSpec, WeightBank, enable_gradient_checkpointing, load_denoiser
from diffalign.models.references import Frozen, Moving
from diffalign.train.guard import TrainingError, check_same_weights
from diffalign.train.launch import make_accelerator
from diffalign.train.sharding import cutter, forget_gathered
from diffalign.types import Memory
from diffalign.world import Single, copies, local, part, world_of

from . import toy

STEPS, GROUPS, TOKENS = 2, 4, (3, 8)
SCENARIOS = {
    "full": {"lora": None, "rule": Frozen(), "ema_decay": 0.9, "blocks": "BasicTransformerBlock,ResnetBlock2D"},
    "lora": {"lora": LoRA(rank=2), "rule": Moving(every=1), "ema_decay": 0.9, "reshard": "false", "learning_rate": 3e-3},
    "full_moving": {"lora": None, "rule": Moving(every=1, mix=0.5), "reshard": "false", "gradient_checkpointing": True},
    "full_copies": {"lora": None, "rule": Frozen(), "ema_decay": 0.9, "copies": 2},
    "lora_copies": {"lora": LoRA(rank=2), "rule": Moving(every=1), "learning_rate": 3e-3, "copies": 2},
    "lora_bf16": {"lora": LoRA(rank=2), "rule": Frozen(), "mixed_precision": "bf16"},
}


def train(folder: Path, pipeline: Path, name: str, *, rank: int = 0, world: int = 1, steps: int = STEPS,
          by_blocks: bool = True):
    """(bank, summary, held-out figures at both ends) of GROUPS pairs a step, whatever the number of processes. by_blocks:
    see ``add_up_by_blocks``, of one process in bfloat16."""
    options = dict(SCENARIOS[name])
    lora, rule = options.pop("lora"), options.pop("rule")
    tell(world, options.pop("copies", 1), options.pop("reshard", "true"), options.pop("blocks", ""))
    forward = torch.bfloat16 if options.get("mixed_precision") == "bf16" else torch.float32
    spec = ModelSpec(pretrained_model_name_or_path=str(pipeline), lora=lora)
    denoiser = load_denoiser(spec, dtype=torch.float32 if lora is None else forward)
    bank = WeightBank.build(denoiser, lora, reads=("policy", "reference"), seed=0, rule=rule, forward_dtype=forward)
    if options.get("gradient_checkpointing"):
        enable_gradient_checkpointing(denoiser)
    if by_blocks and world == 1 and forward != torch.float32:
        add_up_by_blocks(denoiser.module)
    # two micro-batches on each of two processes
    source = toy.Source((1,) * (GROUPS // world), rank=rank, world=world, tokens=TOKENS)
    heldout = [toy.Source((2,), seed=8, tokens=TOKENS).take(step)[0] for step in range(3)]
    accelerator = make_accelerator(toy.spec(**options), folder)

    def validate(bank, step):
        ctx = Context(predict=lambda *args: _autocast(accelerator, bank, *args), process=bank.denoiser.process,
                      param=bank.denoiser.param, seed=3, step=0, memory=Memory())
        return heldout_preference(ctx, heldout, draws=1, world=Single() if world == 1 else world_of(accelerator)).figures()

    return toy.train(folder / name, bank=bank, source=source, validation=validate, accelerator=accelerator,
                     max_train_steps=steps, train_batch_size=1, gradient_accumulation_steps=GROUPS // world,
                     lr_scheduler="constant", logging_steps=1, checkpointing_steps=2, **{"learning_rate": 1e-4, **options})


def tell(world: int, copies: int = 1, reshard: str = "true", blocks: str = "") -> None:
    """The variables of accelerate's launcher. copies: of weights that lie cut in world / copies processes."""
    os.environ.update(FSDP_RESHARD_AFTER_FORWARD=reshard, FSDP_TRANSFORMER_CLS_TO_WRAP=blocks,
                      ACCELERATE_USE_PARALLELISM_CONFIG=str(copies > 1 and world > 1),
                      PARALLELISM_CONFIG_DP_REPLICATE_SIZE=str(copies), PARALLELISM_CONFIG_DP_SHARD_SIZE=str(world // copies))


def copied(folder: Path, pipeline: Path, world: int) -> dict:
    """Two copies of cut weights, before and after one process changed a number of its part."""
    tell(world, copies=2)
    accelerator = make_accelerator(toy.spec(), folder)
    denoiser = load_denoiser(ModelSpec(pretrained_model_name_or_path=str(pipeline)), dtype=torch.float32)
    bank = WeightBank.build(denoiser, None, reads=("policy",), seed=0)
    bank.shard(cutter(accelerator.device, world), forget_gathered)
    params, said = bank.trainable(), []
    largest = max(params.values(), key=lambda p: p.shape[0])
    for change in (0, 1):
        local(largest)[0].add_(change if dist.get_rank() == 1 else 0)
        try:
            check_same_weights(world_of(accelerator), params)
        except TrainingError as error:
            said.append(str(error))
    return {"part": part(largest), "copies": copies(largest), "rows": len(local(largest)) / len(largest), "said": said}


def add_up_by_blocks(module) -> None:
    """Makes one process add the gradients of a block's input inside the block first, as FSDP2 does.

    Where a residual block and a skip connection read one tensor, autograd adds three gradients; a hook on a block, as FSDP2
    sets them, adds the block's own two before the third. In bfloat16 that order is the whole difference between cut and
    whole weights: 0.25 % of the first gradient here, and with beta 2000 much more two steps later.
    """
    for block in module.modules():
        if type(block).__name__ in module._no_split_modules:
            block.register_full_backward_hook(lambda *_: None)


def _autocast(accelerator, bank, *args):
    with accelerator.autocast():
        return bank.predict(*args)


def main(folder: Path, scenarios: list[str]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    pipeline, found = folder / "pipeline", {}
    for name in scenarios:
        bank, summary = train(folder / "cut", pipeline, name, rank=rank, world=world)
        found[name] = {"parameters": summary.parameters, "start": summary.validation_start, "end": summary.validation_end,
                       "plain": all(type(p) is torch.nn.Parameter for p in bank.denoiser.module.parameters())}
    if world == 4:
        found["copied"] = copied(folder, pipeline, world)
        train(folder / "ended-cut", pipeline, "full_copies", rank=rank, world=world)
    tell(world)
    found["resumed"] = train(folder / "ended-cut", pipeline, "full", rank=rank, world=world)[1].step
    train(folder / "begun-cut", pipeline, "full", rank=rank, world=world, steps=1)
    (folder / f"result-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
