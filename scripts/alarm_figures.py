"""The figures of docs/alarm.md: how often the alarm fires, in simulation and on pictures of trained LoRAs.

python scripts/alarm_figures.py simulate
python scripts/alarm_figures.py compare runs/quickstart/pytorch_lora_weights.safetensors --training colours --judge shapes
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffalign.config import load_recipe, load_reward
from diffalign.data.prompts import read_prompts
from diffalign.evaluate.alarm import alarm
from diffalign.evaluate.compare import picture_seeds
from diffalign.evaluate.looks import LOOKS, looks, spread
from diffalign.models.load import load_pipeline
from diffalign.models.lora import load as load_lora
from diffalign.rewards import judged
from diffalign.rewards.scenes import _best_match, as_picture, parse, see
from diffalign.sampling.generate import generate


@dataclass(frozen=True)
class Part:
    """Half of the scene checker, so that one half can be trained on and the other judge. colours: background and objects'
    colours. shapes: number, shapes and layout.
    """

    name: str
    differentiable = False

    def __call__(self, images, prompts):
        return torch.tensor([self._one(as_picture(image), parse(text)) for image, text in zip(images, prompts, strict=True)])

    def _one(self, picture, scene) -> float:
        ground, blobs = see(picture)
        colours, *rest = _best_match(scene, blobs)
        halves = {"colours": [ground == scene.background, colours], "shapes": [len(blobs) == len(scene.objects), *rest]}
        return float(np.mean(halves[self.name]))


def simulate(runs: int) -> None:
    """Every statistic and score has variance 1/2 between prompts and 1/2 inside them, half of that shared by base and aligned
    (the seed); the training reward rises by half a standard deviation."""
    cases = {"nothing else changes": {}, "the judge rises too": {"judge": 0.5},
             "one look by 0.3 sd": {"look": 0.3}, "one look by 0.5 sd": {"look": 0.5}, "one look by 0.75 sd": {"look": 0.75},
             "one look by 1 sd": {"look": 1.0}, "one look by 0.9 sd, the judge rises": {"look": 0.9, "judge": 0.5},
             "one look by 1.5 sd, the judge rises": {"look": 1.5, "judge": 0.5},
             "judge falls by 0.3 sd": {"judge": -0.3}, "judge falls by 0.5 sd": {"judge": -0.5},
             "diversity 60 %": {"ratio": 0.6}, "diversity 50 %": {"ratio": 0.5},
             "diversity 60 %, the judge rises": {"ratio": 0.6, "judge": 0.5},
             "diversity 30 %, the judge rises": {"ratio": 0.3, "judge": 0.5}}
    sizes = ((16, 2), (32, 2), (64, 4), (192, 2))
    print("| planted | " + " | ".join(f"{p} x {s}" for p, s in sizes) + " |\n|---|" + "---|" * len(sizes))
    for name, case in cases.items():
        rates = [np.mean([_experiment(seed, *size, **case) for seed in range(runs)]) for size in sizes]
        print(f"| {name} | " + " | ".join(f"{100 * rate:.1f} %" for rate in rates) + " |", flush=True)


def _experiment(seed: int, prompts: int, pictures: int, look: float = 0.0, judge: float = 0.0, ratio: float = 1.0) -> bool:
    rng = np.random.default_rng(seed)

    def scores(rise):
        shared = rng.normal(0, 0.5**0.5, (prompts, 1)) + rng.normal(0, 0.5, (prompts, pictures))
        return shared + rng.normal(0, 0.5, (2, prompts, pictures)) + np.array([0, rise])[:, None, None]

    table = np.stack([scores(look if i == 0 else 0.0) for i in range(len(LOOKS))], 1)
    base = rng.gamma(20, 1, prompts)
    variety = np.stack([base, ratio * base * rng.normal(1, 0.15, prompts)])
    return alarm(100 * table, training=scores(0.5), judge=scores(judge), diversity=variety).fired


def compare(lora: str, training: str | None, judge: str | None, prompts: int, seeds: int) -> None:
    """Base beside a LoRA of the embedded model on its held-out prompts, drawn as the quickstart does but in ten steps."""
    texts = read_prompts("assets/preferences/heldout_prompts.txt").texts
    texts = texts[::max(1, len(texts) // prompts)][:prompts]
    rewards = {"training": training, "judge": judge}
    rewards = {role: None if name is None else Part(name) if name in ("colours", "shapes") else load_reward(name)
               for role, name in rewards.items()}
    sides = [_side(None, texts, seeds, rewards), _side(Path(lora), texts, seeds, rewards)]
    both = {name: None if sides[0][name] is None else np.stack([side[name] for side in sides]) for name in sides[0]}
    found = alarm(both.pop("looks"), **both)
    for row in found.statistics:
        print(f"{row.name:22s} {row.base:8.3f} -> {row.aligned:8.3f}  {row.shift:+.2f} sd [{row.low:+.2f}, {row.high:+.2f}]"
              f"  band {row.band_high:.2f}{'  left' if row.left else ''}")
    for name, change in (("training", found.training), ("judge", found.judge), ("gap", found.gap)):
        if change is not None:
            print(f"{name:22s} {change.base:8.3f} -> {change.aligned:8.3f}  {change.shift:+.2f} sd "
                  f"[{change.low:+.2f}, {change.high:+.2f}]")
    if found.diversity is not None:
        print(f"{'diversity':22s} {found.diversity.ratio:.2f} [{found.diversity.low:.2f}, {found.diversity.high:.2f}]")
    print(found.sentence)


def _side(lora: Path | None, texts: list[str], seeds: int, rewards: dict) -> dict:
    pipe = load_pipeline(load_recipe("configs/embedded.yaml").model)
    if lora is not None:
        load_lora(pipe, lora)
    prompts = [text for text in texts for _ in range(seeds)]
    images = generate(pipe, prompts, picture_seeds(texts, seeds, 0).ravel().tolist(), num_inference_steps=10,
                      guidance_scale=1.0, batch_size=64, progress=None)
    shape = (len(texts), seeds)
    return {"looks": looks(images).reshape(-1, *shape), "diversity": spread(images, seeds) if seeds > 1 else None,
            **{role: None if reward is None else judged(reward, images, prompts).double().numpy().reshape(shape)
               for role, reward in rewards.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("simulate")
    one.add_argument("--runs", type=int, default=1000)
    two = commands.add_parser("compare")
    two.add_argument("lora")
    two.add_argument("--training")
    two.add_argument("--judge")
    two.add_argument("--prompts", type=int, default=64)
    two.add_argument("--seeds", type=int, default=4)
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    {"simulate": simulate, "compare": compare}[options.pop("command")](**options)


if __name__ == "__main__":
    main()
