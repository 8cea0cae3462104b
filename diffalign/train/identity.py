"""Which run a checkpoint belongs to: only a run with the same recipe, base model and data may continue it."""

from __future__ import annotations

import json

from ..errors import CheckpointError

HARMLESS = ("output_dir", "evaluate", "check", "train.logging_steps", "train.checkpointing_steps",
            "train.checkpoints_total_limit", "train.resume", "train.report_to", "train.validation_steps",
            "train.dataloader_num_workers", "train.allow_change")
SPLIT = ("train.train_batch_size", "train.gradient_accumulation_steps")  # free while their product with the world is the same
UNBOUNDED = ("constant", "constant_with_warmup")  # schedules that do not know how long the run is


def check_same_run(folder, stored: dict, *, config: dict, identity: dict[str, str], groups_per_step: int,
                   allow_change: tuple[str, ...] = ()) -> None:
    """stored: a checkpoint's state. CheckpointError listing every difference with its old and new value."""
    problems = [f"{name} was {_show(old)}, now {_show(new)}"
                for name, old, new in _differences(stored["identity"], identity) if name not in allow_change]
    changes = _config_changes(stored["config"], config, stored["groups_per_step"] == groups_per_step, allow_change)
    if problems:
        why = [change for change in changes if change.startswith(("model.", "data."))]  # says more than a hash does
        raise CheckpointError(f"{folder} was trained on another model or data: {'; '.join([*why, *problems])}. Choose another "
                              "output_dir, or restore what it was trained on")
    problems = changes
    if stored["groups_per_step"] != groups_per_step and not set(SPLIT) & set(allow_change):
        problems.append(f"groups a step was {stored['groups_per_step']}, now {groups_per_step}")
    if problems:
        raise CheckpointError(f"{folder} belongs to another recipe: {'; '.join(problems)}. Undo the change, choose another "
                              "output_dir, or name the keys in train.allow_change")


def _config_changes(old: dict, new: dict, same_batch: bool, allow_change: tuple[str, ...]) -> list[str]:
    old, new = flatten(old), flatten(plain(new))
    free = {*HARMLESS, *allow_change, *(SPLIT if same_batch else ())}
    if new.get("train.lr_scheduler", old.get("train.lr_scheduler")) in UNBOUNDED:
        free.add("train.max_train_steps")
    return [f"{key} was {_show(a)}, now {_show(b)}" for key, a, b in _differences(old, new)
            if not any(key == name or key.startswith(f"{name}.") for name in free)]


def plain(tree):
    """A tree as JSON gives it back: tuples become lists, keys texts."""
    return json.loads(json.dumps(tree, default=str))


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}; an empty dict stays a value."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


_ABSENT = object()


def _differences(old: dict, new: dict) -> list[tuple[str, object, object]]:
    return [(key, old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in sorted({*old, *new})
            if old.get(key, _ABSENT) != new.get(key, _ABSENT)]


def _show(value) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
