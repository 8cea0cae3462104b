"""Methods on the embedded model at equal cost: a sweep on validation prompts, seeds on held-out ones, label noise.

    python scripts/compare_methods.py run --plan scripts/compare_methods.yaml --out runs/compare [--only dpo,ipo]
                                          [--stage sweep|final|noise] [--jobs 1]
    python scripts/compare_methods.py table --out runs/compare [--docs docs/methods.md] [--figures assets/figures]
    python scripts/compare_methods.py methods --out runs/compare [--readme README.md]

Call it from the repository root. Cost is counted in passes of the denoiser (``diffalign.evaluate.cost``): steps follow from
the plan's budget. Every run has a folder OUT/STAGE/METHOD/VALUE/seedK with its result.json; `run` again goes on where it
stopped and tries failed runs once more. Equal trainings are made once. `table` (scripts/compare_table.py) reads what is there;
`methods` lists the recipes of configs/tiny in the README, with results where there are some.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from diffalign import data, run
from diffalign.cli import _quiet_libraries
from diffalign.config import as_tree, load_recipe, read_yaml
from diffalign.data.columns import Tally, normalised
from diffalign.data.flips import flip_labels
from diffalign.data.prompts import read_prompts
from diffalign.errors import ConfigError, UserError
from diffalign.evaluate.cost import groups_per_step, passes_per_group
from diffalign.evaluate.files import write, write_json
from diffalign.evaluate.sides import Side, draw_side, pair_margins
from diffalign.models.load import encoder_facts, load_denoiser, load_encoders, load_pipeline, model_identity
from diffalign.models.lora import load as load_lora
from diffalign.train.guard import Preempted

STAGES, SEED = ("sweep", "final", "noise"), 0  # SEED: of pictures, held-out draws, label flips and bootstraps


@dataclass(frozen=True, kw_only=True)
class Method:
    """recipe: default configs/tiny/NAME.yaml. option: path of its one main hyperparameter; values: those tried."""

    recipe: str
    option: str
    values: list


@dataclass(frozen=True, kw_only=True)
class Noise:
    """methods: name -> the option that is told the share of flipped pairs, or None."""

    data: str
    rates: list
    seeds: list
    methods: dict


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the comments in scripts/compare_methods.yaml."""

    budget: int
    seeds: list
    sweep_seed: int
    common: str
    heldout: str
    validation: str
    pictures: int
    train: list
    methods: dict[str, Method]
    noise: Noise

    @classmethod
    def read(cls, path: Path) -> Plan:
        tree = read_yaml(path)
        try:
            methods = {name: Method(**{"recipe": f"configs/tiny/{name}.yaml", **given})
                       for name, given in tree["methods"].items()}
            return cls(**{**tree, "methods": methods, "noise": Noise(**tree["noise"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{path}: not a plan ({error})") from None

    def recipe(self, name: str) -> str:
        return self.methods[name].recipe if name in self.methods else f"configs/tiny/{name}.yaml"

    def settings(self) -> dict:
        """What all results in one folder have in common."""
        common = load_recipe(self.common)
        evaluation = {k: v for k, v in as_tree(common.evaluate).items() if k not in ("prompts", "grid_prompts", "batch_size")}
        return {"budget": self.budget, "train": self.train, "model": model_identity(common.model), "heldout": self.heldout,
                "validation": self.validation, "pictures": self.pictures, "evaluation": evaluation}


@dataclass(frozen=True)
class Job:
    """One training run and its evaluation. label: the folder's name for what was varied."""

    stage: str
    method: str
    label: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        return out / self.stage / self.method / self.label / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.stage} {self.method} {self.label} seed {self.seed}"


# --- what is to be done ---------------------------------------------------------------------------------------------

def label(value) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def sweep_jobs(plan: Plan, names: list[str]) -> list[Job]:
    return [Job("sweep", name, label(value), plan.sweep_seed, plan.recipe(name), (f"{plan.methods[name].option}={value}",))
            for name in names if name in plan.methods for value in plan.methods[name].values]


def chosen(plan: Plan, out: Path, name: str):
    """The value with the best mean score on the validation prompts; the first of equals, None without any result."""
    found = {value: result_of(Job("sweep", name, label(value), plan.sweep_seed, "", ()).folder(out))
             for value in plan.methods[name].values}
    found = {value: result["score"] for value, result in found.items() if result}
    return max(found, key=found.get) if found else None


def final_jobs(plan: Plan, names: list[str], out: Path) -> Iterator[Job]:
    for name in names:
        value = chosen(plan, out, name) if name in plan.methods else None
        if value is not None:
            override = f"{plan.methods[name].option}={value}"
            yield from (Job("final", name, label(value), seed, plan.recipe(name), (override,)) for seed in plan.seeds)


def noise_jobs(plan: Plan, names: list[str], out: Path) -> list[Job]:
    """Recipes as they stand: only what bends the loss differs between the methods, beta does not."""
    jobs = []
    for name, told in plan.noise.methods.items():
        for rate in plan.noise.rates:
            overrides = (f"data.path={json.dumps(str(noisy(plan, out, rate)))}", *([f"{told}={rate}"] if told else []))
            jobs += [Job("noise", name, f"flip{rate:g}", seed, plan.recipe(name), overrides) for seed in plan.noise.seeds]
    return [job for job in jobs if job.method in names]


def noisy(plan: Plan, out: Path, rate: float) -> Path:
    """The clean data where nothing is flipped, so that its runs are those of the other stages."""
    return out / "data" / f"flip{rate:g}.parquet" if rate else Path(plan.noise.data)


def recipe_of(job: Job, plan: Plan, out: Path):
    """The run's recipe with as many steps as the budget pays for, and the passes of one step.

    Held-out figures are measured afterwards, alike for all methods, so training itself measures none.
    """
    recipe = load_recipe(job.recipe, [
        *plan.train, f"output_dir={json.dumps(str(job.folder(out)))}", f"data.cache_dir={json.dumps(str(out / 'cache'))}",
        f"seed={job.seed}", "data.validation=null", "train.validation_steps=0", *job.overrides])
    candidates = len(next(data.read_rows(recipe.data, Tally())).images)
    per_step = groups_per_step(recipe) * passes_per_group(recipe, candidates)
    return replace(recipe, train=replace(recipe.train, max_train_steps=max(1, round(plan.budget / per_step)))), per_step


# --- doing it -------------------------------------------------------------------------------------------------------

def result_of(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def identity(recipe) -> str:
    """Hash of all that a training depends on, as far as the recipe says."""
    tree = {k: v for k, v in as_tree(recipe).items() if k not in ("output_dir", "evaluate")}
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:16]


def trained(recipe, out: Path) -> Path:
    """The folder of a finished training of this recipe, which may be one of another stage; trains where there is none."""
    known = identity(recipe)
    for note in sorted(out.glob("*/*/*/*/identity.txt")):
        if note.read_text() == known:
            return note.parent
    run.train(recipe)
    write(Path(recipe.output_dir) / "identity.txt", known.encode())
    return Path(recipe.output_dir)


def perform(job: Job, plan: Plan, out: Path) -> str:
    """Train, draw, score and write result.json; a failure is written down and does not stop the others."""
    folder, started = job.folder(out), time.monotonic()
    try:
        recipe, per_step = recipe_of(job, plan, out)
        weights = trained(recipe, out)
        facts = json.loads((weights / "train.json").read_text(encoding="utf-8"))
        part = "validation" if job.stage == "sweep" else "heldout"
        side = measured(plan, out, part, weights / run.LORA_FILE)
        side.save(folder / "side.npz")
        result = {"stage": job.stage, "method": job.method, "title": facts["objective"], "value": job.label, "seed": job.seed,
                  "overrides": list(job.overrides), "steps": facts["step"], "passes": facts["step"] * per_step,
                  "seconds": facts["seconds"], "score": float(np.nanmean(side.scores)), "identity": identity(recipe)}
    except (Preempted, KeyboardInterrupt):
        raise
    except Exception as error:  # a plug-in or a recipe of another version may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        write_json(folder / "failed.json", {"reason": reason, "kind": type(error).__name__})
        return f"{job}: failed: {reason}"
    write_json(folder / "result.json", result)
    (folder / "failed.json").unlink(missing_ok=True)
    return f"{job}: score {result['score']:.3f}, {result['steps']} steps, {time.monotonic() - started:.0f} s"


@cache
def tools(common: str, cache_dir: Path, validation: str):
    """What evaluations share in one process: pipeline, denoiser, judge, held-out batches."""
    recipe = load_recipe(common)
    spec, facts = replace(recipe.data, path=validation, validation=None), encoder_facts(recipe.model)
    report = data.encode(spec, lambda: load_encoders(recipe.model), cache_dir=cache_dir, facts=facts, seed=SEED,
                         resolution=spec.resolution or facts.default_resolution, progress=False)
    return (load_pipeline(recipe.model), load_denoiser(recipe.model), recipe.evaluate.judge,
            data.fixed_batches(data.Cache(report.manifest), 16, seed=SEED))


def prompts_of(plan: Plan, part: str) -> list[str]:
    """validation: of the validation pairs. heldout: the file's, without those. ``prepare`` looks that none is trained on."""
    common = load_recipe(plan.common)
    spec = replace(common.data, path=plan.validation, validation=None, ties="soft")  # the prompts of ties are prompts, too
    pairs = list(dict.fromkeys(row.prompt for row in data.read_rows(spec, Tally())))
    if part == "validation":
        return pairs
    used = {normalised(prompt) for prompt in pairs}
    return [prompt for prompt in read_prompts(plan.heldout).texts if normalised(prompt) not in used]


def measured(plan: Plan, out: Path, part: str, lora: Path | None) -> Side:
    """Pictures of a part's prompts (and, beside the held-out ones, margins of pairs) under the base (lora None) or a LoRA."""
    pipe, denoiser, judge, batches = tools(plan.common, out / "cache", plan.validation)
    spec = replace(load_recipe(plan.common).evaluate, seed=SEED, seeds=plan.pictures if part == "heldout" else 1)
    denoiser.module = getattr(pipe, denoiser.component)
    if lora is not None:
        load_lora(pipe, lora)
    try:
        side = draw_side(pipe, prompts_of(plan, part), judge, spec)
        return side if part == "validation" else replace(side, margins=pair_margins(denoiser, batches, seed=SEED))
    finally:
        if lora is not None:
            pipe.unload_lora_weights()


def begin(plan: Plan, out: Path) -> None:
    """One folder, one setting: results of two budgets or evaluations must not meet in a table."""
    settings, path = plan.settings(), out / "settings.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
        raise ConfigError(f"{path}: holds results of another budget, model or evaluation; use another --out")
    write_json(path, settings)
    write_json(out / "plan.json", asdict(plan))


def prepare(plan: Plan, out: Path, jobs: list[Job]) -> None:
    """All that jobs share, made once and before they start: the base's side, flipped data, latents."""
    for part in ("validation", "heldout"):
        if not (out / "base" / f"{part}.npz").is_file():
            measured(plan, out, part, None).save(out / "base" / f"{part}.npz")
    for rate in plan.noise.rates:
        if rate and not noisy(plan, out, rate).is_file():
            flip_labels(Path(plan.noise.data), noisy(plan, out, rate), rate, seed=SEED)
    seen, judged = set(), {normalised(prompt) for part in ("validation", "heldout") for prompt in prompts_of(plan, part)}
    for job in jobs:
        try:
            recipe, _ = recipe_of(job, plan, out)
            if (recipe.data.path, recipe.data.layout) in seen:
                continue
            seen.add((recipe.data.path, recipe.data.layout))
            leaked = judged & {normalised(row.prompt) for row in data.read_rows(recipe.data, Tally())}
            run.encode(recipe)
        except UserError:
            continue  # the job itself says so
        if leaked:
            raise ConfigError(f"{recipe.data.path}: {len(leaked)} of its prompts are evaluated on, first '{min(leaked)}'")


def stage(jobs: list[Job], plan: Plan, out: Path, workers: int) -> int:
    """Runs what has no result yet; returns how many that was."""
    waiting = [job for job in jobs if result_of(job.folder(out)) is None]
    for job in jobs:
        with suppress(UserError):  # of a job without a result, said when it runs
            kept = result_of(job.folder(out))
            if kept and kept["identity"] != identity(recipe_of(job, plan, out)[0]):
                print(f"{job}: its recipe has changed since; kept (remove its folder to make it again)", flush=True)
    if not waiting:
        return 0
    prepare(plan, out, waiting)
    if workers == 1:
        for job in waiting:
            print(perform(job, plan, out), flush=True)
        return len(waiting)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_quiet_libraries) as pool:
        for line in pool.map(partial(perform, plan=plan, out=out), waiting):
            print(line, flush=True)
    return len(waiting)


def run_all(plan: Plan, out: Path, only: list[str] | None = None, stages: tuple[str, ...] = STAGES, workers: int = 1) -> int:
    """Returns how many runs were made (not skipped)."""
    names = []
    for name in dict.fromkeys([*plan.methods, *plan.noise.methods]):
        if only and name not in only:
            continue
        if Path(plan.recipe(name)).is_file():
            names.append(name)
        else:
            print(f"{name}: no recipe {plan.recipe(name)}; skipped", flush=True)
    unknown = set(only or ()) - {*plan.methods, *plan.noise.methods}
    if unknown:
        raise ConfigError(f"--only: the plan has no method {', '.join(sorted(unknown))}")
    makers = {"sweep": lambda: sweep_jobs(plan, names), "final": lambda: list(final_jobs(plan, names, out)),
              "noise": lambda: noise_jobs(plan, names, out)}
    begin(plan, out)
    return sum(stage(makers[name](), plan, out, workers) for name in STAGES if name in stages)  # final needs the sweep


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs, table, methods = (commands.add_parser(name) for name in ("run", "table", "methods"))
    for command in (runs, table, methods):
        command.add_argument("--out", type=Path, default=Path("runs/compare"))
    runs.add_argument("--plan", type=Path, default=Path("scripts/compare_methods.yaml"))
    runs.add_argument("--only", type=lambda text: text.split(","))
    runs.add_argument("--stage", choices=STAGES)
    runs.add_argument("--jobs", type=int, default=1)
    table.add_argument("--docs", type=Path, default=Path("docs/methods.md"))
    table.add_argument("--figures", type=Path, default=Path("assets/figures"))
    methods.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args(argv)
    try:
        _quiet_libraries()
        if args.command == "table":
            from compare_table import write_table
            write_table(args.out, args.docs, args.figures)
        elif args.command == "methods":
            from compare_table import methods_table
            methods_table(args.out, args.readme)
        else:
            made = run_all(Plan.read(args.plan), args.out, args.only, (args.stage,) if args.stage else STAGES, args.jobs)
            print(f"{made} runs made; python scripts/compare_methods.py table --out {args.out}")
        return 0
    except UserError as error:
        print(f"compare_methods: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
