"""Bias and variance of the masked-text estimators against the exact bound, and of the gradient that they give.

    python scripts/text_variance.py configs/text/tiny_vrpo.yaml [key=value ...] --out runs/text_variance
        [--docs docs/text_and_music.md --figure assets/figures/text_variance.png]

Call it from the repository root after the recipe's run: its newest checkpoint is the policy, its base the reference. For a
few held-out pairs every mask of both answers is tried once (2^L - 1 of them, L tokens), which gives the exact bounds, and with
them the exact margin and loss; then the estimator is asked again and again with other keys. The gradient is measured on pairs
of the training data with the model itself. OUT/measured.json is kept while the settings are the same; remove it to measure
again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gradient_variance import Redrawn, cut, write_docs
from text_accuracy import bank_of
from torch import Tensor

from diffalign import data, rng
from diffalign.cli import _quiet_libraries
from diffalign.config import as_tree, load_recipe
from diffalign.data.text import Texts
from diffalign.errors import ConfigError, UserError
from diffalign.evaluate.files import write_json
from diffalign.likelihood import MaskedELBO
from diffalign.methods import Context, Preference
from diffalign.models.masked_lm import load_tokens
from diffalign.models.weights import WeightBank
from diffalign.process import LowDiscrepancy, Stratified
from diffalign.types import Batch, Cond, Memory

BUDGETS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """redrawn: the reference has times and masks of its own. plot: its line in the figure, or None."""

    name: str
    estimator: MaskedELBO
    redrawn: bool = False
    plot: str | None = None


def cases() -> list[Case]:
    """n draws as n times with a mask each, as one time with n masks, with an unshared reference; then other choices at 8."""
    allocations = [Case(name=f"n = {n}: {n // m} times x {m} masks", plot=line,
                        estimator=MaskedELBO(draws=n, masks_per_time=m))
                   for n in BUDGETS for line, m in _allocations(n)]
    unshared = [Case(name=f"n = {n}, reference with draws of its own", redrawn=True, plot="reference unshared",
                     estimator=MaskedELBO(draws=n)) for n in BUDGETS]
    eight = MaskedELBO(draws=8)
    return [*allocations, *unshared,
            Case(name="n = 8, stratified times", estimator=replace(eight, sequence=Stratified(strata=8))),
            Case(name="n = 8, low_discrepancy times", estimator=replace(eight, sequence=LowDiscrepancy())),
            Case(name="n = 8, times shared in the pair", estimator=replace(eight, share_times=True)),
            Case(name="n = 8, stratified and shared in the pair",
                 estimator=replace(eight, sequence=Stratified(strata=8), share_times=True)),
            Case(name="n = 8, form time", estimator=replace(eight, form="time"))]


def _allocations(n: int) -> list[tuple[str | None, int]]:
    if n == 1:
        return [("n times, one mask each (VRPO)", 1)]
    middle = [(None, 2)] if n >= 4 else []
    return [("n times, one mask each (VRPO)", 1), *middle, ("one time, n masks", n)]


# --- exact values ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Answer:
    """Every mask of one answer: [2^L, L] float64 log-probabilities of its masked tokens (0 elsewhere), by weight set. A mask
    is a row's number in binary, first token lowest."""

    logp: dict[str, Tensor]

    @property
    def length(self) -> int:
        return next(iter(self.logp.values())).shape[1]

    def bound(self, name: str) -> float:
        """The exact bound: mean over l of the mean over masks of l tokens of L/l times their log-probabilities."""
        masks = torch.arange(1, 2**self.length)
        count = sum((masks >> i) & 1 for i in range(self.length))
        value = self.logp[name][1:].sum(1) * self.length / count
        return float(torch.stack([value[count == l].mean() for l in range(1, self.length + 1)]).mean())


