"""The finished runs of scripts/compare_methods.py as tables, plain sentences and two figures: its `table` command; and the
list of methods in README.md, read off the recipes: its `methods` command."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign import data
from diffalign.config import Recipe, load_recipe
from diffalign.data.columns import Tally
from diffalign.data.sources import Online, SemiPolicy, Stored
from diffalign.data.stepwise import Stepwise
from diffalign.errors import ConfigError
from diffalign.evaluate.cost import passes_per_group
from diffalign.evaluate.files import write
from diffalign.evaluate.sides import Pooled, Side, implicit_accuracy, pool
from diffalign.evaluate.statistics import paired
from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Preference
from diffalign.objectives import KTO, SFT, needs_scores

BEGIN, END = "<!-- results: written by scripts/compare_methods.py table -->", "<!-- end of results -->"
METHODS, METHODS_END = "<!-- methods -->", "<!-- end of methods -->"
INK, FAINT, BETTER, WORSE = "#16181d", "#6b7280", "#0a7d4f", "#b42318"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method (at one label of the noise study): its runs pooled. accuracy: held-out preference, with interval."""

    name: str
    label: str
    runs: list[dict]
    sides: list[Side]
    pooled: Pooled
    accuracy: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        return self.pooled.statistics.verdict

    def mean(self, key: str) -> float:
        return float(np.mean([run[key] for run in self.runs]))


def read_row(folder: Path, base: Side) -> Row | None:
    """folder: STAGE/METHOD/VALUE, with one folder a seed."""
    paths = sorted(folder.glob("seed*/result.json"))
    if not paths:
        return None
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    sides = [Side.load(path.with_name("side.npz")) for path in paths]
    return Row(name=folder.parent.name, label=folder.name, runs=runs, sides=sides, pooled=pool(base, sides),
               accuracy=implicit_accuracy(base.margins, [side.margins for side in sides]))


def scores(rows: list[Side]) -> np.ndarray:
    return np.concatenate([side.scores for side in rows], 1)


def read_sweep(out: Path, plan: dict, name: str) -> list[tuple[str, dict]]:
    """(value, its result) of a method's finished sweep runs, in the plan's order."""
    found = []
    for value in plan["methods"].get(name, {"values": []})["values"]:
        text = f"{value:g}" if isinstance(value, (int, float)) else str(value)
        path = out / "sweep" / name / text / f"seed{plan['sweep_seed']}" / "result.json"
        if path.is_file():
            found.append((text, json.loads(path.read_text(encoding="utf-8"))))
    return found


def best(sweep: list[tuple[str, dict]]) -> str | None:
    return max(sweep, key=lambda item: item[1]["score"])[0] if sweep else None


# --- words ----------------------------------------------------------------------------------------------------------

def names(rows: list[Row]) -> str:
    return ", ".join(f"`{row.name}`" for row in rows) or "none"


def line(row: Row) -> str:
    s, seconds = row.pooled.statistics, row.mean("seconds")
    alarm = row.pooled.alarm
    moved = max(alarm.statistics, key=lambda statistic: abs(statistic.shift))
    diversity = "" if alarm.diversity is None else f"{alarm.diversity.ratio:.2f}"
    verdict = {"better": "yes", "worse": "no: worse", "undecided": "not shown"}[row.verdict]
    return (f"| `{row.name}` | {row.label} | {s.aligned_score:.3f} "
            f"| {s.win_rate:.3f} [{s.win_rate_low:.3f}, {s.win_rate_high:.3f}] "
            f"| {min(row.pooled.win_rates):.3f} to {max(row.pooled.win_rates):.3f} "
            f"| {row.accuracy[0]:.2f} [{row.accuracy[1]:.2f}, {row.accuracy[2]:.2f}] | {row.mean('passes'):,.0f} "
            f"| {row.mean('steps'):.0f} | {seconds:.0f} | {moved.name} {moved.shift:+.2f}{' (!)' if alarm.fired else ''} "
            f"| {diversity} | {verdict} |")


