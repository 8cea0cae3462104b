"""Variance of the step's gradient on the embedded model: densities of the time, sequences, noise plans, draws in the link.

    python scripts/gradient_variance.py --out runs/gradient_variance [--docs docs/methods.md]

Call it from the repository root. A short run of the recipe makes policy and reference differ; then the gradient of one step
is taken again and again with other seeds: on the same pairs, so that only times and noise vary, and on pairs drawn anew.
OUT/measured.json is kept while the settings are the same; remove it to measure again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from diffalign import data, rng, run
from diffalign.cli import _quiet_libraries
from diffalign.config import as_tree, load_recipe
from diffalign.data.cache import Cache
from diffalign.errors import ConfigError, UserError
from diffalign.evaluate.files import write, write_json
from diffalign.likelihood import DenoisingELBO
from diffalign.methods import Context, Preference
from diffalign.models.load import encoder_facts, load_denoiser, load_encoders
from diffalign.models.weights import WeightBank
from diffalign.process import Antithetic, Geometric, Independent, LowDiscrepancy, Mixture, Stratified, Uniform
from diffalign.train.checkpoint import load, newest
from diffalign.types import Batch, Cond, Memory

BEGIN, END = "<!-- gradient variance -->", "<!-- end -->"
DRAWS = (2, 4, 8)
BASE, FRESH = "plain", "plain, new pairs"  # what the ratios of each kind are taken to


# --- what is measured -----------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Case:
    """parts: the pairs are cut into so many batches, one a repeat in turn, each with so many draws: the same passes.

    fresh: pairs drawn anew from the whole data set. redrawn: the reference has its own times and noise. share: repeats, in
    multiples of the usual number.
    """

    name: str
    estimator: DenoisingELBO
    fresh: bool = False
    redrawn: bool = False
    share: int = 1

    @property
    def parts(self) -> int:
        return self.estimator.draws


def cases(plain: DenoisingELBO, pairs: int) -> list[Case]:
    """The baselines get more repeats: every ratio rests on them. The mixture at mean -1.5 is ours, drawn to clean times."""
    stratified, draws = Stratified(strata=pairs), [n for n in DRAWS if pairs % n == 0]
    mixture, geometric, clean = Mixture(corrected=True), Geometric(corrected=True), Mixture(mean=-1.5, corrected=True)

    def case(name: str, **what) -> Case:
        own = {key: what.pop(key) for key in ("fresh", "redrawn", "share") if key in what}
        return Case(name=name, estimator=replace(plain, **what), **own)

    return [
        case(BASE, share=2),
        case("uniform, stratified", sequence=stratified),
        case("uniform, antithetic", sequence=Antithetic()),
        case("uniform, low_discrepancy", sequence=LowDiscrepancy()),
        case("mixture corrected, random", times=mixture),
        case("mixture corrected, stratified", times=mixture, sequence=stratified),
        case("mixture at clean times corrected, random", times=clean),
        case("mixture at clean times corrected, stratified", times=clean, sequence=stratified),
        case("geometric corrected, random", times=geometric),
        case("geometric corrected, stratified", times=geometric, sequence=stratified),
        case("independent noise in the pair", noise=Independent()),
        case("reference with draws of its own", redrawn=True),
        *(case(f"{n} draws, random", draws=n) for n in draws),
        *(case(f"{n} draws, stratified", draws=n, sequence=Stratified(strata=n)) for n in draws),
        case(FRESH, fresh=True, share=2),
        case("uniform, stratified, new pairs", sequence=stratified, fresh=True),
        case("uniform, low_discrepancy, new pairs", sequence=LowDiscrepancy(), fresh=True),
        *(case(f"{n} draws, random, new pairs", draws=n, fresh=True) for n in draws)]


@dataclass(frozen=True)
class Redrawn:
    """An estimator whose reference gets times and noise of its own: what never to do."""

    estimator: DenoisingELBO

    def __call__(self, batch: Batch, ctx: Context, against, anchor=None):
        def reference(_, *args):
            return ctx.predict("reference", *args)

        policy = self.estimator(batch, ctx, None)
        other = self.estimator(batch, replace(ctx, seed=rng.integer(ctx.seed, "redrawn"), predict=reference), None)
        return replace(policy, reference=other.policy.detach(), reference_error=other.error.detach())


@dataclass(frozen=True)
class Setting:
    """A trained policy beside its base, and the pairs."""

    recipe: object
    bank: WeightBank
    cache: Cache
    fixed: Batch

    def gradient(self, case: Case, batch: Batch, seed: int) -> tuple[Tensor, list[float]]:
        """The gradient of the step's mean loss as one vector, and the logit of each pair."""
        estimator = Redrawn(case.estimator) if case.redrawn else case.estimator
        denoiser = self.bank.denoiser
        ctx = Context(predict=self.bank.predict, process=denoiser.process, param=denoiser.param, seed=seed, step=0,
                      memory=Memory())
        loss = Preference(estimator, self.recipe.objective).loss(batch, ctx)
        found = torch.autograd.grad(loss.per_group.mean(), list(self.bank.trainable().values()))
        return torch.cat([part.flatten() for part in found]), loss.metrics["logit"].tolist()

    def pairs(self, case: Case, repeat: int, seed: int) -> tuple[Batch, int]:
        """The repeat's batch and its number among the parts."""
        size = self.fixed.groups // case.parts
        if case.fresh:
            return data.Offline(self.cache, seed=seed, train_batch_size=size, prefetch=False).take(0)[0], 0
        part = repeat % case.parts
        return cut(self.fixed, slice(part * size, (part + 1) * size)), part


