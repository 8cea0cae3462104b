"""What happens after each step besides training: log lines, the progress bar, the saturation warning."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import ResourceError
from .state import Report, RunState, Window, means

RECENT = 50  # steps that the progress bar averages over


class Hook(Protocol):
    """Called on every rank after each step, in one place. report: this step's sums and counts over all processes."""

    def after_step(self, state: RunState, report: Report) -> None: ...


class Recent:
    """Means over the last RECENT steps, every pair weighing alike."""

    def __init__(self, steps: int = RECENT):
        self.reports = deque(maxlen=steps)

    def add(self, report: Report) -> dict[str, float]:
        self.reports.append(report)
        return self.means()

    def means(self) -> dict[str, float]:
        window = Window()
        for report in self.reports:
            window.add(report)
        return window.means()


class Log:
    """metrics.jsonl, and accelerate's trackers. A line holds the means since the line before.

    The file is a function of the recipe alone: wall-clock figures go to timing.jsonl and to the trackers. writes: True on
    one rank. measure(): figures taken at this moment, such as the size of the update.
    """

    def __init__(self, folder: Path, every: int, *, writes: bool, measure: Callable[[], dict[str, float]] = dict,
                 tracker: Callable[[dict, int], None] | None = None):
        self.folder, self.every, self.writes, self.measure, self.tracker = folder, max(1, every), writes, measure, tracker
        self.clock = (time.monotonic(), None)

    def after_step(self, state: RunState, report: Report) -> None:
        state.window.add(report)
        if state.step % self.every == 0:
            self.line(state)
            state.window.clear()

    def line(self, state: RunState, partial: bool = False) -> None:
        """partial: the last line of a run that ends between two log steps; a longer run drops it again."""
        values = {"samples": state.samples, "learning_rate": state.learning_rate, **state.window.means(), **self.measure()}
        self.write(state.step, values, partial)
        self._timing(state)

    def write(self, step: int, values: dict[str, float], partial: bool = False) -> None:
        if not self.writes:
            return
        _append(self.folder / "metrics.jsonl", {"step": step, **values, **({"partial": True} if partial else {})})
        if self.tracker is not None:
            self.tracker(values, step)

    def _timing(self, state: RunState) -> None:
        now, (then, samples) = time.monotonic(), self.clock
        self.clock = (now, state.samples)
        if self.writes and samples is not None and now > then:
            speed = {"pairs_per_second": (state.samples - samples) / (now - then), "seconds": state.seconds}
            _append(self.folder / "timing.jsonl", {"step": state.step, **speed})
            if self.tracker is not None:
                self.tracker(speed, state.step)


def _append(path: Path, line: dict) -> None:
    with _disk(path), open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _disk(path: Path):
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}. Make space, then run the same command again: "
                            "it goes on from the last checkpoint") from error


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines beyond a restored step, partial ones and a torn last one, so that the run goes on without duplicates."""
    if not path.exists():
        return
    aside = path.with_name(f".{path.name}.tmp")
    with _disk(path):
        kept = [text for text in path.read_text(errors="replace").splitlines() if _belongs(text, step)]
        aside.write_text("".join(f"{text}\n" for text in kept))
        os.replace(aside, path)


def _belongs(text: str, step: int) -> bool:
    try:
        line = json.loads(text)
        return line["step"] <= step and not line.get("partial", False)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


class Progress:
    """A bar with running means over the last steps on a terminal; elsewhere a plain line every ``every`` steps."""

    SHOWN = {"loss": "loss", "accuracy": "acc", "logit": "logit", "grad_norm": "grad"}  # logit = beta * margin

    def __init__(self, total: int, every: int, *, initial: int = 0, visible: bool = True, stream=None):
        self.stream = stream or sys.stderr
        self.total, self.every, self.visible = total, max(1, every), visible
        self.recent, self.times = Recent(), deque(maxlen=RECENT)
        self.bar = self._bar(initial) if visible and self.stream.isatty() else None

    def _bar(self, initial: int):
        from tqdm import tqdm
        return tqdm(total=self.total, initial=initial, desc="train", unit="step", file=self.stream, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """One line of text that does not tear the bar."""
        if self.visible:
            self.bar.write(text, file=self.stream) if self.bar else print(text, file=self.stream, flush=True)

    def after_step(self, state: RunState, report: Report) -> None:
        if not self.visible:
            return
        self.recent.add(report)
        self.times.append((time.monotonic(), state.samples))
        if self.bar is not None:
            self.bar.set_postfix_str(self.figures(), refresh=False)
            self.bar.update(1)
        elif state.step % self.every == 0 or state.step == self.total:
            self.say(f"step {state.step}/{self.total}  {self.figures()}")

    def figures(self) -> str:
        values = self.recent.means()
        shown = [f"{label} {values[name]:.3g}" for name, label in self.SHOWN.items() if name in values]
        (then, before), (now, samples) = self.times[0], self.times[-1]
        return "  ".join([*shown, *([f"{(samples - before) / (now - then):.3g} pairs/s"] if now > then else [])])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Saturation:
    """Warns once when most pairs' logits are so large that their gradient has vanished: ``beta`` is too high, or the
    pairs are learnt. Reads the metric ``saturated`` (share of |logit| above 5)."""

    LIMIT = 0.6

    def __init__(self, say: Callable[[str], None], steps: int = RECENT):
        self.say, self.recent, self.warned, self.needed = say, Recent(steps), False, steps

    def after_step(self, state: RunState, report: Report) -> None:
        if self.warned or "saturated" not in report:
            return
        share = self.recent.add({"saturated": report["saturated"]}).get("saturated", 0.0)
        if len(self.recent.reports) == self.needed and share > self.LIMIT:
            self.warned = True
            self.say(f"warning: step {state.step}: {share:.0%} of the pairs of the last {self.needed} steps are saturated "
                     "(|logit| above 5), so they hardly teach any more. Lower objective.beta, stop earlier, or add data")


__all__ = ["Hook", "Log", "Progress", "Recent", "Saturation", "means", "truncate_log"]
