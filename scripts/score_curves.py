"""Score against seconds and against denoiser passes while recipes train on the embedded model: by default DPO, LPO, SPO and
TailorPO.

    OMP_NUM_THREADS=1 python scripts/score_curves.py run --out runs/curves
    python scripts/score_curves.py table --out runs/curves --docs docs/step_level.md --figure assets/figures/step_level.png

Call it from the repository root. The runs are interleaved: all methods with the first seed, then all with the next. At equal
shares of its steps a run's LoRA is put aside with what the training had cost until then: wall seconds, CPU seconds of the
process (the figure to compare on a machine that others use), and passes. The scores are measured afterwards, on one set of
pictures for all. Every run has a file OUT/METHOD-seedN.json; `run` again makes what is missing.

A pass is one latent forward through the denoiser; a backward counts two more; a latent reward model's trunk counts half of
one, twice where it runs without the prompt, too. Decoders and CLIPs are no passes: seconds show them. Encoding the data,
training a judge, drawing and labelling DPO's pairs are left out. --prompts validation is for tuning; heldout leaves those
prompts out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from compare_table import FAINT, INK, axes, put, save
from scipy.stats import ttest_1samp

from diffalign.cli import _quiet_libraries
from diffalign.config import Recipe, as_tree, load_recipe
from diffalign.data import read_rows
from diffalign.data.columns import Tally, normalised
from diffalign.data.prompts import read_prompts
from diffalign.errors import ConfigError
from diffalign.evaluate.cost import BACKWARD
from diffalign.evaluate.files import write_json
from diffalign.evaluate.sides import draw_side
from diffalign.evaluate.statistics import bootstrap
from diffalign.models.latent_reward import LatentReward
from diffalign.models.load import load_pipeline, model_identity
from diffalign.models.lora import load as load_lora
from diffalign.run import LORA_FILE, parts
from diffalign.train import fit, make_accelerator
from diffalign.world import world_of

RECIPES = {"dpo": "configs/quickstart.yaml", "lpo": "configs/tiny/lpo.yaml", "spo": "configs/tiny/spo.yaml",
           "tailorpo": "configs/tiny/tailorpo.yaml"}
BEGIN, END = "<!-- curves: written by scripts/score_curves.py table -->", "<!-- end of curves -->"
COLOURS = ("#16181d", "#2563eb", "#0a7d4f", "#b45309", "#7c3aed", "#0891b2")


class Passes:
    """Counts latents through a denoiser and through every latent reward model, while they run."""

    def __init__(self, denoiser: torch.nn.Module):
        self.count = 0.0
        self.handles = [denoiser.register_forward_hook(self._of_denoiser),
                        torch.nn.modules.module.register_module_forward_hook(self._of_judge)]

    def _of_denoiser(self, module, args, output) -> None:
        self.count += len(args[0]) * (1 + BACKWARD * torch.is_grad_enabled())

    def _of_judge(self, module, args, output) -> None:
        if isinstance(module, LatentReward):
            self.count += len(args[0]) * (1.0 if module.facts.guidance_scale != 1 else 0.5)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class Marks:
    """A hook of the loop: puts the LoRA aside at the steps ``at``; its own time is not counted."""

    def __init__(self, at: list[int], folder: Path, bank, passes: Passes):
        self.at, self.folder, self.bank, self.passes, self.found = at, folder, bank, passes, []
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def after_step(self, state, report) -> None:
        if state.step not in self.at:
            return
        wall, cpu = time.monotonic(), time.process_time()
        self.bank.save(self.folder / f"step{state.step}", {})
        self.found.append({"step": state.step, "seconds": wall - self.wall, "cpu_seconds": cpu - self.cpu,
                           "passes": self.passes.count})
        self.wall += time.monotonic() - wall
        self.cpu += time.process_time() - cpu


def trained(recipe: Recipe, folder: Path, marks: int) -> list[dict]:
    """Train, without validation and checkpoints on the way; what each mark had cost."""
    shutil.rmtree(folder, ignore_errors=True)
    steps = recipe.train.max_train_steps
    spec = replace(recipe.train, validation_steps=0, checkpointing_steps=10 * steps, logging_steps=max(1, steps // marks))
    recipe = replace(recipe, train=spec)
    parts.check_before(recipe)
    accelerator = make_accelerator(spec, folder)
    pairs, _ = parts.caches(recipe, accelerator, lambda line: None)
    method = parts.method_of(recipe)
    bank = parts.bank_of(recipe, method, accelerator, pairs)
    source = parts.source_of(recipe, parts.stored_of(recipe, pairs, world_of(accelerator)), bank, accelerator)
    passes = Passes(bank.denoiser.module)
    hook = Marks([round(steps * (i + 1) / marks) for i in range(marks)], folder / "marks", bank, passes)
    try:
        fit(hooks=[hook], method=method, bank=bank, source=source, spec=spec, seed=recipe.seed, output_dir=folder,
            config=as_tree(recipe), accelerator=accelerator, progress=False)
    finally:
        passes.close()
    return hook.found


class Exam:
    """Scores of LoRAs on the same prompts and picture seeds."""

    def __init__(self, recipe: Recipe, part: str, seeds: int):
        self.pipe = load_pipeline(recipe.model)
        self.judge, self.spec = recipe.evaluate.judge, replace(recipe.evaluate, seed=0, seeds=seeds)
        rows = read_rows(replace(recipe.data, path=recipe.data.validation, validation=None, ties="soft"), Tally())
        tuned = dict.fromkeys(normalised(row.prompt) for row in rows)
        self.prompts = list(tuned) if part == "validation" else [
            prompt for prompt in read_prompts(recipe.evaluate.prompts).texts if normalised(prompt) not in tuned]

    def __call__(self, lora: Path | None) -> list[float]:
        """The mean score of each prompt's pictures."""
        if lora is not None:
            load_lora(self.pipe, lora)
        side = draw_side(self.pipe, self.prompts, self.judge, self.spec)
        if lora is not None:
            self.pipe.unload_lora_weights()
        return np.nanmean(side.scores, axis=1).tolist()