HEAD = ("| method | value | score | win rate [95 %] | of single seeds | held-out preference [95 %] | passes | steps | seconds "
        "| largest shift | diversity | helps |\n" + "|---" * 12 + "|")


def sentences(rows: list[Row], base: Side, plan: dict) -> list[str]:
    """What the numbers say, no more."""
    prompts, pictures = base.scores.shape
    by = {verdict: [row for row in rows if row.verdict == verdict] for verdict in ("better", "undecided", "worse")}
    said = [f"The base scores {np.nanmean(base.scores):.3f} on these {prompts} prompts ({pictures} pictures each).",
            f"Better than the base, by an interval above one half: {names(by['better'])}.",
            f"**These did not help here**, no difference from the base is shown: {names(by['undecided'])}; "
            f"worse than the base: {names(by['worse'])}."]
    sft = next((row for row in rows if row.name == "sft"), None)
    if sft is not None:
        others = [(row, paired(scores(sft.sides), scores(row.sides)).verdict) for row in rows
                  if row is not sft and len(row.sides) == len(sft.sides)]
        told = {verdict: names([row for row, found in others if found == verdict]) for verdict in ("better", "worse")}
        said.append(f"Against SFT on the winners, picture by picture, better: {told['better']}; worse: {told['worse']}; "
                    "the others cannot be told from it.")
    fired = [row for row in rows if row.pooled.alarm.fired]
    said.append(f"The reward-hacking alarm fires, marked (!): {names(fired)}.")
    fewer = [row for row in rows if len(row.runs) < len(plan["seeds"])]
    if fewer:
        said.append(f"With fewer than {len(plan['seeds'])} seeds, so not comparable yet: {names(fewer)}.")
    said.append(f"Intervals are of one method at a time: of {len(rows)} methods equal to the base about "
                f"{0.05 * len(rows):.1f} would show a difference, better or worse, by chance alone. They are over prompts, "
                "for these training seeds; the column beside them shows what seeds change.")
    return said


def missing(out: Path, plan: dict, rows: list[Row]) -> str:
    """Methods of the plan without a row, and runs that failed, with their reason."""
    there, parts = {row.name for row in rows}, []
    for name in plan["methods"]:
        if name not in there:
            parts.append(f"`{name}`")
    failures = [f"{path.parent.relative_to(out)} ({json.loads(path.read_text())['reason']})"
                for path in sorted(out.glob("*/*/*/*/failed.json"))]
    said = ([f"Not run: {', '.join(parts)}."] if parts else []) + ([f"Failed: {'; '.join(failures)}."] if failures else [])
    return " ".join(said)


def sweep_table(out: Path, plan: dict, base: float) -> list[str]:
    said = ["| method | option | value: score on the validation prompts | note |", "|---|---|---|---|"]
    for name, method in plan["methods"].items():
        sweep = read_sweep(out, plan, name)
        if not sweep:
            continue
        top = best(sweep)
        cells = ", ".join(f"**{value}: {result['score']:.3f}**" if value == top else f"{value}: {result['score']:.3f}"
                          for value, result in sweep)
        below = max(result["score"] for _, result in sweep) <= base
        said.append(f"| `{name}` | {method['option']} | {cells} | {'no value above the base' if below else ''} |")
    return said


