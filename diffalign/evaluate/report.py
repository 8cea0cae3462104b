"""The report: report.json for programs, one self-contained report.html for people, grid.png for everybody."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..sampling.grid import grid, save_grid, score_text
from .card import loading
from .compare import DRIFT, Comparison, Tile, statistics_dict
from .curves import drawings, read_metrics
from .files import clean, write, write_json

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
LOSSLESS, SHOWN = 256, 640  # up to 256 px a picture is embedded as PNG; larger ones as JPEG of at most 640 px


@dataclass(frozen=True, kw_only=True)
class Run:
    """The facts of a run that a report and a card tell.

    title: headline, such as "Diffusion-DPO, LoRA, on tiny-sdxl". method: its name. base_model: hub id or folder. fuse_lora:
    file or folder of the LoRA fused into it. sampling: how pictures are drawn (``compare.said``). data: hub id or file.
    rank: of the LoRA, None for a full fine-tune. pairs: distinct training pairs. steps: optimizer steps. seconds: of training
    alone, and of everything. heldout: ``preference.before_and_after(...)``. metrics: metrics.jsonl. config: the resolved
    recipe. command: how to run it again. files: written weights, by name.
    """

    title: str
    method: str
    base_model: str
    fuse_lora: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    rank: int | None = None
    beta: float | None = None
    seed: int = 0
    pairs: int | None = None
    steps: int | None = None
    train_seconds: float | None = None
    total_seconds: float | None = None
    heldout: dict | None = None
    metrics: Path | None = None
    config: dict = field(default_factory=dict)
    command: str | None = None
    files: tuple[str, ...] = ()


def write_report(folder: Path | str, run: Run, comparison: Comparison | None) -> dict[str, Any]:
    """Writes report.json, report.html and grid.png into ``folder``, each atomically; returns what report.json holds."""
    folder = Path(folder)
    report = build(run, comparison)
    if comparison is not None and comparison.tiles:
        write_grid(folder / "grid.png", run.title, comparison)
    write(folder / "report.html", page(report, run, comparison).encode())
    write_json(folder / "report.json", report)
    return report


def build(run: Run, comparison: Comparison | None) -> dict[str, Any]:
    """What report.json holds; all numbers finite or null."""
    result = comparison.statistics if comparison is not None else None
    names = ("base_score", "aligned_score", "win_rate", "win_rate_low", "win_rate_high")
    heldout = run.heldout or {"before": None, "after": None}
    facts = {
        "verdict": result.verdict if result else None, "sentence": sentence(run, comparison),
        **{name: getattr(result, name) if result else None for name in names},
        "heldout_preference_accuracy": heldout,
        "pairs": run.pairs, "steps": run.steps, "train_seconds": run.train_seconds, "total_seconds": run.total_seconds,
        "seed": run.seed, "beta": run.beta, "title": run.title, "method": run.method, "base_model": run.base_model,
        "fuse_lora": run.fuse_lora, "data": run.data, "rank": run.rank, "files": list(run.files), "command": run.command,
        "versions": versions(), "machine": machine(), "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "comparison": _comparison(comparison), "config": run.config}
    return clean(facts)


def sentence(run: Run, comparison: Comparison | None) -> str:
    """The one sentence on top."""
    if comparison is not None and comparison.statistics is not None:
        return comparison.statistics.sentence
    if run.heldout and run.heldout.get("after") is not None:
        return f"Held-out preference accuracy is {100 * run.heldout['after']:.1f}%. No judge has compared pictures."
    return "No judge has compared pictures, so nothing is shown about quality: look at the pictures."


def write_grid(path: Path | str, title: str, comparison: Comparison) -> None:
    """grid.png: the randomly drawn rows, base beside aligned, with their scores when there is a judge."""
    tiles = comparison.tiles
    scores = None if comparison.judge is None else {
        "base": [tile.base_score for tile in tiles], "aligned": [tile.aligned_score for tile in tiles]}
    image = grid({"base": [tile.base for tile in tiles], "aligned": [tile.aligned for tile in tiles]},
                 [tile.prompt for tile in tiles], scores=scores, title=title, note=_note(comparison))
    target = io.BytesIO()
    save_grid(image, target, clean({"prompts": [t.prompt for t in tiles], "seeds": [t.seed for t in tiles],
                                    "judge": comparison.judge, "sampling": comparison.sampling, "title": title}))
    write(Path(path), target.getvalue())


def page(report: dict, run: Run, comparison: Comparison | None) -> str:
    """The HTML page, complete in itself: no network, no fonts, no libraries."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "score": _score, "duration": _duration, "picture": _data_uri,
                            "count": lambda n: "not known" if n is None else f"{n:,}"}
    script = environment.get_template("report.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        report=report, run=run, comparison=comparison, curves=drawings(read_metrics(run.metrics)) if run.metrics else [],
        config=yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True) if report["config"] else "",
        note=_note(comparison) if comparison else "", loading=loading(run), drift_limit=DRIFT,
        # the policy lets exactly this script run: a prompt that slipped through the escaping still could not
        script=Markup(script), script_digest=digest)


def versions() -> dict[str, str]:
    """Of this package, Python and everything that can change a number."""
    found = {"diffalign": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Accelerator or processor, in words."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def _comparison(comparison: Comparison | None) -> dict | None:
    if comparison is None:
        return None
    result = comparison.statistics
    per_prompt = [
        {"prompt": prompt, "seeds": comparison.seeds[i],
         "base": None if comparison.base_scores is None else comparison.base_scores[i],
         "aligned": None if comparison.aligned_scores is None else comparison.aligned_scores[i]}
        for i, prompt in enumerate(comparison.prompts)]
    return {"judge": comparison.judge, "sampling": comparison.sampling,
            "statistics": statistics_dict(result) if result else None,
            "categories": {name: statistics_dict(part) for name, part in comparison.categories.items()},
            "drift": [asdict(item) for item in comparison.drift], "prompts": per_prompt}


def _note(comparison: Comparison) -> str:
    sampling, shown, total = comparison.sampling, len(comparison.tiles), len(comparison.prompts)
    which = "all prompts" if shown == total else f"{shown} of {total:,} prompts, drawn at random"
    scheduler = f" with {sampling['scheduler']}" if sampling.get("scheduler") else ""
    return (f"Same prompt and seed in a row. {which[0].upper()}{which[1:]}. {sampling['num_inference_steps']} steps"
            f"{scheduler}, guidance {sampling['guidance_scale']:g}.")


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    target = io.BytesIO()
    if max(image.size) <= LOSSLESS:
        image.save(target, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
        image.save(target, "JPEG", quality=90)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "not measured" if share is None else f"{100 * share:.{digits}f}%"


def _score(value: float | None) -> str:
    return "not scored" if value is None or value != value else score_text(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Run", "Tile", "build", "page", "sentence", "versions", "write_grid", "write_report"]
