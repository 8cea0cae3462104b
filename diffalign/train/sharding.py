"""FSDP2: each process keeps its rows of every weight, gradient and moment, and gathers a block's weights when it computes it.

Asked for by accelerate's own configuration (``configs/accelerate/``: fsdp2, zero2, hsdp) or its variables. The cutting
is torch's ``fully_shard`` rather than accelerate's: that one rounds the inputs of a mixed-precision model, times and sizes
among them, keeps weights that a moved reference has outdated, and leaves the CPU out, where the tests run. Weights stay
float32 and autocast rounds them, as in one process: the losses are those of one process, in bfloat16 up to the order in which
gradients are added where a block and a skip connection read the same tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

from ..errors import ConfigError
from .spec import TrainSpec

PARALLELISM = "ACCELERATE_USE_PARALLELISM_CONFIG"  # whether the variables of accelerate's parallelism_config count


def _on(name: str) -> bool:
    return os.environ.get(name, "false").strip().lower() in ("1", "true", "yes", "on")


def is_asked() -> bool:
    """Whether accelerate was told to shard the weights."""
    return _on("ACCELERATE_USE_FSDP")


def _size(kind: str) -> int:
    """Of accelerate's parallelism_config: how many parts ("dp_shard"), or copies ("dp_replicate"), there shall be."""
    return int(os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1")) if _on(PARALLELISM) else 1


def check_launch(spec: TrainSpec) -> None:
    """What accelerate was told, but this loop does not do. Raises ConfigError."""
    if _on("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError("accelerate: DeepSpeed moves the weights inside backward, before a step that is not finite can be "
                          "refused; use configs/accelerate/zero2.yaml, which shares out gradients and moments by FSDP2")
    if not is_asked():
        return
    if os.environ.get("FSDP_VERSION", "1").strip() != "2":
        raise ConfigError("accelerate: fsdp_version 1 is not supported; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)")
    for kind in ("tp", "cp", "sp"):
        if _size(kind) > 1:
            raise ConfigError(f"accelerate: parallelism_config_{kind}_size {_size(kind)} is not supported: a picture is "
                              "computed by one process; leave it out, and set dp_replicate_size and dp_shard_size only")
    copies, parts, processes = _size("dp_replicate"), _size("dp_shard"), int(os.environ.get("WORLD_SIZE", "1"))
    if copies * parts > 1 and (parts == 1 or copies * parts != processes):
        raise ConfigError(f"accelerate: parallelism_config_dp_replicate_size {copies} times dp_shard_size {parts} must be "
                          f"the {processes} processes, and dp_shard_size above 1 (whole weights: configs/accelerate/ddp.yaml)")
    for name, instead in (("FSDP_OFFLOAD_PARAMS", "more processes"),
                          ("FSDP_ACTIVATION_CHECKPOINTING", "train.gradient_checkpointing=true")):
        if _on(name):
            raise ConfigError(f"accelerate: {name.lower()} is not supported; set it to false and use {instead}")
    if spec.mixed_precision == "fp16":
        raise ConfigError("train.mixed_precision: fp16 cannot be scaled with weights that FSDP2 has cut; use bf16 or no")
    if spec.optimizer != "adamw":
        raise ConfigError(f"train.optimizer: {spec.optimizer} cannot work on weights that FSDP2 has cut; use adamw")


def cutter(device, processes: int) -> Callable[[nn.Module], None]:
    """cut(module): shards its weights in place over all processes, its blocks one by one.

    With accelerate's parallelism_config over the dp_shard_size processes beside each other, and as many copies as
    dp_replicate_size (HSDP): blocks are then gathered inside a machine, and only gradients travel between machines.
    The blocks are the classes that accelerate was told (fsdp_transformer_layer_cls_to_wrap), else those that the model
    itself says must stay together. fsdp_reshard_after_forward false keeps gathered weights until the backward (ZeRO-2).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    copies = _size("dp_replicate")
    shape = (processes,) if copies == 1 else (copies, processes // copies)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard")[-len(shape):])
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").strip().lower() != "false"
    told = [name.strip() for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip()]

    def cut(module: nn.Module) -> None:
        names = told or getattr(module, "_no_split_modules", None) or ()
        blocks = [block for block in module.modules() if type(block).__name__ in names and block is not module]
        for block in [*reversed(blocks), module]:  # inner ones first
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return cut


def forget_gathered(module: nn.Module) -> None:
    """Drop gathered weights, after the process's own rows were changed other than by an optimizer's step."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
