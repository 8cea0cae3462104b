"""``diffalign score``: rewards' scores of a data set or a folder of pictures, as columns."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path

from ..building import score as scoring
from ..building.journal import Journal
from ..building.recall import begin
from ..building.score import Source
from ..building.spec import ScoreSpec
from ..evaluate.files import clean, write_json
from ..rewards import check as check_reward
from ..train.checkpoint import check_writable, claimed
from ..world import on_first, world_of
from .build import identities, versions
from .parts import accelerator_to_draw
from .words import Printer, silent


def score(spec: ScoreSpec, printer: Printer = silent) -> dict:
    """Score what has no score yet, then write the data with a column score_<reward> each, and a .json of the facts beside it.

    A killed run goes on where it was. Returns the facts. Raises UserError children.
    """
    started, source = time.monotonic(), Source(spec)
    for reward in spec.rewards.values():
        check_reward(reward)
    scoring.check(source, spec.rewards)
    output = source.output
    work, facts_file = output.with_name(f"{output.name}.work"), output.with_name(f"{output.name}.json")
    check_writable(output.parent, "output")
    accelerator = accelerator_to_draw(spec.cpu, output.parent)
    world, main = world_of(accelerator), accelerator.is_main_process
    say = printer if main else silent
    check_writable(work, "output")
    with ExitStack() as held:
        facts = json.loads(on_first(world, lambda: json.dumps(_begin(spec, source, work, [output, facts_file], held))))
        journal = Journal(work / "scores", world.rank)
        scoring.score(source, spec.rewards, journal, rank=world.rank, world=world.size, progress=main, say=say)
        world.barrier()
        made = json.loads(on_first(world, lambda: json.dumps(_write(spec, source, journal, facts, facts_file))))
    for line in _said(made):
        say(line)
    say(f"done: {output} ({made['rows']} rows, {time.monotonic() - started:.0f} s)")
    return made


def _begin(spec: ScoreSpec, source: Source, work: Path, results: list[Path], held: ExitStack) -> dict:
    """Claim ``work`` for as long as ``held`` lives, and go on there or begin. Returns what decides the scores."""
    held.enter_context(claimed(work))
    data, rewards = source.identity(), identities(spec.rewards)
    begin(work, data, rewards, spec.overwrite, results)
    return {"data": data, "identities": rewards}


def _write(spec: ScoreSpec, source: Source, journal: Journal, facts: dict, file: Path) -> dict:
    """The data with its scores, and the facts beside it. Returns the facts."""
    made = scoring.write(source, list(spec.rewards), scoring.known(journal))
    facts = clean({**made, "output": str(source.output), **facts, "versions": versions()})
    write_json(file, facts)
    return facts


def _said(made: dict) -> list[str]:
    bare = made["without_prompt"]
    lines = [f"{bare} rows have no prompt, and were scored with an empty one"] if bare else []
    for name, found in made["rewards"].items():
        lost = f", {found['not_scored']} not scored" if found["not_scored"] else ""
        lines.append(f"{name}: mean {found['mean']:.4g}, {found['least']:.4g} to {found['greatest']:.4g}{lost}"
                     if found["scored"] else f"{name}: could score none of {found['not_scored']} pictures")
    return lines
