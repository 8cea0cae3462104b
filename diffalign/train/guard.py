"""What stops a run, and why: non-finite steps, weights that do not move, signals, memory."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import ResourceError, UserError
from ..process import CURRENT
from ..types import Batch, Loss
from ..world import Single, World, copies, is_cut, local, part

SAMPLE = 65_536  # elements of a tensor that movement is measured on; every LoRA tensor is smaller
AGREEMENT = 1e-3  # largest difference of two weight sets at the start, relative to the prediction's root mean square
SKIPS = 50  # float16 overflows in a row: the scale has fallen from 65536 to nothing


class TrainingError(UserError):
    """The run can't go on; the message says at which step, why, and what to try."""


class Preempted(UserError):
    """Asked to stop by a signal; a checkpoint was saved. Exit code 75 tells a scheduler to run the same command again."""

    exit_code = 75


class Signals:
    """Context manager. SIGTERM, SIGINT, SIGUSR1: ``asked`` becomes true and the loop stops after its step; a second signal
    ends the process at once. Outside the main thread, where Python has no handlers, it does nothing."""

    WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.asked, self._old = False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in self.WATCHED}
        return self

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True


@dataclass
class Trace:
    """What a micro-batch was made of, to name its rows when something breaks. t: the times the policy was asked for."""

    batch: Batch
    per_group: Tensor | None = None
    t: list[Tensor] = field(default_factory=list)

    def rows(self, only_bad: bool) -> list[str]:
        """One text per group: ``row 17 visit 0 t=0.431``."""
        finite = torch.isfinite(self.per_group).cpu() & torch.isfinite(self.batch.x0).flatten(1).all(1).cpu()
        return [f"row {row} visit {visit} t={self._time(i)}" for i, (row, visit) in enumerate(self.batch.key.tolist())
                if not (only_bad and finite[i])]

    def _time(self, i: int) -> str:
        times = [t.view(-1, self.batch.groups, self.batch.k)[:, i, 0] for t in self.t
                 if t.numel() % (self.batch.groups * self.batch.k) == 0]
        return ",".join(f"{t:.4g}" for t in torch.cat(times).tolist()) if times else "?"


def nonfinite_rows(traces: list[Trace], rank: int, limit: int = 8) -> str:
    """The groups with a non-finite loss or latent, or, when only a gradient is, all groups of the step."""
    bad = [row for trace in traces for row in trace.rows(only_bad=True)]
    rows = bad or [row for trace in traces for row in trace.rows(only_bad=False)]
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return ("*" if bad else "") + f"process {rank}: " + "; ".join(rows[:limit]) + more


def nonfinite_error(step: int, loss: float, grad_norm: float, texts: list[str]) -> TrainingError:
    """texts: ``nonfinite_rows`` of all ranks. Ranks with a bad loss are named, the others only when none has one."""
    rows = [text[1:] for text in texts if text.startswith("*")] or texts
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
    return TrainingError(f"step {step}: {what}, so the run stopped before any weight moved; {' | '.join(rows)}. Look at these "
                         "rows, lower train.learning_rate, or use train.mixed_precision=bf16 or no; the last checkpoint is "
                         "intact")


class Start:
    """Where the trainable tensors began, on at most SAMPLE evenly spaced elements each: to see what moved, and how far.

    Of tensors that are cut every process looks at its own rows, and ``world`` adds the findings up.
    """

    def __init__(self, params: dict[str, Tensor], world: World | None = None):
        self.values = {name: _sample(p).clone() for name, p in params.items()}
        self.alive: Tensor | None = None
        self.world = world if world is not None and any(map(is_cut, params.values())) else Single()

    def note_gradients(self, params: dict[str, torch.nn.Parameter]) -> None:
        """Remember which tensors get a gradient: weight decay moves the others too. No wait for the device."""
        some = torch.stack([local(p).new_zeros((), dtype=torch.bool) if p.grad is None else local(p.grad).any()
                            for p in params.values()])
        self.alive = some if self.alive is None else self.alive | some

    def stuck(self, params: dict[str, Tensor]) -> list[str]:
        """Names of the tensors that never had a gradient."""
        if self.alive is None:
            return []
        return [name for name, count in zip(params, self.world.sum(self.alive.float()).tolist()) if not count]

    def distance(self, params: dict[str, Tensor]) -> float:
        """Norm of the change of all trainable weights; exact for LoRA, estimated for tensors above SAMPLE elements."""
        squares = [(_sample(p) - self.values[name].to(p.device)).double().square().mean() * local(p).numel() / copies(p)
                   for name, p in params.items() if local(p).numel()]
        total = torch.stack(squares).sum() if squares else self.values[next(iter(params))].new_zeros((), dtype=torch.double)
        return self.world.sum(total).sqrt().item()

    def still(self, params: dict[str, Tensor]) -> list[str]:
        """Names of the tensors that have not moved at all."""
        moved = torch.stack([(_sample(p) != self.values[name].to(p.device)).any() for name, p in params.items()])
        return [name for name, count in zip(params, self.world.sum(moved.float()).tolist()) if not count]


