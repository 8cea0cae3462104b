"""How well step-level judges order held-out pairs at each noise level, on the same noised pairs.

    OMP_NUM_THREADS=1 python scripts/assets/make_preferences.py --seed 1 --pairs 1 --ranked 1 --validation-pairs 384 \\
                                                                --heldout-prompts 1 --out runs/heldout        # the fresh pairs
    diffalign train-reward configs/rewards/tiny.yaml data.path=assets/preferences/train.parquet output_dir=runs/pixel
    OMP_NUM_THREADS=1 python scripts/step_reward_accuracy.py --clip runs/pixel/reward \\
                             --pairs assets/preferences/validation.parquet --pairs runs/heldout/validation.parquet

Call it from the repository root. Judges: the latent reward model, on the noisy latent; a CLIP that was trained on the same
pairs' clean pictures, on the noisy latent decoded, and on the decoded picture that the base predicts from it; and the
step-aware CLIP on that prediction. Both pictures of a pair share level and noise. An accuracy is a mean over prompts; the
differences to the latent reward model are paired, with a bootstrap over prompts. Prints a Markdown table a file of pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign import rng
from diffalign.cli import _quiet_libraries
from diffalign.data.columns import Tally
from diffalign.data.spec import DataSpec
from diffalign.evaluate.statistics import bootstrap
from diffalign.models.spec import ModelSpec
from diffalign.reward_training.pairs import Pairs, decoded, read_pairs
from diffalign.reward_training.predicted import Predicted
from diffalign.rewards.latent import LatentModel
from diffalign.rewards.learned import Learned, StepAware

LEVELS = (0.1, 0.25, 0.4, 0.6, 0.75, 0.9)
PARTS = {"t < 0.5": slice(0, 3), "t > 0.5": slice(3, 6)}
LATENT = "latent reward model"
BATCH = 32


def judges(args, predicted: Predicted) -> dict[str, Callable]:
    """name -> (noised, prompts, predicted pictures) -> scores."""
    latent, clip = LatentModel(path=args.lrm), Learned(path=args.clip, batch_size=64)
    aware = StepAware(path=args.spm, batch_size=64)

    def decoded_latent(noised, prompts, pictures):
        return clip(list((predicted.encoders.decode(noised.xt) + 1) / 2), prompts)

    return {LATENT: lambda noised, prompts, pictures: latent(noised.xt, noised.t, prompts),
            "CLIP, noisy latent decoded": decoded_latent,
            "CLIP, prediction decoded": lambda noised, prompts, pictures: clip(list(pictures), prompts),
            "step-aware CLIP, prediction decoded": lambda noised, prompts, pictures: aware(list(pictures), prompts,
                                                                                           noised.t.tolist())}


def batches(pairs: Pairs, spec: DataSpec, predicted: Predicted) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Row numbers, and the latents of their pictures, the preferred first: [2 B, C, h, w]."""
    for start in range(0, len(pairs), BATCH):
        rows = np.arange(start, min(start + BATCH, len(pairs)))
        best = np.where(pairs.target[rows] > 0.5, pairs.first[rows], pairs.second[rows])
        worst = pairs.first[rows] + pairs.second[rows] - best
        images = decoded([pairs.pictures[i] for i in (*best, *worst)], spec, Tally())
        yield rows, predicted.latents(torch.stack([predicted.fit.unit(image) for image in images]))


@torch.no_grad()
def measured(path: str, args) -> tuple[dict[str, np.ndarray], int]:
    """Whether each judge orders each prompt's pair right at each level, [prompts, levels]; equal scores count one half."""
    spec = DataSpec(path=path)
    predicted = Predicted(ModelSpec(pretrained_model_name_or_path=args.model), 1.0, torch.device("cpu"))
    pairs = read_pairs(spec, Tally(), part="train", seed=0)
    asked = judges(args, predicted)
    found = {name: np.zeros((len(pairs), len(LEVELS))) for name in asked}
    for rows, x0 in batches(pairs, spec, predicted):
        prompts = 2 * [pairs.prompts[i] for i in pairs.prompt[rows]]
        for column, level in enumerate(LEVELS):
            key = torch.stack([torch.from_numpy(rows), torch.full((len(rows),), column)], 1)
            noise = rng.normal(0, "step_reward_accuracy", key, tuple(x0.shape[1:])).repeat(2, 1, 1, 1)
            noised = predicted.noised(x0, torch.full((len(x0),), level), noise)
            pictures = predicted(noised, prompts)
            for name, judge in asked.items():
                best, worst = judge(noised, prompts, pictures).chunk(2)
                found[name][rows, column] = torch.where(best == worst, 0.5, (best > worst).float()).numpy()
    number = np.unique(pairs.prompt, return_inverse=True)[1]
    counts = np.bincount(number)[:, None]
    return {name: np.stack([np.bincount(number, right) for right in rows.T], 1) / counts
            for name, rows in found.items()}, len(pairs)


def table(found: dict[str, np.ndarray]) -> str:
    head = ["judge", *(f"t = {level:g}" for level in LEVELS), *PARTS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, right in found.items():
        cells = [name, *(f"{100 * share:.1f}" for share in right.mean(0))]
        for part in PARTS.values():
            (low, high), = bootstrap(right[:, part].mean(1)[None], seed=0, resamples=10_000)
            cells.append(f"{100 * right[:, part].mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {' | '.join(cells)} |")
    for name in [name for name in found if name != LATENT]:
        for part, columns in PARTS.items():
            apart = (found[LATENT] - found[name])[:, columns].mean(1)
            (low, high), = bootstrap(apart[None], seed=0, resamples=10_000)
            lines.append(f"\n{LATENT} less {name}, {part}: {100 * apart.mean():+.1f} points "
                         f"[{100 * low:+.1f}, {100 * high:+.1f}]")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", action="append")
    parser.add_argument("--model", default="assets/tiny-sdxl")
    parser.add_argument("--lrm", default="assets/tiny-lrm")
    parser.add_argument("--spm", default="assets/tiny-spm")
    parser.add_argument("--clip", required=True)
    args = parser.parse_args()
    _quiet_libraries()
    for path in args.pairs or ["assets/preferences/validation.parquet"]:
        found, count = measured(path, args)
        print(f"\n{Path(path)}: {count} pairs of {len(next(iter(found.values())))} prompts\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