def noise_table(grid: dict[str, list[Row]]) -> list[str]:
    rates = list(dict.fromkeys(row.label for rows in grid.values() for row in rows))
    said = [f"| method | {' | '.join(f'{100 * float(r[4:]):.0f} %' for r in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for name, rows in grid.items():
        cells = {row.label: row.pooled.statistics for row in rows}
        said.append(f"| `{name}` | " + " | ".join(
            f"{s.aligned_score:.3f}; {s.win_rate:.2f} [{s.win_rate_low:.2f}, {s.win_rate_high:.2f}]" if s else ""
            for s in map(cells.get, rates)) + " |")
    said.append("")
    for rate in rates:
        at = {name: row for name, rows in grid.items() for row in rows if row.label == rate}
        if "dpo" not in at or rate == "flip0":
            continue
        against = {name: paired(scores(at["dpo"].sides), scores(row.sides)).verdict for name, row in at.items()
                   if name != "dpo" and len(row.sides) == len(at["dpo"].sides)}
        said.append(f"At {100 * float(rate[4:]):.0f} % flipped, picture by picture against `dpo`, better: "
                    f"{', '.join(f'`{n}`' for n, v in against.items() if v == 'better') or 'none'}; worse: "
                    f"{', '.join(f'`{n}`' for n, v in against.items() if v == 'worse') or 'none'}.")
    return said


def write_table(out: Path, docs: Path, figures: Path) -> str:
    """Replaces what lies between the markers in ``docs`` and draws methods.png and label_noise.png. Returns the fragment."""
    if not (out / "plan.json").is_file() or not (out / "base" / "heldout.npz").is_file():
        raise ConfigError(f"{out}: no runs here; start scripts/compare_methods.py run --out {out}")
    plan, base = json.loads((out / "plan.json").read_text()), Side.load(out / "base" / "heldout.npz")
    finals = [read_row(out / "final" / name / str(best(read_sweep(out, plan, name))), base) for name in plan["methods"]]
    rows = sorted(filter(None, finals), key=lambda row: -row.pooled.statistics.aligned_score)
    noisy = {name: [row for row in (read_row(out / "noise" / name / f"flip{rate:g}", base) for rate in plan["noise"]["rates"])
                    if row] for name in plan["noise"]["methods"]}
    noisy = {name: found for name, found in noisy.items() if found}
    run = f"python scripts/compare_methods.py run --out {out}"
    where = Path("..") / figures if not figures.is_absolute() else figures
    parts = [BEGIN, "", f"Made by `{run}` and `python scripts/compare_methods.py table --out {out}`: "
             f"{plan['budget']:,} passes a run, seeds {', '.join(map(str, plan['seeds']))}.",
             "", HEAD, *(line(row) for row in rows), "",
             *(f"- {said}" for said in (sentences(rows, base, plan) if rows else [])),
             *([f"- {left}"] if (left := missing(out, plan, rows)) else [])]
    if rows:
        figure_methods(rows, figures / "methods.png")
        parts += ["", f"![Win rate against the base and held-out preference, with intervals]({where / 'methods.png'})"]
    there = float(np.nanmean(Side.load(out / "base" / "validation.npz").scores))
    parts += ["", "### The sweep", "", f"Seed {plan['sweep_seed']}; the base scores {there:.3f} on the validation prompts.",
              "", *sweep_table(out, plan, there)]
    if noisy:
        figure_noise(noisy, figures / "label_noise.png")
        told = [f"`{name}` ({option})" for name, option in plan["noise"]["methods"].items() if option]
        parts += ["", "### Flipped labels", "",
                  "Score; win rate against the base [95 %], by the share of flipped training pairs. "
                  f"Told the share: {', '.join(told) or 'none'}.", "", *noise_table(noisy), "",
                  f"![Score by share of flipped pairs]({where / 'label_noise.png'})"]
    fragment = "\n".join([*parts, "", END])
    put(docs, fragment, BEGIN, END)
    return fragment


def put(docs: Path, fragment: str, begin: str, end: str) -> None:
    """Replaces what lies between the two markers, which are part of the fragment."""
    text = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"{docs}: needs the lines '{begin}' and '{end}', once each, around the place of the results")
    write(docs, (text[:text.index(begin)] + fragment + text[text.index(end) + len(end):]).encode())


# --- the list of methods --------------------------------------------------------------------------------------------

def group_of(recipe: Recipe, candidates: int) -> str:
    """The first thing that sets it apart from DPO on pairs."""
    if not isinstance(recipe.source, Stored):
        return "Samples of the model"
    if candidates > 2:
        return "Ranked lists"
    if recipe.objective.reference_free:
        return "Pairs, without a reference"
    if recipe.reference.moves:
        return "Pairs, a reference that moves"
    if needs_scores(recipe.objective):
        return "Pairs with scores"
    if recipe.likelihood != DenoisingELBO():
        return "Pairs, other draws of time and noise"
    return "Pairs, a frozen reference"