def chosen(text: str) -> tuple[str, str, list[str]]:
    """NAME or NAME=RECIPE, and options for it alone, each after a blank."""
    first, *options = text.split()
    name, _, path = first.partition("=")
    return name, path or RECIPES[name], options


def run(args) -> None:
    _quiet_libraries()
    out = Path(args.out)
    base = load_recipe(RECIPES["dpo"])
    exam = Exam(base, args.prompts, args.pictures)
    if not (out / "base.json").is_file():
        write_json(out / "base.json", {"scores": exam(None), "model": model_identity(base.model), "prompts": args.prompts})
        print("base", np.mean(json.loads((out / "base.json").read_text())["scores"]), flush=True)
    for seed in map(int, args.seeds.split(",")):
        for name, path, options in map(chosen, args.methods or RECIPES):
            file, folder = out / f"{name}-seed{seed}.json", out / f"{name}-seed{seed}"
            if file.is_file():
                continue
            recipe = load_recipe(path, [f"output_dir={folder}", f"data.cache_dir={out / 'cache'}", f"seed={seed}",
                                                 "data.validation=null", *options])
            marks = trained(recipe, folder, args.marks)
            for mark in marks:
                mark["scores"] = exam(folder / "marks" / f"step{mark['step']}" / LORA_FILE)
                print(name, seed, {**mark, "scores": np.mean(mark["scores"])}, flush=True)
            write_json(file, {"method": name, "seed": seed, "marks": marks, "recipe": as_tree(recipe)})


# --- what the docs show -----------------------------------------------------------------------------------------------

