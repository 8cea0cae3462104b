"""Pictures of the current weights while a run trains: drawn, scored, compared with the base's, written into ``monitor/``."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import rng
from ..config import Recipe, as_tree
from ..data.prompts import read_prompts
from ..errors import ConfigError, DataError, ResourceError
from ..evaluate.files import clean, write, write_json
from ..evaluate.monitor import MonitorSpec, Seen, see, why_stop
from ..evaluate.shards import exchange, packed, unpacked
from ..evaluate.sides import Side, draw_and_keep, picture_seeds
from ..evaluate.spec import EvaluateSpec
from ..models.load import encoder_facts, load_encoders, model_identity
from ..models.weights import CURRENT, ORIGIN, WeightBank
from ..rewards.base import as_pil
from ..sampling.grid import grid, save_grid, shown
from ..train import Finding
from ..types import Cond
from ..world import on_first, world_of
from . import parts

FOLDER, BASE = "monitor", "base.npz"


class Monitor:
    """What the loop calls every ``every`` steps, on all ranks. Each draws and scores its share of the prompts; rank 0 decides
    and writes: monitor/step-N.png, monitor/step-N.json, and monitor/base.npz, the base's figures, for a run that is resumed.

    Draws are keyed by the run's seed, and nothing is read from or left in the loop's own state. How often the judge has not
    risen is counted in metrics.jsonl.
    """

    def __init__(self, recipe: Recipe, accelerator):
        self.recipe, self.spec, self.accelerator = recipe, parts.monitor_spec(recipe), accelerator
        self.every, self.world, self.folder = self.spec.every, world_of(accelerator), Path(recipe.output_dir) / FOLDER
        self.training = parts.monitored_rewards(recipe)
        texts = list(dict.fromkeys(read_prompts(self.spec.prompts).texts))
        chosen = np.sort(rng.permutation(len(texts), recipe.seed, "monitor")[: self.spec.max_prompts])
        self.prompts = [texts[i] for i in chosen]
        self.how = EvaluateSpec(prompts=self.spec.prompts, seeds=self.spec.seeds, seed=recipe.seed,
                                batch_size=self.spec.batch_size)
        self.shown = [(row, 0) for row in range(min(self.spec.grid_prompts, len(self.prompts)))]
        self.base: Drawn | None = None
        self.brush = None

    def __call__(self, bank: WeightBank, step: int) -> Finding:
        """Raises ConfigError where a resumed run's base can't be had any more."""
        if self.base is None:
            self.base = self._base(bank, step)
        now = self.base if step == 0 else self._drawn(bank, CURRENT)
        text = on_first(self.world, lambda: json.dumps(dataclasses.asdict(self._decide(now, step))))
        return Finding(**json.loads(text))

    # --- rank 0 ---

    def _decide(self, now: Drawn, step: int) -> Finding:
        seen = see(self.base.side, now.side, self.spec, self.training, seed=self.recipe.seed)
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

    def _write(self, now: Drawn, seen: Seen, step: int) -> None:
        write_json(self.folder / f"step-{step}.json", clean({
            "step": step, "alarm": dataclasses.asdict(seen.alarm), "sentence": seen.alarm.sentence,
            "wins": None if seen.wins is None else dataclasses.asdict(seen.wins), "prompts": self.prompts}))
        rows = [row for row, _ in self.shown]
        columns = {"base": self.base, f"step {step}": now}
        scores = None
        if self.spec.judge is not None:
            scores = {label: [float(drawn.side.scores[row, 0]) for row in rows] for label, drawn in columns.items()}
        image = grid({label: drawn.pictures for label, drawn in columns.items()}, [self.prompts[row] for row in rows],
                     scores=scores, note=_said(seen, step))
        target = io.BytesIO()
        save_grid(image, target, clean({"step": step, "prompts": [self.prompts[i] for i in rows]}))
        write(self.folder / f"step-{step}.png", target.getvalue())

    # --- drawing ---

    def _base(self, bank: WeightBank, step: int) -> Drawn:
        """From monitor/base.npz where it is this monitor's; else drawn, if the base is still in memory."""
        if found := exchange(self.world, self._stored):
            return Drawn.of(found)
        if step and ORIGIN not in bank.names:
            raise ConfigError(f"monitor: {self.folder / BASE} is missing or of other options, and step {step} is too late to "
                              "draw the base; train in another output_dir, or set monitor=null with "
                              "train.allow_change=[monitor]")
        drawn = self._drawn(bank, ORIGIN if step else CURRENT)
        trained = zip((reward for reward, _ in self.training), drawn.side.rewards.values(), strict=True)
        for option, reward, scores in (("judge", self.spec.judge, drawn.side.scores), *(("reward", *one) for one in trained)):
            if reward is not None and np.isnan(scores).all():
                raise ConfigError(f'monitor.{option}: reward "{reward.name}" could score none of {scores.size} pictures of '
                                  "the base; choose one that understands these prompts")
        on_first(self.world, lambda: write(self.folder / BASE, packed({**drawn.arrays(), "key": np.asarray(self._key())})))
        return drawn

    def _stored(self) -> dict[str, np.ndarray]:
        """Of rank 0; nothing where there is no base of this monitor."""
        try:
            found = unpacked((self.folder / BASE).read_bytes()) if self.world.rank == 0 else {}
        except (OSError, DataError):
            return {}
        return found if str(found.get("key")) == self._key() else {}

    def _key(self) -> str:
        """Hash of all that the base's figures depend on."""
        tree = {name: as_tree(getattr(self.spec, name)) for name in ("seeds", "judge", "sampler", "grid_prompts")}
        facts = {"options": tree, "rewards": [as_tree(reward) for reward, _ in self.training], "prompts": self.prompts,
                 "seed": self.recipe.seed, "size": self._pixels(), "model": model_identity(self.recipe.model)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def _pixels(self) -> int:
        return self.recipe.data.resolution or encoder_facts(self.recipe.model).default_resolution

    def _drawn(self, bank: WeightBank, name: str) -> Drawn:
        """Every rank draws its share; all have all."""
        side, kept = draw_and_keep(lambda prompts, seeds: self._draw(bank, name, prompts, seeds), self.prompts,
                                   self.spec.judge, self.how, keep=self.shown, world=self.world,
                                   rewards={str(i): reward for i, (reward, _) in enumerate(self.training)})
        return Drawn(side=side, pictures=[shown(kept[place]) for place in self.shown])

    def _draw(self, bank: WeightBank, name: str, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        try:
            if self.brush is None:
                self.brush = _Brush(self.recipe, self.spec, self._pixels(), self.prompts, self.accelerator.device)
            return self.brush(parts.context(self.recipe, bank, self.accelerator), name, prompts, seeds)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ResourceError(f"out of memory while the monitor drew {len(prompts)} pictures at once: lower "
                                "monitor.batch_size; it needs the VAE in memory beside the training run") from error


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A model's figures, and the pictures that the grid shows, as it shows them."""

    side: Side
    pictures: list[Image.Image]

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``of`` takes back."""
        return {**self.side.arrays(), **{f"picture {n}": np.asarray(image) for n, image in enumerate(self.pictures)}}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> Drawn:
        count = sum(name.startswith("picture ") for name in arrays)
        return cls(side=Side.of(arrays), pictures=[Image.fromarray(arrays[f"picture {n}"]) for n in range(count)])


class _Brush:
    """Draws the monitor's prompts from any weight set; holds their embeddings and the VAE."""

    def __init__(self, recipe: Recipe, spec: MonitorSpec, pixels: int, prompts: list[str], device):
        self.spec, self.seed, self.device = spec, rng.integer(recipe.seed, "monitor"), device
        self.encoders = load_encoders(recipe.model, device)
        factor = self.encoders.spatial_factor
        self.shape = (self.encoders.latent_channels, pixels // factor, pixels // factor)
        sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).float()
        self.extra = {"time_ids": sizes} if self.encoders.family == "sdxl" else {}
        self.texts, self.empty = self.encoders.encode_prompts(prompts), self.encoders.unconditional()
        self.rows = {prompt: row for row, prompt in enumerate(prompts)}
        self.numbers = {seed: s for seeds in picture_seeds(prompts, spec.seeds, recipe.seed).tolist()
                        for s, seed in enumerate(seeds)}
        for encoder in [part for part in self.encoders.pipe.components if part.startswith("text_encoder")]:
            setattr(self.encoders.pipe, encoder, None)  # only the VAE is needed from here on

    def __call__(self, ctx, name: str, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        rows = [self.rows[prompt] for prompt in prompts]
        keys = torch.tensor([[row, self.numbers[seed]] for row, seed in zip(rows, seeds)], dtype=torch.int64)
        cond = self._cond(*(None if x is None else x[rows] for x in self.texts), len(rows))
        empty = None
        if self.spec.sampler.guidance_scale != 1:
            empty = self._cond(*(None if x is None else x.expand(len(rows), *x.shape[1:]) for x in self.empty), len(rows))
        x0, _ = self.spec.sampler(dataclasses.replace(ctx, seed=self.seed), name, cond, keys, self.shape, empty)
        return [as_pil(image) for image in (self.encoders.decode(x0).cpu() + 1) / 2]

    def _cond(self, tokens, pooled, count: int) -> Cond:
        extra = {name: x.repeat(count, 1) for name, x in self.extra.items()}
        return Cond(tokens=tokens, pooled=pooled, extra=extra).to(self.device)


def _said(seen: Seen, step: int) -> str:
    """One line for people."""
    judge = "" if seen.wins is None else (f"judge {seen.wins.base_score:.3g} -> {seen.wins.aligned_score:.3g}, win rate "
                                          f"{seen.wins.win_rate:.2f} [{seen.wins.win_rate_low:.2f}, "
                                          f"{seen.wins.win_rate_high:.2f}]; ")
    return f"monitor at step {step}: {judge}{seen.alarm.sentence if step else 'the base was drawn'}"
