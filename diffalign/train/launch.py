"""Setting accelerate up: placement, processes, mixed precision, trackers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch

from .. import _compat  # noqa: F401  (accelerate imports transformers)
from ..errors import ConfigError
from .identity import flatten
from .sharding import PARALLELISM, check_launch
from .spec import TrainSpec

PATIENCE = timedelta(hours=2)  # one rank may encode, validate or save while the others wait
EXTRAS = ("tensorboard",)


def make_accelerator(spec: TrainSpec, output_dir: Path):
    """The Accelerator that a run uses. Make it first when models and data need its device, rank or world size.

    The CPU is taken when the recipe says so or no CUDA device is there. ConfigError for float16 without CUDA, for a tracker
    that isn't installed, and for what accelerate was told that this loop does not do. Calling it again in one process is
    allowed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, patch_environment
    cpu = spec.cpu or not torch.cuda.is_available()
    if spec.mixed_precision == "fp16" and cpu:
        raise ConfigError("train.mixed_precision: fp16 needs a CUDA device, whose gradients can be scaled; use bf16 or no")
    _check_trackers(spec)
    check_launch(spec)
    if not cpu:
        torch.set_float32_matmul_precision("high" if spec.allow_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = spec.allow_tf32
    AcceleratorState._reset_state()  # a second run in this process may use another precision; process groups are kept
    # no buffer is trained, and broadcasting them would hang when ranks validate unlike numbers of batches
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    with patch_environment(**{PARALLELISM: "false"}):  # the cutting is ours, on the CPU too, where accelerate refuses it
        return Accelerator(cpu=cpu, mixed_precision=spec.mixed_precision, log_with=list(spec.report_to) or None,
                           project_dir=str(output_dir), kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), ddp])


def _check_trackers(spec: TrainSpec) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    installed = {str(name) for name in get_available_trackers()}
    for name in spec.report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"train.report_to: unknown tracker {name!r}; choose from {known}")
        if name not in installed:
            package = f"'diffalign[{name}]'" if name in EXTRAS else name
            raise ConfigError(f"train.report_to: {name} is not installed; run `pip install {package}`, or leave it out")


def start_trackers(accelerator, spec: TrainSpec, config: dict) -> None:
    """Trackers get the flat recipe; what is no number or text is spelt as text."""
    if spec.report_to:
        plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value)
                 for key, value in flatten(config).items()}
        accelerator.init_trackers("diffalign", config=plain)


def stop_trackers(accelerator) -> None:
    """Not ``end_training``: that would also take down the process group, which evaluation still needs."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
