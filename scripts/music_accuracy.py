"""Clips of a trained music model beside its base's, checked exactly, with their spectrograms and players in the report.

    python scripts/music_accuracy.py configs/music/tiny_dpo.yaml [key=value ...] [--prompts assets/music/heldout_prompts.txt]

Reads the newest checkpoint of the recipe's run. PROMPTS: captions of the embedded clips, one a line. Both models draw with the
same random numbers; the score is the share of a caption's three attributes that signal analysis hears (``rewards/clips.py``).
Writes music.json and spectrograms.png into output_dir, and report.html anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from diffalign.cli import _quiet_libraries
from diffalign.config import Recipe, load_recipe
from diffalign.data.prompts import read_prompts
from diffalign.errors import ConfigError, UserError
from diffalign.evaluate.files import write_json
from diffalign.evaluate.report import write_report
from diffalign.evaluate.sound import Sounds
from diffalign.evaluate.statistics import paired
from diffalign.methods import Context
from diffalign.models.musicgen import Inputs, load_denoiser, load_inputs
from diffalign.models.weights import WeightBank
from diffalign.rewards.clips import FRAME, SAMPLES, Clips
from diffalign.run.words import SUMMARY, run_of
from diffalign.sampling.music import CodeSampler
from diffalign.train.checkpoint import load, newest
from diffalign.types import Memory

MODELS = {"base": "origin", "trained": "current"}
SHOWN = 6  # prompts in the report
ROWS = 72  # clips that are drawn at once


def bank_of(recipe: Recipe) -> WeightBank:
    """The trained weights as "current", the base as "origin"."""
    output_dir = Path(recipe.output_dir)
    folder = newest(output_dir)[0] if output_dir.is_dir() else None
    if folder is None:
        raise ConfigError(f"{output_dir}: no finished training run here; run `diffalign train` first")
    bank = WeightBank.build(load_denoiser(recipe.model), recipe.model.lora, reads=("policy", "origin"), seed=recipe.seed)
    bank.load_state({name: x for name, x in load(folder).tensors["weights"].items() if name.startswith("policy/")})
    return bank


def drawn(bank: WeightBank, inputs: Inputs, name: str, prompts: list[str], each: int, seed: int) -> list[np.ndarray]:
    """Waveforms [each, samples] for every prompt."""
    ctx = Context(predict=bank.predict, process=bank.denoiser.process, param=None, seed=seed, step=0, memory=Memory())
    sampler, keys = CodeSampler(frames=SAMPLES // FRAME), torch.cartesian_prod(torch.arange(len(prompts)), torch.arange(each))
    codes = torch.cat([sampler(ctx, name, inputs.cond([prompts[i] for i in part[:, 0].tolist()]), part)
                       for part in keys.split(ROWS)])
    return [inputs.decode(part).numpy() for part in codes.split(each)]


def compared(recipe: Recipe, prompts: list[str], each: int) -> Sounds:
    bank, inputs, reward = bank_of(recipe), load_inputs(recipe.model), Clips()
    clips = {label: drawn(bank, inputs, name, prompts, each, recipe.seed) for label, name in MODELS.items()}
    scores = {label: np.stack([reward(waves, [prompt] * each).numpy() for prompt, waves in zip(prompts, found, strict=True)])
              for label, found in clips.items()}
    rows = range(0, len(prompts), max(1, len(prompts) // SHOWN))
    return Sounds(prompts=[prompts[i] for i in rows], rate=inputs.rate, reward=reward.name,
                  clips={label: [found[i][0] for i in rows] for label, found in clips.items()},
                  scores={label: [float(found[i, 0]) for i in rows] for label, found in scores.items()},
                  result=paired(scores["base"], scores["trained"], seed=recipe.seed))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", type=Path, default=Path("assets/music/heldout_prompts.txt"))
    parser.add_argument("--each", type=int, default=16, help="clips for each prompt and model")
    args = parser.parse_args(argv)
    try:
        _quiet_libraries()
        recipe = load_recipe(args.config, args.overrides)
        sounds = compared(recipe, read_prompts(str(args.prompts)).texts, args.each)
        folder = Path(recipe.output_dir)
        sounds.picture().save(folder / "spectrograms.png")
        write_json(folder / "music.json", dataclasses.asdict(sounds.result))
        write_report(folder, run_of(recipe, json.loads((folder / SUMMARY).read_text())), None, sounds)
        print(sounds.sentence)
        return 0
    except UserError as error:
        print(f"music_accuracy: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