def results(out: Path) -> dict[str, list[dict]]:
    """Method -> its runs, by seed."""
    found: dict[str, list[dict]] = {}
    for file in sorted(out.glob("*-seed*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(run["method"], []).append(run)
    if not found:
        raise ConfigError(f"{out}: holds no results; run `python scripts/score_curves.py run --out {out}` first")
    return found


def means(runs: list[dict], name: str) -> list[float]:
    """Of the runs, at each mark."""
    return np.mean([[mark[name] for mark in run["marks"]] for run in runs], axis=0).tolist()


def scores(runs: list[dict]) -> np.ndarray:
    """[runs, marks, prompts]."""
    return np.asarray([[mark["scores"] for mark in run["marks"]] for run in runs])


def table(out: Path, goal_of: str = "dpo") -> str:
    """A row a method and mark; the difference to the goal's last mark is paired over prompts, with a bootstrap over them."""
    found, base = results(out), json.loads((out / "base.json").read_text(encoding="utf-8"))
    goal = scores(found[goal_of]).mean(0)[-1] if goal_of in found else None
    head = ("method", "steps", "passes", "CPU seconds", "wall seconds", "score (runs)", f"less {goal_of}'s last [95 %]")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, runs in found.items():
        columns = [means(runs, what) for what in ("step", "passes", "cpu_seconds", "seconds")]
        each = scores(runs)
        for number, (step, passes, cpu, wall) in enumerate(zip(*columns, strict=True)):
            at, apart = each[:, number].mean(1), ""
            if goal is not None:
                difference = each[:, number].mean(0) - goal
                (low, high), = bootstrap(difference[None], seed=0, resamples=10_000)
                apart = f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append(f"| {name} | {step:.0f} | {passes:,.0f} | {cpu:.0f} | {wall:.0f} | **{at.mean():.3f}** "
                         f"({', '.join(f'{score:.3f}' for score in at)}) | {apart} |")
    if goal is not None and len(found[goal_of]) > 1:
        lines += ["", *reached(found, goal_of, float(np.mean(base["scores"])))]
    start = f"Base: {np.mean(base['scores']):.3f} on {len(base['scores'])} prompts ({base['prompts']})."
    return "\n".join([start, "", *lines])


def reached(found: dict[str, list[dict]], goal_of: str, base: float) -> list[str]:
    """Passes to the goal's last score, by the straight lines between the marks of the runs' mean; and the mean score over the
    marks, whose difference to the goal's is paired by seed, with Student's interval."""
    level, paired = scores(found[goal_of])[:, -1].mean(), {run["seed"]: run for run in found[goal_of]}
    lines = [f"| method | passes to {goal_of}'s last score, {level:.3f} | mean over the marks, less {goal_of}'s "
             "[95 % over seeds] |", "|---|---|---|"]
    for name, runs in found.items():
        passes, means_at = [0.0, *means(runs, "passes")], [base, *scores(runs).mean((0, 2))]
        first = next((i for i, score in enumerate(means_at) if score >= level), None)
        need = f"not in {passes[-1]:,.0f}" if first is None else f"{_between(passes, means_at, first, level):,.0f}"
        both = [run for run in runs if run["seed"] in paired]
        apart = scores(both).mean((1, 2)) - scores([paired[run["seed"]] for run in both]).mean((1, 2))
        cell = ""
        if name != goal_of and len(both) > 1:
            low, high = ttest_1samp(apart, 0).confidence_interval()
            cell = f"{apart.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {name} | {need} | {cell} |")
    return lines


def _between(passes: list[float], at: list[float], first: int, level: float) -> float:
    return float(np.interp(level, at[first - 1:first + 1], passes[first - 1:first + 1]))


def figure(out: Path, path: Path) -> None:
    """Score against CPU seconds and against passes: a line a method, a band from its worst to its best run."""
    found = results(out)
    base = float(np.mean(json.loads((out / "base.json").read_text(encoding="utf-8"))["scores"]))
    drawn, panels = axes(2, 9, 3.6)
    for colour, (name, runs) in zip(COLOURS, found.items(), strict=False):
        each = scores(runs).mean(2)
        for ax, what in zip(panels, ("cpu_seconds", "passes"), strict=True):
            x = [0, *means(runs, what)]
            ax.plot(x, [base, *each.mean(0)], color=colour, marker="o", markersize=4, label=name)
            ax.fill_between(x, [base, *each.min(0)], [base, *each.max(0)], color=colour, alpha=0.15, linewidth=0)
    for ax, title in zip(panels, ("score against CPU seconds of training", "score against denoiser passes"), strict=True):
        ax.axhline(base, color=FAINT, linewidth=1, linestyle="--")
        ax.set_title(title, fontsize=10, loc="left", color=INK)
    panels[0].legend(frameon=False, fontsize=9)
    save(drawn, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--out", default="runs/curves")
    parser.add_argument("--method", dest="methods", action="append", metavar="'NAME[=RECIPE] [OPTION=VALUE ...]'",
                        help="again for each; without it all of " + ", ".join(RECIPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--prompts", default="heldout", choices=["heldout", "validation"])
    parser.add_argument("--pictures", type=int, default=2, help="a prompt")
    parser.add_argument("--marks", type=int, default=3)
    parser.add_argument("--goal", default="dpo", help="the method that the others are compared with")
    parser.add_argument("--docs", type=Path, help="where the table goes, between its two markers")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args)
        return
    text = table(Path(args.out), args.goal)
    print(text)
    if args.figure:
        figure(Path(args.out), args.figure)
    if args.docs:
        put(args.docs, "\n".join([BEGIN, "", text, "", END]), BEGIN, END)


if __name__ == "__main__":
    main()