def cut(batch: Batch, rows: slice) -> Batch:
    """Some groups of a batch, as a step of their own."""
    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    cond = Cond(tokens=of(batch.cond.tokens), pooled=of(batch.cond.pooled),
                extra={name: of(x) for name, x in batch.cond.extra.items()})
    one = Batch(x0=of(batch.x0), cond=cond, utility=of(batch.utility), valid=of(batch.valid), key=of(batch.key),
                soft=of(batch.soft))
    return replace(one, place=torch.arange(one.groups))


def prepare(recipe, pairs: int) -> Setting:
    """Trains the policy where ``output_dir`` has none yet."""
    folder = newest(Path(recipe.output_dir))[0] if Path(recipe.output_dir).is_dir() else None
    if folder is None:
        run.train(recipe, printer=print)
        folder = newest(Path(recipe.output_dir))[0]
    bank = WeightBank.build(load_denoiser(recipe.model), recipe.model.lora, reads=("policy", "reference"), seed=recipe.seed)
    bank.load_state(load(folder).tensors["weights"])
    facts = encoder_facts(recipe.model)
    report = data.encode(recipe.data, lambda: load_encoders(recipe.model), cache_dir=Path(recipe.data.cache_dir), facts=facts,
                         resolution=recipe.data.resolution or facts.default_resolution, seed=recipe.seed, progress=False)
    cache = data.Cache(report.manifest)
    if len(cache) < pairs:
        raise ConfigError(f"--pairs {pairs}: {recipe.data.path} has only {len(cache)}")
    return Setting(recipe, bank, cache, data.fixed_batches(cache, pairs, seed=recipe.seed)[0])


# --- moments --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Sample:
    """Repeats of one case. gram: [R, R] inner products of the gradients; cross: [R, R0] with those of the baseline; part: [R];
    logits: [R, pairs], NaN for pairs that the repeat had not. All repeats are independent of each other, also across cases."""

    gram: np.ndarray
    cross: np.ndarray
    part: np.ndarray
    logits: np.ndarray

    def without(self, i: int) -> Sample:
        keep = np.arange(len(self.part)) != i
        return Sample(gram=self.gram[keep][:, keep], cross=self.cross[keep], part=self.part[keep], logits=self.logits[keep])

    @property
    def weights(self) -> np.ndarray:
        """[R]: parts count alike, also after one repeat was left out."""
        parts, number, count = np.unique(self.part, return_inverse=True, return_counts=True)
        return 1 / (len(parts) * count[number])

    def trace(self) -> float:
        """Trace of the covariance of a step's gradient at fixed pairs, mean over the parts; unbiased."""
        traces = []
        for part in np.unique(self.part):
            gram = self.gram[self.part == part][:, self.part == part]
            traces.append((np.trace(gram) - gram.sum() / len(gram)) / (len(gram) - 1))
        return float(np.mean(traces))

    def logit(self) -> float:
        """Variance of a pair's logit, mean over the pairs."""
        rows = [self.logits[self.part == part] for part in np.unique(self.part)]
        return float(np.nanmean(np.concatenate([np.nanvar(row[:, ~np.isnan(row).any(0)], axis=0, ddof=1) for row in rows])))

    def square(self) -> float:
        """Squared length of the expected gradient over all parts: products of different repeats only, so unbiased."""
        weights, total = self.weights, 0.0
        parts = np.unique(self.part)
        for part in parts:
            gram = self.gram[self.part == part][:, self.part == part]
            total += (gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1)) / len(parts)**2
        apart = self.part[:, None] != self.part[None]
        return float(total + (np.outer(weights, weights) * self.gram * apart).sum())


