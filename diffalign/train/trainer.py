"""The training loop, and nothing about any method, model or data set.

A step: take the groups, add up their losses over micro-batches and processes, divide once by the global count of groups,
agree that everything is finite, and only then move the weights. Everything random is keyed by (seed, step) or by row, so
that a resumed run repeats the uncut one to the bit.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .. import rng
from ..errors import CheckpointError
from ..methods import Context, Method
from ..models.base import Denoiser
from ..types import Memory, carried
from ..world import on_first, raise_together, whole, world_of
from . import checkpoint, guard, sharding
from .feed import Feed, Source, to_device
from .hooks import Hook, Log, Progress, Recent, Saturation, truncate_log
from .identity import check_same_run, plain
from .launch import make_accelerator, start_trackers, stop_trackers
from .optim import Average, build_optimizer, learning_rates, load_optimizer_state, optimizer_state, set_learning_rate
from .spec import TrainSpec
from .state import Finding, RunState, Summary, Window
from .tally import Tally, Totals

CHECK_MOVED = 3  # updates: LoRA's first matrix gets its first gradient at the second
EXPORT_LIMIT = 2**30  # bytes of trainable weights up to which every checkpoint also holds the files that users load

Validation = Callable[["Bank", int], dict[str, float]]


class Bank(Protocol):
    """What the loop needs of a weight bank (``diffalign.models.weights.WeightBank``)."""

    denoiser: Denoiser
    identity: str

    def predict(self, name: str, xt: Tensor, t: Tensor, cond) -> Tensor: ...

    def trainable(self) -> dict[str, torch.nn.Parameter]: ...

    def advance(self, step: int) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...

    def save(self, folder: Path, metadata: dict[str, str]) -> None: ...

    # only where accelerate shards the weights

    def shard(self, cut: Callable, forget: Callable) -> None: ...

    def gather(self, keep: bool) -> None: ...

    def unshard(self) -> None: ...


class Monitor(Protocol):
    """Looks at the weights every ``every`` steps, and may end the run. On all ranks, which must all get the same finding."""

    every: int

    def __call__(self, bank: Bank, step: int) -> Finding: ...


def fit(*, method: Method, bank: Bank, source: Source, spec: TrainSpec, seed: int, output_dir: Path, config: dict,
        hooks: Sequence[Hook] = (), validation: Validation | None = None, monitor: Monitor | None = None,
        identity: dict[str, str] | None = None, metadata: dict[str, str] | None = None, accelerator=None,
        progress: bool = True) -> Summary:
    """Train ``bank``'s policy; resume first when ``output_dir`` holds a checkpoint of the same run.

    config: the resolved recipe, written into each checkpoint and compared on resume. identity: hashes of what else the run
    depends on, such as the base model's. metadata: texts for the header of the files that users load. validation(bank,
    step): on all ranks, without gradients, with the averaged weights when an average is kept; at step 0, every
    ``validation_steps`` and at the end. monitor: called likewise, at step 0 and every
    ``monitor.every``; where it says stop, a checkpoint is saved and the run ends as if that had been its last step.
    accelerator: one from ``make_accelerator``, when the caller needed it earlier.

    Afterwards the bank holds the weights that were saved into ``output_dir`` (the moving average when there is one).
    Raises CheckpointError, TrainingError, ResourceError; Preempted (exit code 75) when a signal asked to stop.
    """
    output_dir = Path(output_dir)
    checkpoint.check_writable(output_dir)
    accelerator = accelerator or make_accelerator(spec, output_dir)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("the accelerator must not accumulate: the loop divides by the global count of groups itself")
    trainer = _Trainer(method, bank, source, spec, seed, output_dir, config, validation, monitor, identity or {},
                       metadata or {}, accelerator, progress)
    with trainer.signals, trainer.running():
        return trainer.run(hooks)


class _Trainer:
    """One call of ``fit``."""

    def __init__(self, method, bank, source, spec, seed, output_dir, config, validation, monitor, identity, metadata,
                 accelerator, progress):
        self.method, self.bank, self.spec, self.seed, self.output_dir = method, bank, spec, seed, output_dir
        self.source, self.validation, self.monitor, self.accelerator = source, validation, monitor, accelerator
        self.config, self.metadata = plain(config), metadata
        self.identity = {**identity, "reference": bank.identity, "data": source.identity, "seed": str(seed)}
        self.world, self.device = world_of(accelerator), accelerator.device
        self.groups_per_step = spec.train_batch_size * spec.gradient_accumulation_steps * self.world.size
        self.state, self.initial_loss, self.saved_step, self.save_is_due, self.skips = RunState(), None, None, False, 0
        self.signals, self.notes, self.lock = guard.Signals(), [], None
        self.sharded = sharding.is_asked() and self.world.size > 1
        self._place()
        self.feed = Feed(source, self.device, spec.dataloader_num_workers > 0, spec.max_train_steps)
        self.recent = Recent()
        self.visible = progress and self.world.rank == 0
        self.log = Log(output_dir, spec.logging_steps, writes=self.world.rank == 0, measure=self._measure,
                       tracker=accelerator.log if spec.report_to else None)

    def _place(self) -> None:
        """Model, optimizer and average on the device, in accelerate's wrapping."""
        self.bank.denoiser.module.train()
        if self.sharded:
            self.bank.shard(sharding.cutter(self.device, self.world.size), sharding.forget_gathered)
        elif sharding.is_asked():  # one process has nothing to cut, and accelerate wraps no single model for FSDP2
            self.bank.denoiser.module.to(self.device)
        else:
            with warnings.catch_warnings():  # accelerate has no other name for it yet
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self.bank.denoiser.module = self.accelerator.prepare_model(self.bank.denoiser.module)
        self.params = self.bank.trainable()
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.params, self.spec))
        self.rate = learning_rates(self.spec)
        self.average = Average(self.params, self.spec.ema_decay) if self.spec.ema_decay is not None else None
        self.start = guard.Start(self.params, self.world)

    @contextmanager
    def running(self):
        """Whatever happens, the caller gets its plain module back, the folder is free, and threads and trackers end."""
        self.progress = Progress(self.spec.max_train_steps, self.spec.logging_steps, visible=False)
        try:
            yield
        finally:
            if self.lock is not None:
                os.close(self.lock)
            self.feed.close()
            self.progress.close()
            stop_trackers(self.accelerator)
            self.bank.denoiser.module = self.accelerator.unwrap_model(self.bank.denoiser.module, keep_fp32_wrapper=False)
            self.accelerator.free_memory()

    def run(self, hooks: Sequence[Hook]) -> Summary:
        self._resume()
        start_trackers(self.accelerator, self.spec, self.config)
        self._begin()
        watchers = [self.log, self.progress, Saturation(self.progress.say), *hooks]
        state, spec, stopping = self.state, self.spec, False
        while state.step < spec.max_train_steps and not (state.stopped and self.saved_step == state.step):
            clock = time.monotonic()
            totals = self._step()
            state.seconds += time.monotonic() - clock
            for hook in watchers:
                hook.after_step(state, totals.report)
            self.recent.add(totals.report)
            if spec.validation_steps and state.step % spec.validation_steps == 0:
                self._validate()
            if self.monitor is not None and state.step % self.monitor.every == 0:
                self._watch()
            stopping = stopping or totals.stop
            self._save_if_due(stopping or state.stopped is not None)
            if stopping and self.saved_step == state.step:
                raise guard.Preempted(f"stopped by a signal after step {state.step} of {spec.max_train_steps}; "
                                      f"checkpoint-{state.step} is saved: resume by running the same command again")
        return self._finish()

    # one step

    def _step(self) -> Totals:
        """Gradients of sum / global count, a check on all ranks, the update."""
        with guard.readable_out_of_memory(self.spec, self.device):
            totals, traces = self._gradients()
            self._check_finite(totals, traces)
            self._update(totals)
        return totals

    def _gradients(self) -> tuple[Totals, list[guard.Trace]]:
        self.optimizer.zero_grad(set_to_none=True)
        micros = self.feed.take(self.state.step)
        counts = [batch.valid.any(1).sum() for batch in micros]  # a group without a candidate is padding
        groups = self.world.sum(carried(torch.stack(counts).sum(), self.device)).clamp(min=1)
        tally, traces = Tally(self.device), []
        for index, (batch, count) in enumerate(zip(micros, counts)):
            is_last = index == len(micros) - 1
            # cut weights: summed at once, as whole gradients would need the memory that cutting saves
            together = is_last or self.sharded
            with nullcontext() if together else self.accelerator.no_sync(self.bank.denoiser.module):
                loss, trace = self._loss(batch, index)
                # DDP averages over ranks; times the number of ranks it is a sum
                self.accelerator.backward(loss.per_group.sum() * (self.world.size / groups))
            tally.add(loss, count)
            traces.append(trace)
        norm = self.accelerator.clip_grad_norm_(list(self.params.values()), self.spec.max_grad_norm)
        return tally.reduce(self.world, whole(norm), self.signals.asked), traces

    def _loss(self, batch, index: int):
        """The method's loss for one micro-batch. Only dropout reads the global generator, which is keyed too."""
        torch.manual_seed(rng.integer(self.seed, "dropout", self.state.step, index, self.world.rank))
        trace = guard.Trace(batch)
        loss = self.method.loss(to_device(batch, self.device), self._context(trace))
        trace.per_group = loss.per_group.detach()
        return loss, trace

    def _context(self, trace: guard.Trace | None = None) -> Context:
        def predict(name, xt, t, cond):
            if trace is not None and name == "policy":
                trace.t.append(t)
            # a context of its own for each pass: autocast would reuse weights cast without gradients
            with self.accelerator.autocast():
                return self.bank.predict(name, xt, t, cond)

        denoiser = self.bank.denoiser
        return Context(predict=predict, process=denoiser.process, param=denoiser.param, seed=self.seed,
                       step=self.state.step, memory=self.state.memory)

    def _check_finite(self, totals: Totals, traces: list[guard.Trace]) -> None:
        """All ranks see the same totals, so all stop, or none."""
        loss_is_finite, norm_is_finite = (abs(x) < float("inf") for x in (totals.loss, totals.grad_norm))
        overflow = self.accelerator.scaler is not None and loss_is_finite and not norm_is_finite
        self.skips = self.skips + 1 if overflow else 0
        if (loss_is_finite and norm_is_finite) or (overflow and self.skips < guard.SKIPS):
            return
        texts = self.world.gather(guard.nonfinite_rows(traces, self.world.rank))
        raise guard.nonfinite_error(self.state.step + 1, totals.loss, totals.grad_norm, texts)

    def _update(self, totals: Totals) -> None:
        state = self.state
        state.learning_rate = self.rate(state.step)
        set_learning_rate(self.optimizer, state.learning_rate)
        self.optimizer.step()
        state.memory.update(totals.observed)
        norm = totals.grad_norm if totals.grad_norm < float("inf") else float("nan")
        totals.report.update(grad_norm=(norm, 1.0) if norm == norm else (0.0, 0.0),
                             clipped=(float(norm > self.spec.max_grad_norm), 1.0))
        if norm == norm:  # else float16 overflowed; accelerate does not see that a fused optimizer skipped its step
            state.updates += 1
            if self.average is not None:
                self.average.update()
            self._check_moved()
        moved = self.bank.advance(state.step) or {}
        if getattr(self.bank, "renewed", False):
            state.memory.forget()
        totals.report.update({name: (value, 1.0) for name, value in moved.items()})
        state.step += 1
        state.samples += self.groups_per_step

    def _check_moved(self) -> None:
        """After the third update (or the last step's), and again when the warm-up is over if something stood still.

        A warm-up begins at a learning rate of zero: that step moves nothing, and so gives no tensor its first gradient.
        """
        state, last = self.state, self.state.step + 1 == self.spec.max_train_steps
        if last and self.rate(max(0, state.step - 1)) == 0:
            return  # too short a run to tell
        warming_up = self.spec.lr_scheduler != "constant" and state.step + 1 < self.spec.lr_warmup_steps
        if state.updates <= CHECK_MOVED:
            self.start.note_gradients(self.params)
        first, after_warmup = state.updates == CHECK_MOVED, state.step == self.spec.lr_warmup_steps
        if self.accelerator.scaler is not None and warming_up:
            return  # tiny weights vanish in float16, and their gradients with them
        if first or (last and state.updates < CHECK_MOVED) or (after_warmup and state.updates > CHECK_MOVED):
            guard.check_moved(state.step + 1, self.start, self.params, warming_up and not last)

    # both ends

    def _begin(self) -> None:
        self.progress = Progress(self.spec.max_train_steps, self.spec.logging_steps, initial=self.state.step,
                                 visible=self.visible)
        count = sum(p.numel() for p in self.params.values())
        self.progress.say(f"training {count:,} parameters in {len(self.params)} tensors on {self.device} "
                          f"({self.spec.mixed_precision}), {self.groups_per_step} pairs a step ({self.spec.train_batch_size} "
                          f"x {self.spec.gradient_accumulation_steps} accumulated x {self.world.size} processes), "
                          f"steps {self.state.step} to {self.spec.max_train_steps}")
        for note in self.notes:
            self.progress.say(note)
        if self.saved_step is None:
            self._check_start()
            self._validate()
            self.state.validation_start = self.state.validation_end
            if self.monitor is not None:
                self._watch()

    def _check_start(self) -> None:
        """Every weight set must agree with the policy before the first step; prints the loss that this gives."""
        with guard.readable_out_of_memory(self.spec, self.device):
            batch = self.feed.peek(0)[0]
            loss, apart = guard.compare_sets(self.method, to_device(batch, self.device), self._context())
        raise_together(self.world, guard.disagreement_error(apart), guard.TrainingError)
        local = torch.stack([loss.per_group.sum().double(), carried(batch.valid.any(1).sum(), self.device).double()])
        total, groups = self.world.sum(local).tolist()
        self.initial_loss = total / max(1.0, groups)
        why = f" (policy = {', '.join(apart)}, margin 0; logistic DPO gives ln 2 = 0.693)" if apart else ""
        self.progress.say(f"initial loss {self.initial_loss:.4g}{why}")

    def _validate(self, partial: bool = False) -> None:
        state = self.state
        if self.validation is None or state.validated == state.step:
            return
        with self._looking(), self.accelerator.autocast():
            state.validation_end = dict(self.validation(self.bank, state.step))
        state.validated = state.step
        self.log.write(state.step, {f"validation/{name}": value for name, value in state.validation_end.items()}, partial)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in state.validation_end.items())
        self.progress.say(f"validation at step {state.step}: {figures}")

    def _watch(self) -> None:
        state = self.state
        with self._looking():
            finding = self.monitor(self.bank, state.step)
        self.log.write(state.step, {f"monitor/{name}": value for name, value in finding.figures.items()})
        self.progress.say(finding.said)
        if finding.stop and state.step < self.spec.max_train_steps:
            state.stopped = finding.stop
            self.progress.say(f"the run ends at step {state.step} of {self.spec.max_train_steps}: {finding.stop}")

    @contextmanager
    def _looking(self):
        """The weights as they would be used: averaged where there is an average, without gradients."""
        module = self.bank.denoiser.module
        module.eval()
        with self._averaged(), torch.no_grad():
            yield
        module.train()

    def _finish(self) -> Summary:
        state = self.state
        if state.window.values:
            self.log.line(state, partial=True)
        on_grid = self.spec.validation_steps and state.step % self.spec.validation_steps == 0
        self._validate(partial=not on_grid)
        if self.average is not None:
            self.average.copy_to_model()
            self._forget()
        if self.sharded:  # who comes after training finds plain modules
            self.bank.unshard()
        on_first(self.world, self._save_for_users, CheckpointError)
        return Summary(step=state.step, samples=state.samples, seconds=state.seconds, groups_per_step=self.groups_per_step,
                       parameters=sum(p.numel() for p in self.params.values()), initial_loss=self.initial_loss,
                       metrics=self.recent.means(), validation_start=state.validation_start,
                       validation_end=state.validation_end, stopped=state.stopped)

    def _save_for_users(self) -> None:
        with checkpoint.disk_errors(f"cannot save the trained weights in {self.output_dir}", self.output_dir, self._size()):
            self._export(self.output_dir)

    # checkpoints

    def _save_if_due(self, stopping: bool) -> None:
        step = self.state.step
        due = stopping or step % self.spec.checkpointing_steps == 0 or step == self.spec.max_train_steps
        self.save_is_due = self.save_is_due or due
        if self.save_is_due and self.source.boundary(step):
            self._save()

    def _save(self) -> None:
        """On all ranks: all prove that they hold the same weights, rank 0 writes, all hear of a failure."""
        guard.check_same_weights(self.world, self.params)
        parts, numbers = self._parts()
        exports = self._size() <= EXPORT_LIMIT
        if self.sharded:
            parts = {name: self._whole(tensors) for name, tensors in parts.items()}
            if exports:
                with self._averaged():
                    self.bank.gather(self.world.rank == 0)
        on_first(self.world, lambda: self._write(parts, numbers, self._export_averaged if exports else None), CheckpointError)
        self.saved_step, self.save_is_due = self.state.step, False

    def _parts(self) -> tuple[checkpoint.Groups, dict]:
        """Tensors of a checkpoint by file, and the numbers that belong to them."""
        optimizer, optimizer_numbers = optimizer_state(self.optimizer, self.params)
        tensors = {"weights": self.bank.state(), "optimizer": optimizer}
        numbers = {"optimizer": optimizer_numbers, "ema": None}
        if self.average is not None:
            tensors["ema"], numbers["ema"] = self.average.state()
        return tensors, numbers

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Collective: cut tensors put together one by one, in rank 0's memory; nothing on the others."""
        found = {}
        for name, tensor in tensors.items():
            value = whole(tensor)
            if self.world.rank == 0:
                found[name] = value.cpu()
        return found

    def _write(self, tensors: checkpoint.Groups, numbers: dict, export: Callable[[Path], None] | None) -> None:
        state, scaler = self.state, self.accelerator.scaler
        numbers = {"samples": state.samples, "updates": state.updates, "seconds": state.seconds,
                   "memory": state.memory.values, "window": state.window.values,
                   "validation_start": state.validation_start, "validation_end": state.validation_end,
                   "validated": state.validated, "stopped": state.stopped, **numbers,
                   "scaler": None if scaler is None else scaler.state_dict(), "config": self.config,
                   "identity": self.identity, "groups_per_step": self.groups_per_step, "initial_loss": self.initial_loss,
                   "recent": list(self.recent.reports)}
        checkpoint.save(self.output_dir, state.step, tensors, numbers, keep=self.spec.checkpoints_total_limit, export=export)

    def _resume(self) -> None:
        """Restore the newest whole checkpoint, or start; drop log lines beyond it."""
        folder = on_first(self.world, self._find, CheckpointError)
        if folder:
            self._restore(self.output_dir / folder)
        if self.world.rank == 0:
            for name in ("metrics.jsonl", "timing.jsonl"):
                truncate_log(self.output_dir / name, self.state.step if folder else -1)  # from the start: not even step 0's
        self.world.barrier()

    def _find(self) -> str | None:
        if self.spec.resume == "never" and checkpoint.checkpoints(self.output_dir):
            raise CheckpointError(f"train.resume: {self.output_dir} holds checkpoints of an earlier run, and resume=never "
                                  "will not touch them; choose another output_dir, or resume=auto to continue it")
        self.lock = checkpoint.claim(self.output_dir)
        checkpoint.clean(self.output_dir)
        folder, notes = checkpoint.newest(self.output_dir)
        self.notes = [f"note: {note}; the folder was renamed to broken-..., {folder.name} is used instead" for note in notes]
        return None if folder is None else folder.name

    def _restore(self, folder: Path) -> None:
        stored = checkpoint.load(folder, verified=True)
        check_same_run(folder, stored.state, config=self.config, identity=self.identity,
                       groups_per_step=self.groups_per_step, allow_change=self.spec.allow_change)
        expected = {name: [str(t.dtype), list(t.shape)] for name, t in self.bank.state().items()}
        checkpoint.check_tensors(folder / "weights.safetensors", stored.tensors["weights"], expected)
        self.bank.load_state(stored.tensors["weights"])
        load_optimizer_state(self.optimizer, self.params, stored.tensors["optimizer"], stored.state["optimizer"])
        if self.average is not None:
            self.average = Average(self.params, self.spec.ema_decay)
            if stored.state["ema"] is not None:
                self.average.load_state(stored.tensors["ema"], stored.state["ema"])
        if self.accelerator.scaler is not None and stored.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(stored.state["scaler"])
        self._restore_numbers(stored.state)
        self.notes.append(f"resuming from {folder}")

    def _restore_numbers(self, saved: dict) -> None:
        memory = Memory(self.state.memory.decay)
        memory.values = dict(saved["memory"])
        same = ("step", "samples", "updates", "seconds", "validation_start", "validation_end", "validated")
        self.state = RunState(**{name: saved[name] for name in same}, memory=memory, window=Window(saved["window"]),
                              learning_rate=self.rate(saved["step"] - 1))
        if saved["config"] == self.config:  # who resumes with other options wants to go on
            self.state.stopped = saved["stopped"]
        self.saved_step = saved["step"]
        self.initial_loss = saved.get("initial_loss")  # see checkpoint.NEWER_KEYS
        self.recent.reports.extend(saved.get("recent", ()))

    # small helpers

    def _export_averaged(self, folder: Path) -> None:
        with nullcontext() if self.sharded else self._averaged():  # cut ones were gathered so
            self._export(folder)

    def _export(self, folder: Path) -> None:
        """The bank's own files, with the plain module in its place."""
        wrapped = self.bank.denoiser.module
        self.bank.denoiser.module = self.accelerator.unwrap_model(wrapped)
        facts = {"step": str(self.state.step), "samples": str(self.state.samples), **self.identity, **self.metadata}
        try:
            self.bank.save(folder, facts)
        finally:
            self.bank.denoiser.module = wrapped

    @contextmanager
    def _averaged(self):
        """The averaged weights inside, where there is an average."""
        if self.average is None:
            yield
            return
        with self.average.swapped_in():
            self._forget()
            yield
        self._forget()

    def _forget(self) -> None:
        if self.sharded:
            sharding.forget_gathered(self.bank.denoiser.module)

    def _size(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.params.values())

    def _measure(self) -> dict[str, float]:
        return {"update_norm": self.start.distance(self.params)}
