"""``diffalign prompts evolve|train|rewrite``: a language model that learns to write what a frozen pipeline follows best."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..building.journal import Journal
from ..building.recall import begin
from ..config import PromptsTask, as_tree
from ..data.columns import normalised
from ..errors import ConfigError, DataError
from ..evaluate.files import clean, write, write_json
from ..evaluate.statistics import holm, paired
from ..language import studio as studios
from ..language import tuning
from ..language.evolve import UNIT, Explored, Plan, explore, explored, pairs, targets
from ..language.propose import OwnWords, Proposer
from ..language.rewriter import Rewriter, Writer
from ..language.spec import RewriterSpec
from ..language.studio import Asked, Studio, read_asked
from ..train.checkpoint import check_writable, claimed
from ..world import World, on_first, world_of
from .build import identities, versions
from .parts import accelerator_to_draw
from .words import Printer, silent

POOL, TARGETS, PAIRS, STAGE, FACTS, REWRITTEN = ("texts.jsonl", "sft.jsonl", "pairs.jsonl", "stage.json", "rewriter.json",
                                                 "rewritten.jsonl")


def prompts(task: PromptsTask, printer: Printer = silent) -> dict:
    """Evolve a pool, train on it, or rewrite; the same command again goes on where it was. Returns facts. Raises UserError
    children.
    """
    return {"evolve": _evolve, "train": _train, "rewrite": _rewrite}[task.action](task.spec, printer)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """This process of a run."""

    spec: RewriterSpec
    world: World
    device: torch.device
    say: Printer

    @property
    def main(self) -> bool:
        return self.world.rank == 0

    @property
    def folder(self) -> Path:
        return Path(self.spec.output_dir)

    def first(self, action: Callable[[], Any]) -> str:
        """What the first process does while the others wait; its errors are everybody's."""
        return on_first(self.world, lambda: json.dumps(action()))


def _run(spec: RewriterSpec, printer: Printer) -> _Run:
    """Everything that can be refused before a model is loaded is refused here."""
    spec.rewriter.check()
    spec.evolve.proposer.check()
    studios.check(spec.generator, spec.rewards)
    check_writable(Path(spec.output_dir))
    accelerator = accelerator_to_draw(spec.cpu, spec.output_dir)
    world = world_of(accelerator)
    return _Run(spec=spec, world=world, device=accelerator.device, say=printer if world.rank == 0 else silent)


def _asked(spec: RewriterSpec) -> tuple[list[Asked], list[Asked]]:
    """Users' prompts for the pool, and those for DPO. Raises DataError, also for one that ``measure`` holds out."""
    asked = read_asked(spec.prompts, "prompts")
    if spec.measure is not None:
        held = {normalised(text) for one in read_asked(spec.measure.prompts, "measure.prompts")
                for text in (one.prompt, one.meaning)}
        leaked = [one for one in asked if normalised(one.prompt) in held or normalised(one.meaning) in held]
        if leaked:
            raise DataError(f'prompts: {len(leaked)} of the prompts in {spec.prompts} are in {spec.measure.prompts}, which is '
                            f'to measure what is learned, first "{leaked[0].prompt[:80]}"; remove them from one')
    if spec.dpo.rounds and len(asked) <= spec.evolve.prompts:
        raise ConfigError(f"evolve.prompts: {spec.evolve.prompts} of {len(asked)} prompts leave none for DPO; lower it, or "
                          "set dpo.rounds=0")
    return asked[:spec.evolve.prompts], asked[spec.evolve.prompts:]


# evolve


def _evolve(spec: RewriterSpec, printer: Printer) -> dict:
    started, (asked, _), run = time.monotonic(), _asked(spec), _run(spec, printer)
    how, folder = spec.evolve, run.folder / "evolve"
    plan = Plan(rounds=how.rounds, proposals=how.proposals, parents=how.parents, score=how.score)
    found = _explored(run, folder, asked, plan, how.proposer, spec.rewriter, "evolving")
    rows = targets(found, how.score)
    gains = [row["score"] - row["own_score"] for row in rows if row["own_score"] is not None]
    facts = {"prompts": len(asked), "texts": sum(len(one.texts) for one in found), "cut": sum(one.cut for one in found),
             "targets": len(rows), "mean_gain": sum(gains) / len(gains) if gains else None}
    run.first(lambda: _write_evolved(folder, rows, {**facts, "recipe": as_tree(spec), "versions": versions()}))
    run.say(f"done: {folder / TARGETS} ({len(rows)} targets of {len(asked)} prompts, {facts['texts']} texts tried, "
            f"{time.monotonic() - started:.0f} s)")
    if not rows:
        run.say("no text scored above its user's prompt and passed evolve.score.above: nothing to learn from")
    return facts


def _write_evolved(folder: Path, rows: Sequence[dict], facts: dict) -> None:
    _write_rows(folder / TARGETS, rows)
    write_json(folder / FACTS, clean(facts))