@torch.no_grad()
def enumerate_masks(bank: WeightBank, batch: Batch, candidate: int) -> Answer:
    """batch: one group."""
    row, extra = batch.x0[0, candidate], {name: x[0, candidate] for name, x in batch.cond.extra.items()}
    places = extra["answer"].nonzero()[:, 0]
    count, mask_id = len(places), bank.denoiser.process.mask_id
    masks = (torch.arange(2**count)[:, None] >> torch.arange(count)) & 1
    found = {}
    for name in ("current", "origin"):
        table = torch.zeros(2**count, count, dtype=torch.float64)
        for part in torch.arange(1, 2**count).split(1024):
            chosen = masks[part].bool()
            xt = row.repeat(len(part), 1)
            xt[:, places] = torch.where(chosen, mask_id, xt[:, places])
            cond = Cond(extra={"attended": extra["attended"].expand(len(part), -1)})
            logits = bank.predict(name, xt, torch.ones(len(part)), cond).double()
            truth = row[places].expand(len(part), -1)[chosen]
            table[part] = table[part].masked_scatter(chosen, -F.cross_entropy(logits, truth, reduction="none"))
        found[name] = table
    return Answer(found)


class Table:
    """``predict`` of a group's enumerated answers: two-word logits that give the true word its log-probability."""

    def __init__(self, batch: Batch, answers: list[Answer], mask_id: int):
        self.answers, self.mask_id, self.k = answers, mask_id, batch.k
        self.places = [batch.cond.extra["answer"][0, c].nonzero()[:, 0] for c in range(batch.k)]
        self.words = int(batch.x0.max()) + 2  # the last one is no word of an answer
        self.truth = batch.x0[0]

    def __call__(self, name: str, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        masked = xt == self.mask_id
        logp = torch.zeros(xt.shape, dtype=torch.float64)
        for c, places in enumerate(self.places):
            rows = torch.arange(c, len(xt), self.k)
            index = (masked[rows][:, places].long() << torch.arange(len(places))).sum(1)
            table = self.answers[c].logp["origin" if name == "reference" else "current"]
            logp[rows[:, None], places] = table[index]
        p = logp[masked].clamp(max=-1e-12)
        word = self.truth.repeat(len(xt) // self.k, 1)[masked]
        logits = torch.full((len(p), self.words), -torch.inf, dtype=torch.float64)
        logits[:, -1] = torch.log(-torch.expm1(p))
        return logits.scatter(1, word[:, None], p[:, None])


def exact(bank: WeightBank, texts: Texts, pairs: int, repeats: int, beta: float, seed: int) -> list[dict]:
    """Per case: variance of the margin's logit, bias and variance of the loss; means over the pairs with the spread of those
    means' errors."""
    batches = data.fixed_batches(texts, 1, seed=seed)[:pairs]
    known = [(batch, [enumerate_masks(bank, batch, c) for c in range(2)]) for batch in batches]
    return [_against_exact(case, known, bank.denoiser.process, repeats, beta, seed) for case in cases()]


def _against_exact(case: Case, known: list, process, repeats: int, beta: float, seed: int) -> dict:
    rows = []
    for batch, answers in known:
        true = beta * sum(sign * (answer.bound("current") - answer.bound("origin"))
                          for sign, answer in zip((1, -1), answers, strict=True))
        logit = _logits(case, batch, answers, process, repeats, beta, seed)
        loss, at = F.softplus(-logit), math.log1p(math.exp(-true))
        rows.append({"margin": true, "mean": float(logit.mean()), "variance": float(logit.var()),
                     "bias": float(loss.mean()) - at, "error": float(loss.std()) / math.sqrt(repeats),
                     "spread": float(loss.var())})
    mean = {name: float(np.mean([row[name] for row in rows])) for name in ("variance", "bias", "spread")}
    off = [(row["mean"] - row["margin"]) / math.sqrt(row["variance"] / repeats) for row in rows if row["variance"] > 0]
    return {"name": case.name, "plot": case.plot, "draws": case.estimator.draws, **mean,
            "bias_error": float(np.sqrt(np.sum([row["error"]**2 for row in rows])) / len(rows)),
            "bound": float(np.mean([math.sqrt(row["variance"]) for row in rows])), "pairs": rows,
            "largest_z": float(np.max(np.abs(off))) if off else 0.0}


def _logits(case: Case, batch: Batch, answers: list[Answer], process, repeats: int, beta: float, seed: int) -> Tensor:
    """[repeats] estimates of beta times the margin, from groups that are copies of one with keys of their own."""
    def many(x: Tensor) -> Tensor:
        return x.repeat(repeats, *[1] * (x.dim() - 1))

    key = torch.stack([torch.arange(repeats), torch.full((repeats,), int(batch.key[0, 0]))], 1)
    copies = replace(batch, x0=many(batch.x0), cond=Cond(extra={name: many(x) for name, x in batch.cond.extra.items()}),
                     utility=many(batch.utility), valid=many(batch.valid), key=key, place=torch.arange(repeats))
    ctx = Context(predict=Table(batch, answers, process.mask_id), process=process, param=None, seed=seed, step=0,
                  memory=Memory())
    estimator = Redrawn(case.estimator) if case.redrawn else case.estimator
    ratio = estimator(copies, ctx, "reference").log_ratio.double()
    return beta * (ratio[:, 0] - ratio[:, 1])


# --- gradients ------------------------------------------------------------------------------------------------------

def gradients(recipe, bank: WeightBank, texts: Texts, pairs: int, repeats: int) -> list[dict]:
    """Trace of the covariance of a step's gradient at fixed pairs, and the variance of a pair's logit; ratios to n = 1 with
    95 % intervals from the repeats."""
    batch, found = cut(data.fixed_batches(texts, pairs, seed=recipe.seed)[0], slice(0, pairs)), []
    eight = MaskedELBO(draws=8)
    wanted = [("n = 1", MaskedELBO(draws=1), False), *((f"n = {n}", MaskedELBO(draws=n), False) for n in (2, 4, 8)),
              ("n = 8 as one time x 8 masks", replace(eight, masks_per_time=8), False),
              ("n = 8, stratified times", replace(eight, sequence=Stratified(strata=8)), False),
              ("n = 8, times shared in the pair", replace(eight, share_times=True), False),
              ("n = 1, reference with draws of its own", MaskedELBO(draws=1), True),
              ("n = 8, reference with draws of its own", eight, True)]
    for name, estimator, redrawn in wanted:
        method = Preference(Redrawn(estimator) if redrawn else estimator, recipe.objective)
        rows, logits = zip(*(_gradient(method, bank, batch, rng.integer(recipe.seed, "repeat", i)) for i in range(repeats)),
                           strict=True)
        found.append({"name": name, "draws": estimator.draws, "rows": torch.stack(rows), "logits": torch.stack(logits)})
        print(f"gradient, {name}: done", flush=True)
    base = found[0]
    return [{"name": row["name"], "draws": row["draws"], "gradient": _ratio(_distances(row["rows"]), _distances(base["rows"])),
             "logit": _ratio(_distances(row["logits"]), _distances(base["logits"]))} for row in found]


def _gradient(method: Preference, bank: WeightBank, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    def predict(name, *args):
        return bank.predict("origin" if name == "reference" else name, *args)

    ctx = Context(predict=predict, process=bank.denoiser.process, param=None, seed=seed, step=0, memory=Memory())
    loss = method.loss(batch, ctx)
    parts = torch.autograd.grad(loss.per_group.mean(), list(bank.trainable().values()))
    return torch.cat([part.flatten() for part in parts]), loss.metrics["logit"]


def _distances(rows: Tensor) -> np.ndarray:
    """[R/2] half squared distances of independent repeats: each has the trace of the covariance as its mean."""
    return ((rows[::2] - rows[1::2]).double().square().sum(1) / 2).numpy()


def _ratio(values: np.ndarray, base: np.ndarray, resamples: int = 4000) -> list[float]:
    """Ratio of means with a 95 % bootstrap interval."""
    random = rng.generator(0, "ratio")
    drawn = [x[random.integers(len(x), size=(resamples, len(x)))].mean(1) for x in (values, base)]
    return [float(values.mean() / base.mean()), *np.quantile(drawn[0] / drawn[1], (0.025, 0.975)).tolist()]


# --- words and picture ----------------------------------------------------------------------------------------------

def figure(result: dict, path: Path) -> None:
    """Left: the variance of the logit by budget. Right: the bias of the loss, and the bound sqrt(variance) of Theorem 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    rows = result["exact"]
    for line in dict.fromkeys(row["plot"] for row in rows if row["plot"]):
        own = [row for row in rows if row["plot"] == line]
        if line != "n times, one mask each (VRPO)":  # one draw is the same however it is cut up
            own = [row for row in rows if row["draws"] == 1 and row["plot"] != "reference unshared"] * ("time," in line) + own
        left.plot([row["draws"] for row in own], [row["variance"] for row in own], "o-", label=line)
    left.plot(BUDGETS, [rows[0]["variance"] / n for n in BUDGETS], "k:", label="1/n")
    left.set(xscale="log", yscale="log", xlabel="draws n", ylabel="variance of the logit", xticks=BUDGETS,
             xticklabels=BUDGETS)
    left.legend(fontsize=8)
    right.errorbar([row["variance"] for row in rows], [row["bias"] for row in rows],
                   yerr=[2 * row["bias_error"] for row in rows], fmt="o", label="bias of the loss")
    ends = sorted((min(row["variance"] for row in rows), max(row["variance"] for row in rows)))
    line = np.geomspace(*ends, 50)
    right.plot(line, np.sqrt(line), "k:", label="Theorem 1: sqrt(variance)")
    right.plot(line, line / 8, "k--", label="variance / 8")
    right.set(xscale="log", yscale="log", xlabel="variance of the logit", ylabel="nats")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)


def interval(value: list[float]) -> str:
    return "1" if value == [1.0, 1.0, 1.0] else "{:.2f} [{:.2f}, {:.2f}]".format(*value)


def fragment(result: dict, command: str) -> str:
    settings = result["settings"]
    rows = [f"| {row['name']} | {row['variance']:.3g} | {row['bias']:.2g} +- {2 * row['bias_error']:.1g} "
            f"| {row['bound']:.2g} | {row['spread']:.2g} |" for row in result["exact"]]
    steps = [f"| {row['name']} | {interval(row['gradient'])} | {interval([x * row['draws'] for x in row['gradient']])} | "
             f"{interval(row['logit'])} |" for row in result["gradients"]]
    z = max(row["largest_z"] for row in result["exact"])
    return "\n".join([
        "<!-- gradient variance -->", "",
        f"Made by `{command}`: {settings['pairs']} held-out pairs, {settings['repeats']} repeats a row, "
        f"beta {settings['beta']:g}.", "",
        "**Against the exact bound.** Means over the pairs. Bias of the loss with twice its standard error; the third figure "
        "is Theorem 1's bound on it.", "",
        "| estimate | variance of the logit | bias of the loss | sqrt of the variance | variance of the loss |",
        "|---|---|---|---|---|", *rows, "",
        f"Every mean margin lies within {z:.1f} standard errors of the exact one ({len(rows)} x {settings['pairs']} means).",
        "", f"**The gradient**, {settings['gradient_pairs']} training pairs, {settings['gradient_repeats']} repeats a row, "
        "against one draw a pair [95 %].", "",
        "| step | gradient variance | times n: at equal passes | logit variance |", "|---|---|---|---|", *steps, "",
        "<!-- end -->"])


def measured(recipe, out: Path, args: argparse.Namespace) -> dict:
    beta = recipe.objective.beta
    settings = {"recipe": as_tree(recipe), "pairs": args.pairs, "repeats": args.repeats, "beta": beta,
                "gradient_pairs": args.gradient_pairs, "gradient_repeats": args.gradient_repeats}
    path = out / "measured.json"
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        print(f"{path}: kept")
        return known
    bank, tokens = bank_of(recipe), load_tokens(recipe.model, chat=recipe.data.chat_template)
    held = data.read_texts(recipe.data, tokens, part="validation", seed=recipe.seed)
    result = {"settings": settings,
              "exact": exact(bank, held, args.pairs, args.repeats, beta, recipe.seed),
              "gradients": gradients(recipe, bank, data.read_texts(recipe.data, tokens, seed=recipe.seed), args.gradient_pairs,
                                     args.gradient_repeats)}
    write_json(path, result)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/text_variance"))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--gradient-pairs", type=int, default=16)
    parser.add_argument("--gradient-repeats", type=int, default=64)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args(argv)
    command = " ".join(["python scripts/text_variance.py", args.config, *args.overrides])
    try:
        _quiet_libraries()
        if args.repeats < 2 or args.gradient_repeats < 4 or args.gradient_repeats % 2:
            raise ConfigError("--repeats and --gradient-repeats: at least 2 and an even 4, a variance needs them")
        result = measured(load_recipe(args.config, args.overrides), args.out, args)
        text = fragment(result, command)
        print(text)
        if args.figure:
            figure(result, args.figure)
        if args.docs:
            write_docs(args.docs, text)
        return 0
    except UserError as error:
        print(f"text_variance: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
