"""Bias and variance of the masked-text estimators against exact values, and the variance of the gradient that they give.

    python scripts/text_variance.py configs/text/tiny_vrpo.yaml [key=value ...] --out runs/text_variance
        [--docs docs/text_and_music.md --figure assets/figures/text_variance.png]

Call it from the repository root after the recipe's run. Exact values come from every mask of both answers of a pair, tried
once (2^L - 1 of them, L tokens); then the estimator is asked again and again with other keys. Two kinds of models: Markov
chains, whose conditional probabilities are exact, so that the bound is the log-likelihood itself; and the run's newest
checkpoint (the policy) beside its base (the reference). The gradient is measured with that model on pairs of its training
data. OUT/measured.json is kept while the settings are the same; remove it to measure again.
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
from gradient_variance import BEGIN, END, Redrawn, cut, write_docs
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
from diffalign.process import LowDiscrepancy, Masking, Random, Stratified
from diffalign.types import Batch, Cond, Memory

BUDGETS = (1, 2, 4, 8, 16)
CHAIN_BETA = 1.0  # of the chains' margins, which are a few nats


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
    unshared += [Case(name="n = 8 as one time x 8 masks, reference with draws of its own", redrawn=True,
                      estimator=MaskedELBO(draws=8, masks_per_time=8))]
    eight = MaskedELBO(draws=8)
    return [*allocations, *unshared,
            Case(name="n = 8, stratified times", estimator=replace(eight, sequence=Stratified(strata=8))),
            Case(name="n = 8, low_discrepancy times", estimator=replace(eight, sequence=LowDiscrepancy())),
            Case(name="n = 8, times shared in the pair", estimator=replace(eight, share_times=True)),
            Case(name="n = 8, stratified and shared in the pair",
                 estimator=replace(eight, sequence=Stratified(strata=8), share_times=True)),
            Case(name="n = 8, form time", estimator=replace(eight, form="time"))]


def _allocations(n: int) -> list[tuple[str | None, int]]:
    middle = [(None, 2)] if n >= 4 else []
    return [("n times, one mask each (VRPO)", 1), *middle, *([("one time, n masks", n)] if n > 1 else [])]


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
        return float(torch.stack([value.mean() for value in self._by_count(self.logp[name])]).mean())

    def variances(self, logp: Tensor) -> tuple[float, float]:
        """Lemma 5's V_t and V_y of one draw: between the l, and inside of them. logp: [2^L, L]."""
        values = self._by_count(logp)
        means, inside = (torch.stack([f(value) for value in values]) for f in (torch.mean, lambda x: x.var(correction=0)))
        return float(means.var(correction=0)), float(inside.mean())

    def _by_count(self, logp: Tensor) -> list[Tensor]:
        """A draw's values, by the number l of masked tokens."""
        masks = torch.arange(1, 2**self.length)
        count = sum((masks >> i) & 1 for i in range(self.length))
        value = logp[1:].sum(1) * self.length / count
        return [value[count == l] for l in range(1, self.length + 1)]


Pair = tuple[Batch, list[Answer]]  # a batch of one group, and its two answers


def chain_answer(answer: Tensor, chains: dict[str, Tensor]) -> Answer:
    """answer: [L] words; chains: log-probabilities [V]*L of every sequence, by weight set. Exact conditionals of each word of
    the answer given those that are not masked.
    """
    length, found = len(answer), {}
    for name, joint in chains.items():
        table = torch.zeros(2**length, length, dtype=torch.float64)
        for mask in range(1, 2**length):
            hidden = [i for i in range(length) if mask >> i & 1]
            seen = joint[tuple(slice(None) if i in hidden else answer[i] for i in range(length))]  # [V] * hidden
            for axis, i in enumerate(hidden):
                marginal = seen.movedim(axis, 0).reshape(len(seen), -1).logsumexp(1).log_softmax(0)
                table[mask, i] = marginal[answer[i]]
        found[name] = table
    return Answer(found)


def chain(words: int, length: int, start: Tensor, step: Tensor) -> Tensor:
    """Log-probabilities [V]*L of a first-order Markov chain with the logits start [V] and step [V, V]."""
    joint, step = start.log_softmax(0), step.log_softmax(1)
    for _ in range(length - 1):
        joint = joint[..., None] + step.view(*[1] * (joint.dim() - 1), words, words)
    return joint