def _explored(run: _Run, folder: Path, asked: Sequence[Asked], plan: Plan, proposer: Proposer, rewriter: Rewriter,
              label: str) -> list[Explored]:
    """Every prompt's texts with their scores, by all processes; also in ``folder``/texts.jsonl."""
    spec, journal = run.spec, Journal(folder / "work" / "texts", run.world.rank)
    with ExitStack() as held:
        run.first(lambda: _begin_texts(held, folder, _drawn_by(spec, asked, plan, proposer, rewriter), spec.overwrite))
        there = sum(1 for _ in journal)
        if there * UNIT < len(asked):
            run.say(f"{len(asked)} prompts, up to {plan.rounds * plan.proposals} texts each, {spec.seeds} pictures a text"
                    + (f"; {there * UNIT} prompts are there" if there else ""))
            studio = Studio(spec.generator, spec.rewards, seed=spec.seed, seeds=spec.seeds, device=run.device)
            proposing = proposer.open(rewriter, run.device, spec.seed)
            explore(asked, plan, proposing, studio, journal, rank=run.world.rank, world=run.world.size, label=label,
                    progress=run.main)
            del studio, proposing
        run.world.barrier()
        found = explored(journal)
        run.first(lambda: _write_rows(folder / POOL, [one.record() for one in found]))
    return found


def _begin_texts(held: ExitStack, folder: Path, facts: dict, overwrite: bool) -> None:
    check_writable(folder)
    held.enter_context(claimed(folder))
    begin(folder / "work", facts, {}, overwrite, [folder / name for name in (POOL, TARGETS, PAIRS, FACTS)])


def _drawn_by(spec: RewriterSpec, asked: Sequence[Asked], plan: Plan, proposer: Proposer, rewriter: Rewriter) -> dict:
    """What decides the texts and their scores; thresholds, which only choose among them, may be changed."""
    words = "\n".join(f"{one.prompt}\t{one.meaning}" for one in asked)
    return {"seed": spec.seed, "seeds": spec.seeds, "prompts": hashlib.sha256(words.encode()).hexdigest(),
            "rounds": plan.rounds, "proposals": plan.proposals, "parents": plan.parents,
            "weights": plan.score.weights if plan.rounds > 1 else None, "proposer": proposer.identity(),
            "rewriter": rewriter.identity(), "generator": studios.facts(spec.generator), "rewards": identities(spec.rewards)}


# train


def _train(spec: RewriterSpec, printer: Printer) -> dict:
    started, (_, later) = time.monotonic(), _asked(spec)
    tuning.trl()
    pool = Path(spec.output_dir) / "evolve" / TARGETS
    if not pool.is_file():
        raise DataError(f"{pool} is missing: run `diffalign prompts evolve` with the same recipe first")
    run = _run(spec, printer)
    rows = _read_rows(pool)
    if not rows:
        raise DataError(f"{pool} holds no target: no text scored above its user's prompt and passed evolve.score.above")
    source, facts = spec.rewriter, {}
    source, facts["sft"] = _stage(run, "sft", source, rows, spec.sft, tuning.sft)
    for number in range(1, spec.dpo.rounds + 1):
        name = f"dpo-{number}"
        rows = _pairs(run, run.folder / name, later, source)
        if not rows:
            raise DataError(f"{name}: no two candidates of a prompt differ by more than dpo.pairs.gap with the better one "
                            "above dpo.pairs.score.above; lower them, raise dpo.candidates, or set dpo.rounds lower")
        source, facts[name] = _stage(run, name, source, rows, spec.dpo, tuning.dpo)
    made = {"stages": facts, "rewriter": source.pretrained_model_name_or_path, "recipe": as_tree(spec),
            "versions": {**versions(), "trl": tuning.trl().__version__}}
    run.first(lambda: write_json(run.folder / FACTS, clean(made)))
    run.say(f"done: {source.pretrained_model_name_or_path} ({time.monotonic() - started:.0f} s)")
    return facts


def _pairs(run: _Run, folder: Path, asked: Sequence[Asked], source: Rewriter) -> list[dict]:
    """The last model's own candidates as pairs; also in ``folder``/candidates/pairs.jsonl."""
    spec = run.spec.dpo
    plan = Plan(rounds=1, proposals=spec.candidates, parents=0, score=spec.pairs.score)
    found = _explored(run, folder / "candidates", asked, plan, OwnWords(), source, f"candidates of {folder.name}")
    rows = pairs(found, spec.pairs)
    run.first(lambda: _write_rows(folder / "candidates" / PAIRS, rows))
    run.say(f"{folder.name}: {len(rows)} pairs of {len(asked)} prompts")
    return rows


def _stage(run: _Run, name: str, source: Rewriter, rows: Sequence[dict], options: Any,
           tune: Callable[..., dict]) -> tuple[Rewriter, dict]:
    """The model after a stage, and its facts; a stage that is there is not trained again, a killed one goes on."""
    folder, done = run.folder / name, run.folder / name / STAGE
    words = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    with ExitStack() as held:
        begun = {"rows": hashlib.sha256(words.encode()).hexdigest(), "source": source.identity(), "seed": run.spec.seed,
                 "options": as_tree(options)}
        if json.loads(run.first(lambda: _begin_training(held, folder, begun, run.spec.overwrite))):
            run.say(f"{name}: {len(rows)} rows")
            made = tune(source, rows, options, folder, seed=run.spec.seed, cpu=run.device.type == "cpu")
            run.first(lambda: write_json(done, clean(made)))
            run.say(f"{name}: {made['steps']} steps, mean loss {made['loss']:.3g}")
    return _after(source, folder), json.loads(done.read_bytes())


