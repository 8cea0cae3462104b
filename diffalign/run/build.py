"""``diffalign build``: prompts -> samples -> rewards -> filters -> ranked groups or pairs."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..building import draw, judge, table
from ..building.draw import Plan
from ..building.journal import Journal
from ..building.pictures import FOLDER, tidy
from ..building.recall import begin
from ..building.select import SELECTS
from ..building.spec import BuildSpec
from ..config import as_tree, dump
from ..data.columns import normalised
from ..data.prompts import Prompts, read_prompts
from ..errors import DataError
from ..evaluate.files import clean, write_json
from ..rewards import Reward, identity
from ..train.checkpoint import check_writable, claimed
from ..world import on_first, world_of
from .parts import accelerator_to_draw
from .words import Printer, silent

FACTS, WORK = "build.json", "work"
LIBRARIES = ("diffalign", "torch", "diffusers", "transformers", "pillow")


def build(spec: BuildSpec, printer: Printer = silent) -> dict:
    """Draw and score what is not there yet, then write the table, scores.parquet and build.json. Returns what that holds.

    A killed build goes on where it was; only the table is made anew, so filters, utility and selection may be changed.
    Raises UserError children.
    """
    started, folder = time.monotonic(), Path(spec.output_dir)
    prompts = _checked(spec)
    check_writable(folder)
    accelerator = accelerator_to_draw(spec.cpu, folder)
    world, main = world_of(accelerator), accelerator.is_main_process
    say, plan = printer if main else silent, Plan.of(spec, prompts)
    with ExitStack() as held:
        facts = json.loads(on_first(world, lambda: json.dumps(_begin(spec, prompts, folder, held))))
        images, scores = _candidates(spec, plan, folder, world, accelerator.device, say)
        made = json.loads(on_first(world, lambda: json.dumps(_write(spec, plan, images, scores, facts, folder))))
    for line in _said(spec, made):
        say(line)
    say(f"done: {folder / spec.select.table} ({made['counts']['rows']} rows from {len(plan.prompts)} prompts, "
        f"{time.monotonic() - started:.0f} s)")
    return made


def _begin(spec: BuildSpec, prompts: Prompts, folder: Path, held: ExitStack) -> dict[str, Any]:
    """Claim the folder for as long as ``held`` lives, and go on there or begin. Returns what decides pictures and scores."""
    held.enter_context(claimed(folder))
    begun, rewards = _begun(spec, prompts), identities(spec.rewards)
    results = {*(known.table for known in SELECTS.values()), table.SCORES, FACTS}
    begin(folder / WORK, begun, rewards, spec.overwrite, [folder / name for name in sorted(results)], folder / FOLDER)
    return {"drawn": begun, "identities": rewards}


def _write(spec: BuildSpec, plan: Plan, images: dict, scores: dict, facts: dict, folder: Path) -> dict[str, Any]:
    """The tables and build.json. Returns what that holds."""
    tidy(folder)
    made = clean({**table.make(spec, plan, images, scores, folder), "table": spec.select.table, "recipe": as_tree(spec),
                  **facts, "recipe_sha256": hashlib.sha256(dump(spec).encode()).hexdigest(), "versions": versions()})
    write_json(folder / FACTS, made)
    return made


def _candidates(spec: BuildSpec, plan: Plan, folder: Path, world, device, say: Printer) -> tuple[dict, dict]:
    """All pictures and all scores, by all processes."""
    share = {"rank": world.rank, "world": world.size, "progress": world.rank == 0}
    pictures, scores = (Journal(folder / WORK / stage, world.rank) for stage in ("pictures", "scores"))
    there = len(draw.drawn(folder, pictures))
    say(f"{len(plan.prompts)} prompts, {plan.pictures} pictures by {', '.join(spec.models)}"
        + (f", {there} there already" if there else ""))
    draw.draw(spec, plan, folder, pictures, device=device, **share)
    world.barrier()
    images = draw.drawn(folder, pictures)
    judge.score(spec.rewards, plan, images, folder, scores, **share)
    world.barrier()
    return images, judge.known(scores)


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _checked(spec: BuildSpec) -> Prompts:
    """What can be refused before anything is drawn. Raises UserError children."""
    prompts = read_prompts(spec.prompts, "prompts")
    if spec.heldout_prompts is not None:
        held = {normalised(text) for text in read_prompts(spec.heldout_prompts, "heldout_prompts").texts}
        leaked = [text for text in prompts.texts[:spec.max_prompts] if normalised(text) in held]
        if leaked:
            raise DataError(f'prompts: {len(leaked)} of the prompts in {spec.prompts} are held out in {spec.heldout_prompts}, '
                            f'first "{leaked[0][:80]}"; remove them, or what is trained on this cannot be evaluated there')
    judge.check(spec.rewards)
    for one in spec.filters:
        if hasattr(one, "check"):
            one.check()
    draw.check(spec)
    return prompts


def _begun(spec: BuildSpec, prompts: Prompts) -> dict[str, Any]:
    """What decides the pictures; hashes stand for files."""
    texts = "\n".join(prompts.texts[:spec.max_prompts])
    return {"seed": spec.seed, "samples": spec.samples, "max_prompts": spec.max_prompts,
            "prompts": hashlib.sha256(texts.encode()).hexdigest(), **draw.facts(spec)}


def identities(rewards: dict[str, Reward]) -> dict[str, dict]:
    """What decides the scores of each: its options, and the facts that pin its numbers."""
    return {name: {**as_tree(reward), "identity": clean(identity(reward))} for name, reward in rewards.items()}


def _said(spec: BuildSpec, made: dict) -> list[str]:
    lines = [f"{report['filter']}: {report['groups_before']} groups -> {report['groups_after']}" for report in made["filters"]]
    if made["counts"]["pictures_not_scored"]:
        lines.append(f"{made['counts']['pictures_not_scored']} pictures could not be scored and were left out")
    if len(spec.models) > 1:
        lines += [f"{name}: best in {share['wins']:.0%} of the groups with {share['candidates']:.0%} of the pictures"
                  for name, share in made["models"].items()]
    return lines