def jackknife(sample: Sample, statistic: Callable[[Sample], float]) -> float:
    """Variance of a statistic, by leaving out one repeat at a time inside each part. NaN where that leaves no variance."""
    if np.unique(sample.part, return_counts=True)[1].min() < 3:
        return float("nan")
    left = np.asarray([statistic(sample.without(i)) for i in range(len(sample.part))])
    total = 0.0
    for part in np.unique(sample.part):
        values = left[sample.part == part]
        total += (len(values) - 1) / len(values) * ((values - values.mean())**2).sum()
    return total


def ratio(sample: Sample, base: Sample, statistic: Callable[[Sample], float]) -> list[float | None]:
    """[ratio, low, high] to the baseline, 95 %: the logarithms' jackknife, as variances are skew. None: too few repeats."""
    if sample is base:
        return [1.0, 1.0, 1.0]
    value = np.log(statistic(sample) / statistic(base))
    error = np.sqrt(sum(jackknife(s, lambda x: float(np.log(statistic(x)))) for s in (sample, base)))
    freedom = max(1, len(sample.part) - len(np.unique(sample.part)))
    spread = error * student.ppf(0.975, freedom)
    return [finite(np.exp(x)) for x in (value, value - spread, value + spread)]


def finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def agreement(sample: Sample, base: Sample) -> dict:
    """Cosine of the two expected gradients with its standard error, and their lengths' ratio with interval; noise is not part
    of either. None where noise hides them. An estimate: noise may carry a cosine above 1.
    """
    def of(sample: Sample, inner: np.ndarray, base_square: float) -> float:
        squares = sample.square() * base_square
        return float((sample.weights @ inner).mean() / np.sqrt(squares)) if squares > 0 else float("nan")

    square = base.square()
    own = jackknife(sample, lambda x: of(x, x.cross, square))
    others = []
    for i in range(len(base.part)):  # the baseline has one part
        keep = np.arange(len(base.part)) != i
        others.append(of(sample, sample.cross[:, keep], base.without(i).square()))
    error = np.sqrt(own + (len(others) - 1) * np.var(others))
    with np.errstate(invalid="ignore"):  # an estimate of a square may be negative
        lengths = ratio(sample, base, Sample.square)
    return {"cosine": finite(of(sample, sample.cross, square)), "cosine_error": finite(error),
            "length": [None if x is None else x**0.5 for x in lengths]}


# --- measuring ------------------------------------------------------------------------------------------------------

