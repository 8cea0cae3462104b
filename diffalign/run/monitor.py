"""Pictures of the current weights while a run trains: drawn, scored, compared with the base's, written into ``monitor/``."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import rng
from ..config import Recipe, as_tree
from ..data.prompts import read_prompts
from ..errors import ConfigError, ResourceError
from ..evaluate.files import clean, write, write_json
from ..evaluate.looks import looks, spread
from ..evaluate.monitor import MonitorSpec, Seen, Side, see, why_stop
from ..models.load import encoder_facts, load_encoders, model_identity
from ..models.weights import CURRENT, ORIGIN, WeightBank
from ..rewards import Reward, judged
from ..rewards.base import as_pil
from ..sampling.grid import grid, save_grid, shown
from ..train import Finding
from ..types import Cond
from ..world import on_first, together, world_of
from . import parts

FOLDER, BASE = "monitor", "base.json"


class Monitor:
    """What the loop calls every ``every`` steps, on all ranks. Each draws and scores its share of the prompts; rank 0 decides
    and writes: monitor/step-N.png, monitor/step-N.json, and monitor/base.json, the base's figures, for a run that is resumed.

    Draws are keyed by the run's seed, and nothing is read from or left in the loop's own state. How often the judge has not
    risen is counted in metrics.jsonl.
    """

    def __init__(self, recipe: Recipe, accelerator):
        self.recipe, self.spec, self.accelerator = recipe, parts.monitor_spec(recipe), accelerator
        self.every, self.world, self.folder = self.spec.every, world_of(accelerator), Path(recipe.output_dir) / FOLDER
        texts = list(dict.fromkeys(read_prompts(self.spec.prompts).texts))
        chosen = np.sort(rng.permutation(len(texts), recipe.seed, "monitor")[: self.spec.max_prompts])
        self.prompts = [texts[i] for i in chosen]
        self.rows = np.array_split(np.arange(len(self.prompts)), self.world.size)[self.world.rank]
        self.base: Side | None = None
        self.brush = None

    def __call__(self, bank: WeightBank, step: int) -> Finding:
        """Raises ConfigError where a resumed run's base can't be had any more."""
        if self.base is None:
            self.base = self._base(bank, step)
        now = self.base if step == 0 else self._drawn(bank, CURRENT)
        text = on_first(self.world, lambda: json.dumps(dataclasses.asdict(self._decide(now, step))))
        return Finding(**json.loads(text))

    # --- rank 0 ---

    def _decide(self, now: Side, step: int) -> Finding:
        seen = see(self.base, now, self.spec, seed=self.recipe.seed)
        history = [*self._history(step), *([(step, seen.figures["judge"])] if "judge" in seen.figures else [])]
        if step:
            self._write(now, seen, step)
        return Finding(figures=seen.figures, said=_said(seen, step), stop=why_stop(seen, self.spec, history))

    def _history(self, step: int) -> list[tuple[int, float]]:
        """The judge's mean at the checks before this one: a resumed run has dropped the lines beyond its checkpoint."""
        try:
            lines = (Path(self.recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        found = [json.loads(line) for line in lines]
        return [(line["step"], line["monitor/judge"]) for line in found if "monitor/judge" in line and line["step"] < step]

    def _write(self, now: Side, seen: Seen, step: int) -> None:
        write_json(self.folder / f"step-{step}.json", clean({
            "step": step, "alarm": dataclasses.asdict(seen.alarm), "sentence": seen.alarm.sentence,
            "wins": None if seen.wins is None else dataclasses.asdict(seen.wins), "prompts": self.prompts}))
        rows = range(min(self.spec.grid_prompts, len(self.prompts)))
        columns = {"base": self.base, f"step {step}": now}
        scores = None
        if self.spec.judge is not None:
            scores = {label: [float(side.judge[i, 0]) for i in rows] for label, side in columns.items()}
        image = grid({label: [_picture(side.shown[i]) for i in rows] for label, side in columns.items()},
                     [self.prompts[i] for i in rows], scores=scores, note=_said(seen, step))
        target = io.BytesIO()
        save_grid(image, target, clean({"step": step, "prompts": [self.prompts[i] for i in rows]}))
        write(self.folder / f"step-{step}.png", target.getvalue())

    # --- drawing ---

    def _base(self, bank: WeightBank, step: int) -> Side:
        """From monitor/base.json where it is this monitor's; else drawn, if the base is still in memory."""
        found = on_first(self.world, self._stored)
        if found:
            return Side.read(found)
        if step and ORIGIN not in bank.names:
            raise ConfigError(f"monitor: {self.folder / BASE} is missing or of other options, and step {step} is too late to "
                              "draw the base; train in another output_dir, or set monitor=null with "
                              "train.allow_change=[monitor]")
        side = self._drawn(bank, ORIGIN if step else CURRENT)
        for option in ("judge", "reward"):
            scores = getattr(side, option)
            if scores is not None and np.isnan(scores).all():
                raise ConfigError(f'monitor.{option}: reward "{getattr(self.spec, option).name}" could score none of '
                                  f"{scores.size} pictures of the base; choose one that understands these prompts")
        on_first(self.world, lambda: write(self.folder / BASE, f"{self._key()}\n{side.text()}".encode()))
        return side

    def _stored(self) -> str:
        try:
            key, text = (self.folder / BASE).read_text().split("\n", 1)
            Side.read(text)
        except (OSError, ValueError, LookupError, TypeError):
            return ""
        return text if key == self._key() else ""

    def _key(self) -> str:
        """Hash of all that the base's figures depend on."""
        names = ("seeds", "judge", "reward", "sampler", "grid_prompts")
        tree = {name: as_tree(getattr(self.spec, name)) for name in names}
        facts = {"options": tree, "prompts": self.prompts, "seed": self.recipe.seed, "size": self._pixels(),
                 "model": model_identity(self.recipe.model)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def _pixels(self) -> int:
        return self.recipe.data.resolution or encoder_facts(self.recipe.model).default_resolution

    def _drawn(self, bank: WeightBank, name: str) -> Side:
        """Every rank draws its rows; all have the figures of all."""
        return Side.merge([Side.read(text) for text in together(self.world, lambda: self._own(bank, name).text())])

    def _own(self, bank: WeightBank, name: str) -> Side:
        prompts = [self.prompts[i] for i in self.rows]
        try:
            if self.brush is None:
                self.brush = _Brush(self.recipe, self.spec, self._pixels(), prompts, self.rows, self.accelerator.device)
            pictures = self.brush(parts.context(self.recipe, bank, self.accelerator), name)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(f"out of memory while the monitor drew {self.spec.batch_size} pictures at once: lower "
                                "monitor.batch_size; it needs the VAE in memory beside the training run") from error
        return _measured(pictures, [prompt for prompt in prompts for _ in range(self.spec.seeds)], self.rows, self.spec)


class _Brush:
    """Draws one rank's prompts from any weight set; holds the prompts' embeddings and the VAE."""

    def __init__(self, recipe: Recipe, spec: MonitorSpec, pixels: int, prompts: list[str], rows: np.ndarray, device):
        self.spec, self.seed, self.device = spec, rng.integer(recipe.seed, "monitor"), device
        self.encoders = load_encoders(recipe.model, device)
        factor, count = self.encoders.spatial_factor, len(prompts) * spec.seeds
        self.shape = (self.encoders.latent_channels, pixels // factor, pixels // factor)
        sizes = {"time_ids": torch.tensor([pixels, pixels, 0, 0, pixels, pixels]).float().repeat(count, 1)}
        extra = sizes if self.encoders.family == "sdxl" else {}
        texts = [prompt for prompt in prompts for _ in range(spec.seeds)]
        self.cond = _cond(*(self.encoders.encode_prompts(texts) if texts else self.encoders.unconditional()), extra)
        self.empty = self.encoders.unconditional() if spec.sampler.guidance_scale != 1 else None
        self.keys = torch.tensor([[int(row), s] for row in rows for s in range(spec.seeds)], dtype=torch.int64).view(-1, 2)
        for encoder in [part for part in self.encoders.pipe.components if part.startswith("text_encoder")]:
            setattr(self.encoders.pipe, encoder, None)  # only the VAE is needed from here on

    def __call__(self, ctx, name: str) -> list[Image.Image]:
        ctx, pictures = dataclasses.replace(ctx, seed=self.seed), []
        for start in range(0, len(self.keys), self.spec.batch_size):
            part = slice(start, start + self.spec.batch_size)
            cond = _part(self.cond, part).to(self.device)
            empty = None
            if self.empty is not None:
                rows = len(self.keys[part])
                tokens, pooled = (None if x is None else x.expand(rows, *x.shape[1:]) for x in self.empty)
                empty = _cond(tokens, pooled, cond.extra).to(self.device)
            x0, _ = self.spec.sampler(ctx, name, cond, self.keys[part], self.shape, empty)
            pictures += [as_pil(image) for image in (self.encoders.decode(x0).cpu() + 1) / 2]
        return pictures


def _cond(tokens, pooled, extra) -> Cond:
    return Cond(tokens=tokens.cpu(), pooled=None if pooled is None else pooled.cpu(), extra=extra)


def _part(cond: Cond, part: slice) -> Cond:
    return Cond(tokens=cond.tokens[part], pooled=None if cond.pooled is None else cond.pooled[part],
                extra={name: x[part] for name, x in cond.extra.items()})


def _measured(pictures: list[Image.Image], texts: list[str], rows: np.ndarray, spec: MonitorSpec) -> Side:
    shape = (len(rows), spec.seeds)

    def scored(reward: Reward | None):
        if reward is None:
            return None
        return judged(reward, pictures, texts).double().numpy().reshape(shape) if texts else np.zeros(shape)

    kept = [_png(pictures[i * spec.seeds]) if row < spec.grid_prompts else "" for i, row in enumerate(rows)]
    table = looks(pictures)
    return Side(looks=table.reshape(len(table), *shape), spread=spread(pictures, spec.seeds), judge=scored(spec.judge),
                reward=scored(spec.reward), shown=tuple(kept))


def _png(image: Image.Image) -> str:
    """As the grid shows it."""
    target = io.BytesIO()
    shown(image).save(target, "PNG")
    return base64.b64encode(target.getvalue()).decode()


def _picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def _said(seen: Seen, step: int) -> str:
    """One line for people."""
    judge = "" if seen.wins is None else (f"judge {seen.wins.base_score:.3g} -> {seen.wins.aligned_score:.3g}, win rate "
                                          f"{seen.wins.win_rate:.2f} [{seen.wins.win_rate_low:.2f}, "
                                          f"{seen.wins.win_rate_high:.2f}]; ")
    return f"monitor at step {step}: {judge}{seen.alarm.sentence if step else 'the base was drawn'}"