def chain_pairs(pairs: int, seed: int, words: int = 4, length: int = 6) -> list[Pair]:
    """Pairs of sequences that a strongly coupled chain draws; the policy's logits are the reference's plus normal / 2."""
    draw, known = torch.Generator().manual_seed(seed), []

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    for number in range(pairs):
        start, step = normal(words), 2 * normal(words, words)
        origin = chain(words, length, start, step)
        policy = chain(words, length, start + normal(words) / 2, step + normal(words, words) / 2)
        drawn = torch.multinomial(origin.flatten().exp(), 2, generator=draw)
        answers = torch.stack(torch.unravel_index(drawn, origin.shape), 1)  # [2, L]
        everywhere = torch.ones(1, 2, length, dtype=torch.bool)
        batch = Batch(x0=answers[None] + 1, cond=Cond(extra={"answer": everywhere, "attended": everywhere}),
                      utility=torch.tensor([[1.0, 0.0]]), valid=torch.ones(1, 2, dtype=torch.bool),
                      key=torch.tensor([[number, 0]]))  # 0 is the mask
        known.append((batch, [chain_answer(answer, {"current": policy, "origin": origin}) for answer in answers]))
    return known


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


def model_pairs(bank: WeightBank, texts: Texts, pairs: int, seed: int) -> list[Pair]:
    return [(batch, [enumerate_masks(bank, batch, c) for c in range(2)])
            for batch in data.fixed_batches(texts, 1, seed=seed)[:pairs]]


def exact(known: list[Pair], mask_id: int, repeats: int, beta: float, seed: int) -> list[dict]:
    """Per case: variance of the margin's logit, bias and variance of the loss; means over the pairs."""
    return [_against_exact(case, known, Masking(mask_id=mask_id), repeats, beta, seed) for case in cases()]


def _against_exact(case: Case, known: list, process, repeats: int, beta: float, seed: int) -> dict:
    rows = []
    for batch, answers in known:
        true = beta * sum(sign * (answer.bound("current") - answer.bound("origin"))
                          for sign, answer in zip((1, -1), answers, strict=True))
        logit = _logits(case, batch, answers, process, repeats, beta, seed)
        loss, at = F.softplus(-logit), math.log1p(math.exp(-true))
        rows.append({"margin": true, "mean": float(logit.mean()), "variance": float(logit.var()),
                     "bias": float(loss.mean()) - at, "error": float(loss.std()) / math.sqrt(repeats),
                     "spread": float(loss.var()), "lemma": _by_lemma(case, answers, beta)})
    mean = {name: float(np.mean([row[name] for row in rows])) for name in ("variance", "bias", "spread")}
    mean["lemma"] = None if rows[0]["lemma"] is None else float(np.mean([row["lemma"] for row in rows]))
    off = [(row["mean"] - row["margin"]) / math.sqrt(row["variance"] / repeats) for row in rows if row["variance"] > 0]
    return {"name": case.name, "plot": case.plot, "draws": case.estimator.draws, **mean,
            "bias_error": float(np.sqrt(np.sum([row["error"]**2 for row in rows])) / len(rows)),
            "bound": float(np.mean([math.sqrt(row["variance"]) for row in rows])), "pairs": rows,
            "largest_z": float(np.max(np.abs(off))) if off else 0.0}


def _by_lemma(case: Case, answers: list[Answer], beta: float) -> float | None:
    """The logit's exact variance, beta^2 times the sum of V_t / n_t + V_y / n over what is drawn by itself: answers, and
    weight sets where they share nothing. None where the times are not independent, or the masks not of the count form.
    """
    estimator = case.estimator
    if estimator.form != "count" or estimator.sequence != Random() or estimator.share_times:
        return None
    tables = [(answer, table) for answer in answers for table in (
        answer.logp.values() if case.redrawn else [answer.logp["current"] - answer.logp["origin"]])]
    between, inside = np.sum([answer.variances(table) for answer, table in tables], axis=0)
    return float(beta**2 * (between * estimator.masks_per_time + inside) / estimator.draws)


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

TITLES = {"chains": "Markov chains, exact log-likelihoods", "model": "the trained model, exact bounds"}


