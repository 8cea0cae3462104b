"""The report: report.json for programs, one self-contained report.html for people, grids for everybody."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..sampling.grid import WEBP_LIMIT, grid, save_grid, score_text
from .card import loading
from .compare import Comparison, Tile, statistics_dict
from .curves import drawings, read_metrics
from .files import clean, write, write_json, write_text
from .sound import EXCERPT, player
from .statistics import Paired

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")
LOSSLESS, SHOWN = 256, 640  # up to 256 px a picture is embedded as PNG; larger ones as JPEG of at most 640 px


@dataclass(frozen=True, kw_only=True)
class Run:
    """The facts of a run that a report and a card tell.

    title: headline, such as "Diffusion-DPO, LoRA, on tiny-sdxl". method: its name, None where nothing was trained.
    base_model: hub id or folder. fuse_lora: file or folder of the LoRA fused into it. sampling: how pictures are drawn
    (``compare.said``). data: hub id or file. rank: of the LoRA, None for a full fine-tune. pairs: distinct training pairs.
    steps: optimizer steps. seconds: of training alone, and of everything. heldout: ``preference.before_and_after(...)``.
    metrics: metrics.jsonl. config: the resolved recipe. command: how to run it again; evaluate_command: the evaluation alone.
    files: written weights, by name. subject: what the model makes.
    """

    title: str
    base_model: str
    method: str | None = None
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
    evaluate_command: str | None = None
    files: tuple[str, ...] = ()
    subject: str = "pictures"


def write_report(folder: Path | str, run: Run, comparison: Comparison | None) -> dict[str, Any]:
    """Writes report.json, report.html and the grids into ``folder``, each atomically; returns what report.json holds."""
    folder = Path(folder)
    report = build(run, comparison)
    if comparison is not None and comparison.tiles:
        write_grids(folder, run.title, comparison)
    write_text(folder / "report.html", page(report, run, comparison))
    write_json(folder / "report.json", report)
    return report


def build(run: Run, comparison: Comparison | None) -> dict[str, Any]:
    """What report.json holds; all numbers finite or null.

    ``alarm``: what the comparison's alarm says of the main model, null where none was asked: fired (true, false or null),
    verdict (the same as "alarm", "no alarm" or "not enough prompts"), reasons and notes (sentences), statistics (rows of name,
    base, aligned, band_low, band_high, left: the band is the base's).
    """
    result = comparison.statistics if comparison is not None else None
    names = ("base_score", "aligned_score", "win_rate", "win_rate_low", "win_rate_high")
    heldout = run.heldout or {"before": None, "after": None}
    facts = {
        "verdict": comparison.verdict(comparison.main) if result else None, "sentence": sentence(run, comparison),
        **{name: getattr(result, name) if result else None for name in names},
        "alarm": _alarm(comparison, comparison.main) if comparison is not None else None,
        "models": _models(comparison), "rewards": _rewards(comparison), "strengths": _strengths(comparison),
        "holm": comparison.corrected if comparison is not None else {},
        "judge": comparison.judge if comparison is not None else None,
        "held_out": comparison.held_out if comparison is not None else None,
        "training_rewards": comparison.training if comparison is not None else None,
        "heldout_preference_accuracy": heldout,
        "pairs": run.pairs, "steps": run.steps, "train_seconds": run.train_seconds, "total_seconds": run.total_seconds,
        "seed": run.seed, "beta": run.beta, "title": run.title, "method": run.method, "base_model": run.base_model,
        "fuse_lora": run.fuse_lora, "data": run.data, "rank": run.rank, "files": list(run.files), "command": run.command,
        "evaluate_command": run.evaluate_command, "versions": versions(), "machine": machine(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "identity": comparison.identity if comparison is not None else None,
        "comparison": _comparison(comparison), "config": run.config}
    return clean(facts)


def sentence(run: Run, comparison: Comparison | None) -> str:
    """The one sentence on top."""
    if comparison is not None and comparison.sentence is not None:
        return comparison.sentence
    if run.heldout and run.heldout.get("after") is not None:
        return f"Held-out preference accuracy is {100 * run.heldout['after']:.1f}%. No judge has compared {run.subject}."
    return f"No judge has compared {run.subject}, so nothing is shown about quality: look at the {run.subject}."


def write_grids(folder: Path | str, title: str, comparison: Comparison, page: bool = False) -> dict[str, Path]:
    """grid.png and grid.webp (both lossless; WebP where it fits its 16,383 pixels): the randomly drawn rows, a column a model.
    strengths.png and strengths.webp: the same for a sweep. page: grid.html as well. Returns what was written, by file name.
    """
    folder, written = Path(folder), {}
    names = [comparison.base, *comparison.models]
    images = {"grid": _picture_grid(comparison, {name: name for name in names}, title, _note(comparison))}
    if comparison.strengths:
        images["strengths"] = _picture_grid(comparison, _strength_labels(comparison), f"{title}: strength of the LoRA",
                                            _sweep_sentence(comparison))
    tiles = comparison.tiles
    facts = clean({"prompts": [t.prompt for t in tiles], "seeds": [t.seed for t in tiles], "title": title,
                   "judge": comparison.judge, "sampling": comparison.sampling, "identity": comparison.identity})
    for name, image in images.items():
        for kind in ("png", "webp") if max(image.size) <= WEBP_LIMIT else ("png",):
            target, path = io.BytesIO(), folder / f"{name}.{kind}"
            save_grid(image, target, facts, kind)
            write(path, target.getvalue())
            written[path.name] = path
    if page:
        write_text(folder / "grid.html", grid_page(title, comparison))
        written["grid.html"] = folder / "grid.html"
    return written


def write_gallery(folder: Path | str, comparison: Comparison) -> Path:
    """The drawn rows as single pictures, PNG, and gallery.jsonl (prompt, model, image, seed), which ``diffalign arena`` reads.

    Returns the table, written last and whole. Raises ResourceError naming the file.
    """
    folder, lines = Path(folder), []
    for tile in comparison.tiles:
        for number, (name, picture) in enumerate(tile.pictures.items()):
            target, place = io.BytesIO(), f"pictures/{tile.index}-{tile.seed}-{number}.png"
            picture.save(target, "PNG")
            write(folder / place, target.getvalue())
            lines.append(json.dumps({"prompt": tile.prompt, "model": name, "image": place, "seed": tile.seed},
                                    ensure_ascii=False))
    write(folder / "gallery.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return folder / "gallery.jsonl"


def _strength_labels(comparison: Comparison) -> dict[str, str]:
    """Side -> its strength, in words."""
    best = comparison.sweep.best if comparison.sweep else None
    return {name: f"{strength:g}" + (" (base)" if name == comparison.base else "") + (", best" if name == best else "")
            for name, strength in comparison.strengths.items()}


def _picture_grid(comparison: Comparison, labels: dict[str, str], title: str, note: str | None) -> Image.Image:
    """labels: sides that get a column, with what stands above it."""
    tiles = comparison.tiles
    scores = None if comparison.judge is None else {
        label: [tile.scores[name] for tile in tiles] for name, label in labels.items()}
    means = None if comparison.judge is None else {
        label: f"mean {_score(_mean(comparison.sides[name].scores))}" for name, label in labels.items()}
    return grid({label: [tile.pictures[name] for tile in tiles] for name, label in labels.items()},
                [tile.prompt for tile in tiles], scores=scores, title=title, note=note, heads=means,
                details=[f"seed {tile.seed}" for tile in tiles])


def page(report: dict, run: Run, comparison: Comparison | None) -> str:
    """The HTML page, complete in itself: no network, no fonts, no libraries."""
    return render(
        "report.html.j2", report=report, run=run, comparison=comparison,
        curves=drawings(read_metrics(run.metrics)) if run.metrics else [],
        config=yaml.safe_dump(report["config"], sort_keys=False, allow_unicode=True) if report["config"] else "",
        identity=yaml.safe_dump(report["identity"], sort_keys=False, allow_unicode=True) if report["identity"] else "",
        note=_note(comparison) if comparison else "",
        how=_how(comparison) if comparison else "", loading=loading(run) if run.method else None,
        strength_labels=_strength_labels(comparison) if comparison else {})


def grid_page(title: str, comparison: Comparison) -> str:
    """The grid as a page of the same kind: enlarge, swap, walk through prompts and models by keys."""
    return render("grid.html.j2", title=title, comparison=comparison, note=_note(comparison),
                   strengths=clean(_strengths(comparison)), strength_labels=_strength_labels(comparison))


@cache
def _templates() -> Environment:
    """Once a process: to compile them takes longer than to fill them in."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "score": _score, "duration": _duration, "picture": _data_uri,
                            "player": player, "count": lambda n: "not known" if n is None else f"{n:,}",
                            "p_value": _p_value,
                            "signed": lambda x: "not known" if x is None else f"{x:+.2f}"}
    return environment