def _sample(p: Tensor) -> Tensor:
    rows = local(p)
    return rows.flatten()[::max(1, -(-rows.numel() // SAMPLE))]


def check_moved(step: int, start: Start, params: dict[str, Tensor], warming_up: bool) -> None:
    """TrainingError when a trainable tensor never had a gradient, or has not moved.

    While the learning rate is still warming up, standing still may only mean that the step was too small for float32: the
    caller asks again after the warm-up.
    """
    stuck, still = start.stuck(params), start.still(params)
    if stuck and len(stuck) == len(params):
        raise TrainingError(f"step {step}: all trainable tensors get no gradient: no group of these steps says what is better "
                            "(ties, or only disliked pictures), or the adapter is cut off from the forward")
    if stuck:
        raise TrainingError(f"step {step}: {len(stuck)} of {len(params)} trainable tensors get no gradient ({_few(stuck)}): "
                            "they are not part of the forward, or gradient checkpointing or an adapter switch cut them off")
    if still and not warming_up:
        raise TrainingError(f"step {step}: {len(still)} of {len(params)} trainable tensors have not moved ({_few(still)}): "
                            "train.learning_rate is too small for their float32 values, or they are copies")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def compare_sets(method, batch: Batch, ctx) -> tuple[Loss, dict[str, float]]:
    """The loss without gradients, and how far each weight set's predictions lie from the policy's (relative, max)."""
    seen: dict[str, list[Tensor]] = {}

    def predict(name, xt, t, cond):
        raw = ctx.predict(name, xt, t, cond)
        if name != CURRENT:  # inversions ask the policy elsewhere
            seen.setdefault(name, []).append(raw.detach().float())
        return raw

    with torch.no_grad():
        loss = method.loss(batch, replace(ctx, predict=predict))
    policy = torch.cat(seen["policy"]) if "policy" in seen else None
    others = {name: torch.cat(raw) for name, raw in seen.items() if name != "policy"}
    scale = None if policy is None else policy.square().mean().sqrt().clamp(min=1e-12)
    return loss, {name: ((raw - policy).abs().max() / scale).item() for name, raw in others.items()
                  if policy is not None and raw.shape == policy.shape}


def disagreement_error(apart: dict[str, float]) -> TrainingError | None:
    """apart: from ``compare_sets``, before the first step, when every weight set still is the policy."""
    for name, distance in apart.items():
        if not distance <= AGREEMENT:
            return TrainingError(f"before step 1 the {name!r} predictions differ from the policy's by {distance:.2g} of their "
                                 f"size: the {name} is not the model that training starts from, or dropout is on; the first "
                                 "loss would mean nothing")
    return None


def check_same_weights(world: World, params: dict[str, Tensor]) -> None:
    """Raise TrainingError on all ranks unless every rank holds the same bits. params: float32 tensors by name.

    A sum of the bit patterns as integers: any single flipped bit changes it. Parts of cut tensors are compared with their
    copies on other machines; where there are none, there is nothing to compare.
    """
    params = {name: p for name, p in params.items() if not is_cut(p) or copies(p) > 1}
    if not params:
        return
    sums = torch.stack([local(p).view(torch.int32).sum(dtype=torch.int64) for p in params.values()]).tolist()
    held = part(next(iter(params.values())))
    twins: dict[str, list[list[int]]] = {}
    for text in world.gather(json.dumps([held, sums])):
        where, found = json.loads(text)
        twins.setdefault(str(where), []).append(found)
    for same in twins.values():
        for name, *values in zip(params, *same):
            if len(set(values)) > 1:
                raise TrainingError(f"the processes hold different weights in {name}: a fault of memory or network, or a "
                                    "forward that bypassed DDP; resume from the checkpoint before")


@contextmanager
def readable_out_of_memory(spec, device: torch.device):
    """Turns the device's out-of-memory error into a ResourceError with figures and remedies, in order."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise  # torch has no type of its own for the CPU's
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        raise ResourceError(
            f"out of memory on {device}{peak}, with train.train_batch_size={spec.train_batch_size}. Try, in this order: "
            "train.gradient_checkpointing=true; half of train.train_batch_size with twice "
            "train.gradient_accumulation_steps (the same run); a smaller data.resolution") from error