def _begin_training(held: ExitStack, folder: Path, facts: dict, overwrite: bool) -> bool:
    """Whether there is something left to train. Checkpoints of another beginning are removed."""
    check_writable(folder)
    held.enter_context(claimed(folder))
    begin(folder / "work", facts, {}, overwrite, [folder / STAGE])
    if (folder / STAGE).is_file():
        return False
    journal = Journal(folder / "work" / "training")
    if not any(journal):
        shutil.rmtree(folder / tuning.CHECKPOINTS, ignore_errors=True)
        journal.add({"begun": True})
    journal.close()
    return True


def _after(source: Rewriter, folder: Path) -> Rewriter:
    return replace(source, pretrained_model_name_or_path=str(folder / tuning.MODEL), revision=None)


# rewrite


def _rewrite(spec: RewriterSpec, printer: Printer) -> dict:
    if spec.inputs is None and spec.measure is None:
        raise ConfigError("inputs: is missing; give a list of prompts to rewrite, or measure.prompts to measure with")
    stages = _stages(spec)
    run = _run(spec, printer)
    if not run.main:
        return {}
    facts: dict[str, Any] = {}
    if spec.inputs is not None:
        asked, (name, source) = read_asked(spec.inputs, "inputs"), [*stages.items()][-1]
        texts = _written(run, source, asked)
        _write_rows(run.folder / REWRITTEN, [{"prompt": one.prompt, "rewrite": text} for one, text in zip(asked, texts)])
        facts["rewritten"] = len(asked)
        run.say(f"{run.folder / REWRITTEN}: {len(asked)} prompts rewritten by {name}")
    if spec.measure is not None:
        facts["measured"] = _measure(run, stages)
    return facts


def _stages(spec: RewriterSpec) -> dict[str, Rewriter]:
    """The language model as it came, and after every stage that is there. Raises DataError when there is none."""
    names = ["sft", *(f"dpo-{n}" for n in range(1, spec.dpo.rounds + 1))]
    folder = Path(spec.output_dir)
    there = {name: _after(spec.rewriter, folder / name) for name in names if (folder / name / STAGE).is_file()}
    if not there:
        raise DataError(f"{folder}: holds no trained rewriter; run `diffalign prompts train` with the same recipe first")
    return {"untrained": spec.rewriter, **there}


def _written(run: _Run, source: Rewriter, asked: Sequence[Asked]) -> list[str]:
    return Writer(source, run.device).best([one.prompt for one in asked])


def _measure(run: _Run, stages: dict[str, Rewriter]) -> dict[str, Any]:
    """Each stage's rewrites against the users' prompts, same seeds: measured.jsonl by prompt, measured.json by stage."""
    spec, measure = run.spec, run.spec.measure
    asked = read_asked(measure.prompts, "measure.prompts")[:measure.max_prompts]
    texts = {name: _written(run, source, asked) for name, source in stages.items()}
    studio = Studio(spec.generator, {"judge": measure.judge}, seed=spec.seed, seeds=measure.seeds, device=run.device)
    sides = {"user": [one.prompt for one in asked], **texts}
    scores = {name: studio.table([(one, text) for one, text in zip(asked, own)])["judge"] for name, own in sides.items()}
    _write_rows(run.folder / "measured.jsonl", [
        {"prompt": one.prompt, "meaning": one.meaning, "user": scores["user"][n],
         **{name: {"text": texts[name][n], "scores": scores[name][n]} for name in stages}} for n, one in enumerate(asked)])
    found = {name: paired(_array(scores["user"]), _array(scores[name]), seed=spec.seed) for name in stages}
    if any(one is None for one in found.values()):
        raise DataError(f"measure.judge: could score no picture of {measure.prompts}; does it understand the prompts, or "
                        "their column meaning?")
    corrected = dict(zip(found, holm([one.sign_test for one in found.values()])))
    made = {name: {**asdict(one), "holm": corrected[name], "sentence": one.about(f"rewriter ({name})"),
                   "cut": sum(not studio.fits(text) for text in texts[name])} for name, one in found.items()}
    write_json(run.folder / "measured.json", clean({"stages": made, "recipe": as_tree(spec), "versions": versions()}))
    for name, one in found.items():
        run.say(f"{name}: judge {one.base_score:.3f} -> {one.aligned_score:.3f}, difference {one.difference:+.3f} "
                f"[{one.difference_low:+.3f}, {one.difference_high:+.3f}]. {made[name]['sentence']}")
    return made


def _array(scores: Sequence[Sequence[float | None]]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in scores], np.float64)


# files


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _read_rows(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); run `diffalign prompts evolve` again") from None
