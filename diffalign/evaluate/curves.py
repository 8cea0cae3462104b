"""Training curves as small inline SVG drawings that follow the page's light or dark colours."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 180, 46, 14, 10, 26
POINTS = 300  # more are averaged in blocks: the picture has no room for them


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing. lines: (label, names the value may have in metrics.jsonl). level: a dashed line to compare with."""

    title: str
    note: str
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    level: float | None = None


PANELS = (
    Panel(title="Loss", note="a flat loss is normal: read the held-out accuracy", lines=(("loss", ("loss",)),)),
    Panel(title="Preference accuracy", note="share of pairs ordered right; 0.5 is chance", level=0.5,
          lines=(("training pairs", ("accuracy",)),
                 ("held-out pairs", ("validation_accuracy", "heldout_accuracy")))),
    Panel(title="Margin", note="winner's minus loser's log-ratio, nats per latent element (text: per answer)", level=0.0,
          lines=(("margin", ("margin",)), ("held-out", ("validation_margin", "heldout_margin")))),
    Panel(title="Error change", note="against the reference, below 0 is better denoised; both rising: losers are ruined",
          level=0.0, lines=(("winner", ("win_error_change",)), ("loser", ("lose_error_change",)))),
    Panel(title="Gradient norm", note="before clipping", lines=(("gradient norm", ("grad_norm",)),)),
    Panel(title="Size of the update", note="norm of the trained weights' change", lines=(
        ("update", ("update_norm",)),)),
)


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl that are JSON objects with a step; a half-written last line is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(_flat(row))
    return rows


def drawings(rows: list[dict]) -> list[dict]:
    """[{title, note, svg, legend}] for the panels that have something to show."""
    found = []
    for panel in PANELS:
        series = [(label, *_series(rows, names)) for label, names in panel.lines]
        series = [item for item in series if len(item[1]) > 1]
        if series:
            found.append({"title": panel.title, "note": panel.note, "svg": draw(panel.title, series, panel.level),
                          "legend": [label for label, _, _ in series] if len(series) > 1 else []})
    return found


def draw(title: str, series: list[tuple[str, np.ndarray, np.ndarray]], level: float | None = None) -> Markup:
    """series: (label, steps [n], values [n]) -> an <svg> with axes; the classes line0, line1 give the colours."""
    steps = np.concatenate([x for _, x, _ in series])
    values = np.concatenate([y for _, _, y in series] + ([] if level is None else [np.asarray([level])]))
    (x0, x1), (y0, y1) = _span(steps, 0.0), _span(values, 0.06)

    def at(x, y):
        return (LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over training steps">']
    for tick in _ticks(y0, y1, 4):
        _, y = at(x0, tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in _ticks(x0, x1, 5):
        x, _ = at(tick, y0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_label(tick)}</text>')
    if level is not None:
        _, y = at(x0, level)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for i, (label, xs, ys) in enumerate(series):
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline class="line{i}" points="{points}"><title>{escape(label)}</title></polyline>')
    return Markup("".join([*parts, "</svg>"]))


def _flat(row: dict) -> dict:
    """Names without a tracker's prefix: "train/loss" -> "loss", "validation/accuracy" -> "validation_accuracy"."""
    return {key.removeprefix("train/").replace("/", "_"): value for key, value in row.items()}


def _series(rows: list[dict], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the first name found in a row, finite values only, at most POINTS of them."""
    pairs = [(row["step"], row[name]) for row in rows for name in [next((n for n in names if n in row), None)]
             if name and isinstance(row[name], (int, float)) and math.isfinite(row[name])]
    x, y = (np.asarray(column, np.float64) for column in zip(*pairs, strict=True)) if pairs else (np.empty(0),) * 2
    if len(x) <= POINTS:
        return x, y
    blocks = np.array_split(np.arange(len(x)), POINTS)
    return np.asarray([x[b].mean() for b in blocks]), np.asarray([y[b].mean() for b in blocks])


def _span(values: np.ndarray, room: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12:
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    return low - room * (high - low), high + room * (high - low)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [round(n * step, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _label(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