def render(template: str, **values) -> str:
    environment = _templates()
    script = environment.get_template("report.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # the policy lets exactly this script run: a prompt that slipped through the escaping still could not
    return environment.get_template(template).render(**values, script=Markup(script), script_digest=digest)


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
    """The main model's figures and every score. per prompt: ``base``, ``aligned`` (the main model) and ``scores`` of all."""
    if comparison is None:
        return None
    result, sides = comparison.statistics, comparison.sides
    judged = comparison.judge is not None
    per_prompt = [
        {"prompt": prompt, "seeds": comparison.seeds[i], "base": sides[comparison.base].scores[i] if judged else None,
         "aligned": sides[comparison.main].scores[i] if judged else None,
         "scores": {name: side.scores[i] for name, side in sides.items()} if judged else None,
         "rewards": {reward: {name: side.rewards[reward][i] for name, side in sides.items()} for reward in comparison.rewards}}
        for i, prompt in enumerate(comparison.prompts)]
    return {"judge": comparison.judge, "sampling": comparison.sampling, "base": comparison.base, "main": comparison.main,
            "statistics": statistics_dict(result) if result else None,
            "categories": _categories(comparison, comparison.main),
            "prompts": per_prompt}


def _categories(comparison: Comparison, name: str) -> dict[str, dict]:
    """A model's statistics by category, without verdicts: of many small comparisons some would be wrong."""
    return {kind: {key: value for key, value in statistics_dict(part).items() if key not in ("verdict", "sentence")}
            for kind, part in comparison.categories.get(name, {}).items()}


def _models(comparison: Comparison | None) -> dict[str, dict]:
    """Every model beside the base: the judge's statistics (``verdict`` alone, ``verdict_corrected`` after Holm)."""
    if comparison is None:
        return {}
    base = comparison.sides[comparison.base]
    found = {}
    for name in comparison.models:
        result, side = comparison.results.get(name), comparison.sides[name]
        found[name] = {
            **(statistics_dict(result) if result else {}), "holm": comparison.corrected.get(name),
            "verdict_corrected": comparison.verdict(name),
            "survives": None if result is None else comparison.verdict(name) == result.verdict,
            "categories": _categories(comparison, name),
            "alarm": _alarm(comparison, name),
            "diversity": _ratio(_mean(side.spread), _mean(base.spread))}
    return found


def _alarm(comparison: Comparison, name: str) -> dict[str, Any]:
    found = comparison.alarms[name]
    return {**asdict(found), "verdict": found.verdict, "sentence": found.sentence}


def _rewards(comparison: Comparison | None) -> dict[str, dict]:
    """The judge, then the others: mean score of every side, statistics of every model, pictures that could not be scored."""
    if comparison is None or comparison.judge is None and not comparison.rewards:
        return {}
    sides = comparison.sides
    table: dict[str, dict] = {}
    if comparison.judge is not None:
        name = comparison.judge if comparison.judge not in comparison.rewards else f"{comparison.judge} (judge)"
        role = "judge, trained on" if comparison.held_out is False else "judge"
        table[name] = _reward({name: side.scores for name, side in sides.items()}, comparison.results, role)
    for reward, results in comparison.rewards.items():
        table[reward] = _reward({name: side.rewards[reward] for name, side in sides.items()}, results,
                                "trained on" if reward in comparison.trained else "reported")
    return table


def _reward(scores: dict[str, Any], results: dict[str, Paired], role: str) -> dict[str, Any]:
    return {"role": role, "means": {name: _mean(values) for name, values in scores.items()},
            "models": {name: statistics_dict(result) for name, result in results.items()},
            "failures": {name: int(np.isnan(values).sum()) for name, values in scores.items()}}


def _strengths(comparison: Comparison | None) -> dict | None:
    """The sweep: what each strength scores, and the best."""
    if comparison is None or comparison.sweep is None:
        return None
    found = comparison.sweep
    rows = [{"strength": strength, "side": name, "score": found.scores[name], "picked": found.picked[name],
             "statistics": statistics_dict(comparison.swept[name]) if name in comparison.swept else None}
            for name, strength in comparison.strengths.items()]
    return {"best": comparison.strengths[found.best], "sentence": _sweep_sentence(comparison), "strengths": rows}


def _sweep_sentence(comparison: Comparison) -> str | None:
    if comparison.sweep is None:
        return None
    found = comparison.sweep
    strength, result = comparison.strengths[found.best], comparison.swept.get(found.best)
    wins = "" if result is None or found.best == comparison.base else (
        f", wins {_percent(result.win_rate)} of prompts against the base, 95% interval {_percent(result.win_rate_low)} to "
        f"{_percent(result.win_rate_high)}")
    return (f"Best strength by the judge: {strength:g} (mean score {_score(found.scores[found.best])}{wins}). It was picked "
            "on these very prompts, so its figures are somewhat too good; when the prompts are resampled it comes out best in "
            f"{_percent(found.picked[found.best], 0)} of cases.")


def _mean(values: np.ndarray) -> float | None:
    """Over what is known."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _note(comparison: Comparison) -> str:
    sampling, shown, total = comparison.sampling, len({tile.index for tile in comparison.tiles}), len(comparison.prompts)
    which = "all prompts" if shown == total else f"{shown} of {total:,} prompts, drawn at random"
    scheduler = f" with {sampling['scheduler']}" if sampling.get("scheduler") else ""
    how = _how(comparison, scheduler)
    return (f"Same prompt and seed in a row. {which[0].upper()}{which[1:]}. {how[0].upper()}{how[1:]}."
            f"{_heard(comparison) if comparison.subject == 'clips' else ''}")


def _how(comparison: Comparison, scheduler: str = "") -> str:
    """How the samples were drawn."""
    sampling, clips = comparison.sampling, [clip for tile in comparison.tiles for clip in tile.clips.values()]
    parts = [f"clips of {clips[0].seconds:.4g} s"] if clips else []
    if sampling.get("num_inference_steps"):
        parts.append(f"{sampling['num_inference_steps']} steps{scheduler}, guidance {sampling['guidance_scale']:g}")
    if sampling.get("temperature") is not None:
        parts.append(f"temperature {sampling['temperature']:g}, no guidance")
    return ", ".join(parts)


def _heard(comparison: Comparison) -> str:
    """What a spectrogram shows, and what a player plays."""
    clips = [clip for tile in (*comparison.tiles, *comparison.best, *comparison.worst) for clip in tile.clips.values()]
    cut = f" Players hold the first {EXCERPT:g} s." if any(clip.seconds > EXCERPT for clip in clips) else ""
    rates = " and ".join(f"{rate:,}" for rate in sorted({clip.rate for clip in clips}))
    return (f" Spectrograms of clips at {rates} Hz: time to the right, frequency upwards from 0 to half of that, 60 dB from "
            f"yellow to black.{cut}")


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


def _p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not known"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Run", "Tile", "build", "grid_page", "page", "sentence", "versions", "write_grids", "write_report"]