GROUPS = ("Pairs, a frozen reference", "Pairs, without a reference", "Pairs with scores",
          "Pairs, other draws of time and noise", "Pairs, a reference that moves", "Ranked lists", "Samples of the model")


def needed(recipe: Recipe, candidates: int) -> str:
    """What the data must bring."""
    if isinstance(recipe.source, Online):
        return "prompts, a reward"
    if isinstance(recipe.source, Stepwise):
        return "prompts, a judge"
    if isinstance(recipe.source, SemiPolicy) or isinstance(recipe.objective, SFT):
        return "winners"
    if isinstance(recipe.objective, KTO):
        return "likes, dislikes"
    if needs_scores(recipe.objective):
        return "lists with scores" if candidates > 2 else "pairs with scores"
    return "ranked lists" if candidates > 2 else "pairs"


def weight_sets(recipe: Recipe) -> str:
    """The sets held: with a LoRA one model and an adapter for each that moves. "current" is the policy itself."""
    reads = Preference.of(recipe.likelihood, recipe.objective, recipe.reference).reads
    names = [*reads, *filter(None, (getattr(recipe.source, "weights", None),))]
    if "reference" in names and recipe.reference.moves and recipe.reference.needs_origin:
        names.append("origin")
    held = [name for name in dict.fromkeys(names) if name != "current"]
    kept = getattr(recipe.reference, "keep", None)
    return f"{len(held)}: {', '.join(held)}{f' (one of {kept})' if kept else ''}"