def gradients(setting: Setting, case: Case, repeats: int, number: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """[R, parameters] gradients, [R] parts and [R, pairs] logits. Every part gets at least three repeats, all as many."""
    rounds = max(3 if case.parts > 1 else 2, round(repeats * case.share / case.parts)) if not case.fresh else 0
    count = rounds * case.parts or repeats * case.share
    logits, found, parts = np.full((count, setting.fixed.groups), np.nan), [], []
    for repeat in range(count):
        seed = rng.integer(setting.recipe.seed, "gradient variance", number, repeat)
        batch, part = setting.pairs(case, repeat, seed)
        vector, logit = setting.gradient(case, batch, seed)
        if len(logit) != batch.groups:
            raise ConfigError("the objective compares a part of the pairs only; a pairwise one is needed")
        found.append(vector)
        parts.append(part)
        logits[repeat, part * batch.groups:(part + 1) * batch.groups] = logit
    return torch.stack(found), np.asarray(parts), logits


def measure(setting: Setting, repeats: int) -> Iterator[dict]:
    """One case after another, each with the figures beside its baseline. Says what it does, as it takes minutes."""
    bases: dict[bool, tuple[Tensor, Sample]] = {}  # by whether pairs are drawn anew
    for number, case in enumerate(cases(setting.recipe.likelihood, setting.fixed.groups)):
        vectors, part, logits = gradients(setting, case, repeats, number)
        base_vectors = bases[case.fresh][0] if case.fresh in bases else vectors
        sample = Sample(gram=(vectors @ vectors.T).double().numpy(), cross=(vectors @ base_vectors.T).double().numpy(),
                        part=part, logits=logits)
        base = bases.setdefault(case.fresh, (vectors, sample))[1]
        row = {"name": case.name, "fresh": case.fresh, "draws": case.parts, "repeats": len(part), "trace": sample.trace(),
               "square": sample.square(), "ratio": ratio(sample, base, Sample.trace), "logit_variance": sample.logit(),
               "logit_ratio": ratio(sample, base, Sample.logit)}
        if sample is base:
            row |= {"cosine": 1.0, "cosine_error": 0.0, "length": [1.0, 1.0, 1.0],
                    "to_fixed": ratio(sample, bases[False][1], Sample.trace)}
        else:
            row |= agreement(sample, base)
        print(f"{case.name}: {interval(row['ratio'])}", flush=True)
        yield row


def by_time(setting: Setting, repeats: int) -> list[float]:
    """Root mean square length of a single pair's gradient, by fifth of the time, clean first."""
    found = []
    for fifth in range(5):
        estimator = replace(setting.recipe.likelihood, times=Uniform(low=fifth / 5, high=(fifth + 1) / 5))
        squares = []
        for row in range(setting.fixed.groups):
            for repeat in range(repeats):
                seed = rng.integer(setting.recipe.seed, "by time", fifth, repeat)
                one = cut(setting.fixed, slice(row, row + 1))
                squares.append(float(setting.gradient(Case(name="", estimator=estimator), one, seed)[0].square().sum()))
        found.append(float(np.sqrt(np.mean(squares))))
    return found


def measured(recipe, out: Path, repeats: int, pairs: int) -> dict:
    """From OUT/measured.json where it holds the same settings, else anew."""
    tree = {key: value for key, value in as_tree(recipe).items() if key not in ("output_dir", "evaluate")}
    settings = json.loads(json.dumps({"repeats": repeats, "pairs": pairs, "recipe": tree}, default=str))
    path = out / "measured.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            print(f"{path}: kept")
            return known
    setting = prepare(recipe, pairs)
    result = {"settings": settings, "groups": len(setting.cache), "by_time": by_time(setting, min(4, repeats)),
              "rows": list(measure(setting, repeats))}
    write_json(path, result)
    return result


# --- words ----------------------------------------------------------------------------------------------------------

def interval(given: list[float | None], share: int = 1) -> str:
    """share: what the figures are divided by. A hundred times the baseline needs no decimals."""
    if given == [1.0, 1.0, 1.0]:
        return "1"
    form = ".2f" if (given[0] or 0) / share < 10 else ",.0f"
    value, low, high = ("?" if x is None else f"{x / share:{form}}" for x in given)
    return f"{value} [{low}, {high}]"


def mean_of(row: dict) -> str:
    if row["cosine_error"] == 0:
        return "1 | 1"
    cosine, error = ("?" if row[key] is None else f"{row[key]:.2f}" for key in ("cosine", "cosine_error"))
    return f"{cosine} +- {error} | {interval(row['length'])}"


def names(rows: list[dict]) -> str:
    return "; ".join(row["name"].removesuffix(", new pairs") for row in rows) or "none"


def verdicts(rows: list[dict]) -> str:
    """What the intervals say, no more."""
    known = [r for r in rows if None not in r["ratio"]]
    low, high = ([r for r in known if r["ratio"][2] < 1], [r for r in known if r["ratio"][1] > 1])
    level = [r for r in rows if r not in low and r not in high and r["ratio"] != [1.0, 1.0, 1.0]]
    return f"lower: {names(low)}. **Did not help**, higher: {names(high)}; no difference shown: {names(level)}."


def fragment(result: dict, command: str) -> str:
    rows, settings = result["rows"], result["settings"]
    pairs = settings["pairs"]
    one = [row for row in rows if not row["fresh"] and row["draws"] == 1]
    several = [row for row in rows if not row["fresh"] and row["draws"] > 1]
    fresh = [row for row in rows if row["fresh"]]
    base, noise = one[0], one[0]["trace"] / one[0]["square"]
    against = "cannot be told from" if noise <= 0 else f"is {noise:.1f} times"
    head, logit = "gradient variance [95 %]", "logit variance [95 %]"
    told = [
        BEGIN, "", f"Made by `{command}`: {settings['repeats']} repeats a row ({base['repeats']} of the plain steps), "
        f"{pairs} of {result['groups']} pairs, beta {settings['recipe']['objective']['beta']:g}, after "
        f"{settings['recipe']['train']['max_train_steps']} steps of training.", "",
        f"**The same {pairs} pairs in every repeat, one draw.** Plain: uniform random times, noise shared in the pair.", "",
        f"| step | {head} | {logit} | cosine of the mean gradients | their lengths [95 %] |", "|---|---|---|---|---|",
        *(f"| {row['name']} | {interval(row['ratio'])} | {interval(row['logit_ratio'])} | {mean_of(row)} |" for row in one),
        "", f"**Draws averaged inside the link**, against the plain step. Equal passes: n draws on {pairs}/n of these pairs; "
        f"equal pairs: on all {pairs}, for n times the passes (1/n of the variance, as pairs draw independently).", "",
        f"| step | equal passes: {head} | equal pairs | {logit} | cosine | lengths [95 %] |", "|---|---|---|---|---|---|",
        *(f"| {row['name']} | {interval(row['ratio'])} | {interval(row['ratio'], row['draws'])} "
          f"| {interval(row['logit_ratio'])} | {mean_of(row)} |" for row in several),
        "", "**New pairs in every repeat**, as in training, at equal passes: what is left when the choice of pairs counts.",
        "",
        f"| step | {head} |", "|---|---|", *(f"| {row['name']} | {interval(row['ratio'])} |" for row in fresh), "",
        f"- The variance of the plain step {against} the squared length of its mean gradient. On new pairs it is "
        f"{interval(fresh[0]['to_fixed'])} times that on these {pairs}.",
        "- Length (root mean square) of one pair's gradient by fifth of the time, clean first: "
        f"{', '.join(f'{x:.1f}' for x in result['by_time'])}. Few draws, those near the clean end, rule the variance: "
        "hence the wide intervals.",
        f"- Fixed pairs, one draw: {verdicts(one)}", f"- Draws, fixed pairs, equal passes: {verdicts(several)}",
        f"- New pairs, equal passes: {verdicts(fresh)}",
        f"- Of {len(rows) - 2} intervals one or two leave out 1 by chance alone.", "", END]
    return "\n".join(told)


def write_docs(docs: Path, text: str) -> None:
    """Replaces what lies between the markers."""
    old = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    start = old.find(BEGIN)
    end = old.find(END, start)
    if old.count(BEGIN) != 1 or end < 0:
        raise ConfigError(f"{docs}: needs the lines '{BEGIN}' and '{END}' around the place of the table")
    write(docs, (old[:start] + text + old[end + len(END):]).encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/embedded.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/gradient_variance"))
    parser.add_argument("--steps", type=int, default=30, help="of training before anything is measured")
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args(argv)
    command = "python scripts/gradient_variance.py" + "".join(
        f" --{name} {getattr(args, name)}" for name in ("config", "out", "steps", "repeats", "pairs", "docs")
        if getattr(args, name) != parser.get_default(name))
    try:
        _quiet_libraries()
        if args.repeats < 2 or args.pairs < 2:
            raise ConfigError("--repeats and --pairs: at least 2 each, a variance needs them")
        recipe = load_recipe(args.config, [
            f"output_dir={json.dumps(str(args.out / 'policy'))}", f"data.cache_dir={json.dumps(str(args.out / 'cache'))}",
            "data.validation=null", "train.validation_steps=0", f"train.max_train_steps={args.steps}"])
        text = fragment(measured(recipe, args.out, args.repeats, args.pairs), command)
        print(text)
        if args.docs:
            write_docs(args.docs, text)
        return 0
    except UserError as error:
        print(f"gradient_variance: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