def figure(result: dict, path: Path) -> None:
    """The variance of the logit by budget, for both kinds of models; the bias of the loss, and the bound sqrt(variance)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (*left, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axes, (kind, title) in zip(left, TITLES.items(), strict=True):
        rows = result[kind]
        for line in dict.fromkeys(row["plot"] for row in rows if row["plot"]):
            own = [row for row in rows if row["plot"] == line]
            axes.plot([row["draws"] for row in own], [row["variance"] for row in own], "o-", label=line)
        axes.set(xscale="log", yscale="log", xlabel="draws n", ylabel="variance of the logit", xticks=BUDGETS,
                 xticklabels=BUDGETS, title=title)
        axes.legend(fontsize=8)
        right.errorbar([row["variance"] for row in rows], [row["bias"] for row in rows],
                       yerr=[2 * row["bias_error"] for row in rows], fmt="o", label=title)
    everything = [row["variance"] for kind in TITLES for row in result[kind]]
    line = np.geomspace(min(everything), max(everything), 50)
    right.plot(line, np.sqrt(line), "k:", label="Theorem 1: sqrt(variance)")
    right.plot(line, line / 8, "k--", label="variance / 8")
    right.set(xscale="log", yscale="log", xlabel="variance of the logit", ylabel="nats", title="bias of the loss")
    right.legend(fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=110)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def interval(value: list[float]) -> str:
    return "1" if value[0] == 1.0 else "{:.2f} [{:.2f}, {:.2f}]".format(*value)


def _table(rows: list[dict]) -> list[str]:
    head = ("estimate", "variance of the logit", "by Lemma 5", "bias of the loss", "sqrt of the variance",
            "variance of the loss")
    return [f"| {' | '.join(head)} |", "|---|---|---|---|---|---|",
            *(f"| {row['name']} | {row['variance']:.3g} | {_number(row['lemma'])} | {row['bias']:.2g} +- "
              f"{2 * row['bias_error']:.1g} | {row['bound']:.2g} | {row['spread']:.2g} |" for row in rows)]


def fragment(result: dict, command: str) -> str:
    settings = result["settings"]
    steps = [f"| {row['name']} | {interval(row['gradient'])} | {interval([x * row['draws'] for x in row['gradient']])} "
             f"| {interval(row['logit'])} |" for row in result["gradients"]]
    told = [BEGIN, "", f"Made by `{command}`: {settings['pairs']} pairs of each kind, {settings['repeats']} repeats a row, "
            f"beta {settings['chain_beta']:g} for the chains and {settings['beta']:g} for the model. Means over the pairs. By "
            "Lemma 5: the variance that the enumerated V_t / n_t + V_y / n give. Bias of the loss with twice its standard "
            "error; the figure after it is Theorem 1's bound on it."]
    for kind, title in TITLES.items():
        z = max(row["largest_z"] for row in result[kind])
        count = len(result[kind]) * settings["pairs"]
        told += ["", f"**{title[0].upper()}{title[1:]}.**", "", *_table(result[kind]), "",
                 f"The {count} mean margins lie within {z:.1f} standard errors of the exact ones."]
    told += ["", f"**The gradient** of the trained model's step on {settings['gradient_pairs']} pairs of its training data, "
             f"{settings['gradient_repeats']} repeats a row, against one draw a pair [95 %].", "",
             "| step | gradient variance | times n: at equal passes | logit variance |", "|---|---|---|---|", *steps, "", END]
    return "\n".join(told)


def measured(recipe, out: Path, args: argparse.Namespace) -> dict:
    seed, beta = recipe.seed, recipe.objective.beta
    settings = {"recipe": as_tree(recipe), "pairs": args.pairs, "repeats": args.repeats, "beta": beta,
                "chain_beta": CHAIN_BETA, "gradient_pairs": args.gradient_pairs,
                "gradient_repeats": args.gradient_repeats}
    path = out / "measured.json"
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        print(f"{path}: kept")
        return known
    bank, tokens = bank_of(recipe), load_tokens(recipe.model, chat=recipe.data.chat_template)
    held, train = (data.read_texts(recipe.data, tokens, part=part, seed=seed) for part in ("validation", "train"))
    result = {"settings": settings, "chains": exact(chain_pairs(args.pairs, seed), 0, args.repeats, CHAIN_BETA, seed),
              "model": exact(model_pairs(bank, held, args.pairs, seed), tokens.mask_id, args.repeats, beta, seed),
              "gradients": gradients(recipe, bank, train, args.gradient_pairs, args.gradient_repeats)}
    write_json(path, result)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/text_variance"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=600)
    parser.add_argument("--gradient-pairs", type=int, default=16)
    parser.add_argument("--gradient-repeats", type=int, default=32)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args(argv)
    try:
        _quiet_libraries()
        if args.repeats < 2 or args.gradient_repeats < 4 or args.gradient_repeats % 2:
            raise ConfigError("--repeats and --gradient-repeats: at least 2 and an even 4, a variance needs them")
        result = measured(load_recipe(args.config, args.overrides), args.out, args)
        text = fragment(result, f"python scripts/text_variance.py {args.config}")
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