def said_of(path: Path) -> tuple[str, list[str]]:
    """Name and arXiv ids from the comment below a recipe's command."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    text = " ".join(comment)
    name = re.split(r"[ ,]*\((?=[^)]*(?:arXiv|et al|note|reduction))|: |\. |\.$", text)[0]
    return name, list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text)))


def full_size(path: Path) -> str:
    """Recipes of the same name for published models."""
    others = [other for folder in ("sd15", "sdxl", "sd35") for other in sorted((path.parents[1] / folder).glob("*.yaml"))
              if other.stem.removesuffix("_lora") == path.stem]
    return " ".join(f"[{other.parent.name}{' LoRA' if other.stem.endswith('_lora') else ''}]"
                    f"(configs/{other.parent.name}/{other.name})" for other in others)


def results_of(out: Path) -> dict[str, str]:
    """Method -> score and win rate of its final runs, as far as the comparison has got."""
    if not (out / "plan.json").is_file() or not (out / "base" / "heldout.npz").is_file():
        return {}
    plan, base = json.loads((out / "plan.json").read_text()), Side.load(out / "base" / "heldout.npz")
    rows = (read_row(out / "final" / name / str(best(read_sweep(out, plan, name))), base) for name in plan["methods"])
    return {row.name: f"{s.aligned_score:.3f}; {s.win_rate:.2f} [{s.win_rate_low:.2f}, {s.win_rate_high:.2f}]"
            for row in rows if row is not None for s in (row.pooled.statistics,)}


def methods_table(out: Path, readme: Path, configs: Path = Path("configs")) -> str:
    """Replaces what lies between the markers in ``readme``: a row a recipe of configs/tiny. Returns the fragment."""
    results, candidates, groups = results_of(out), {}, {name: [] for name in GROUPS}
    for path in sorted((configs / "tiny").glob("*.yaml")):
        recipe = load_recipe(path)
        if recipe.data.path not in candidates:
            candidates[recipe.data.path] = len(next(data.read_rows(recipe.data, Tally())).images)
        k, (name, papers) = candidates[recipe.data.path], said_of(path)
        passes = passes_per_group(recipe, k)
        cells = [name, ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers), needed(recipe, k),
                 weight_sets(recipe), f"{passes:.3g}", f"[{path.stem}](configs/tiny/{path.name})", full_size(path),
                 *([results.get(path.stem, "")] if results else [])]
        groups[group_of(recipe, k)].append((path.stem != "dpo", name.lower(), f"| {' | '.join(cells)} |"))
    columns = ["method", "paper", "data", "weight sets", "passes", "recipe", "full size",
               *(["score; win rate [95 %]"] if results else [])]
    told = [METHODS, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, rows in groups.items():
        if rows:
            told += [f"| **{name}** |{' |' * (len(columns) - 1)}", *(row for *_, row in sorted(rows))]
    what = "Score and win rate are the embedded model's" if results else "What each gave on the embedded model"
    told += ["", "Passes: of the denoiser, for one group of pictures and step; forward 1, backward 2 more. With a LoRA the",
             f"weight sets are one model and small adapters. {what}: [docs/methods.md](docs/methods.md).",
             f"Made by `python scripts/compare_methods.py methods --out {out}`.", "", METHODS_END]
    fragment = "\n".join(told)
    put(readme, fragment, METHODS, METHODS_END)
    return fragment


# --- figures --------------------------------------------------------------------------------------------------------

def axes(columns: int, width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the figures need matplotlib: pip install 'diffalign[dev]'") from None
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    found = figure.subplots(1, columns, squeeze=False)[0]
    for ax in found:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK, labelsize=9)
    return figure, found


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the same runs give the same file


def figure_methods(rows: list[Row], path: Path) -> None:
    """A line a method, the best score on top: win rate and held-out accuracy with intervals, dots for single seeds."""
    figure, (left, right) = axes(2, 9, 1.2 + 0.28 * len(rows))
    for y, row in enumerate(reversed(rows)):
        s = row.pooled.statistics
        colour = {"better": BETTER, "worse": WORSE}.get(row.verdict, FAINT)
        left.plot([s.win_rate_low, s.win_rate_high], [y, y], color=colour, linewidth=2)
        left.plot([s.win_rate], [y], "o", color=colour, markersize=6)
        left.plot(row.pooled.win_rates, [y] * len(row.pooled.win_rates), "|", color=INK, markersize=7)
        right.plot(row.accuracy[1:], [y, y], color=INK, linewidth=2)
        right.plot([row.accuracy[0]], [y], "o", color=INK, markersize=6)
    for ax, title in ((left, "win rate against the base (bars: single seeds)"), (right, "held-out preference accuracy")):
        ax.axvline(0.5, color=FAINT, linewidth=1, linestyle="--")
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        ax.set_ylim(-0.7, len(rows) - 0.3)
    left.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    right.set_yticks([])
    save(figure, path)


def figure_noise(grid: dict[str, list[Row]], path: Path) -> None:
    """Gain in score over the base, with its interval over prompts, by the share of flipped pairs."""
    figure, (ax,) = axes(1, 6.4, 4)
    colours = ("#16181d", "#0a7d4f", "#2563eb", "#b45309", "#b42318", "#7c3aed", "#0891b2", "#6b7280")
    for number, (name, rows) in enumerate(grid.items()):
        stats = [row.pooled.statistics for row in rows]
        aside = 0.4 * (number - len(grid) / 2)  # so that the intervals can be told apart
        x = np.asarray([100 * float(row.label[4:]) for row in rows]) + aside
        y = np.asarray([s.difference for s in stats])
        spread = [y - [s.difference_low for s in stats], np.asarray([s.difference_high for s in stats]) - y]
        ax.errorbar(x, y, np.abs(spread), label=name, color=colours[number % len(colours)], marker="o", capsize=2)
    ax.axhline(0, color=FAINT, linewidth=1, linestyle="--")
    ax.set_xlabel("flipped training pairs, %", fontsize=9)
    ax.set_title("score above the base", fontsize=10, loc="left", color=INK)
    ax.legend(frameon=False, fontsize=9)
    save(figure, path)
