"""What training optimised: the rewards that an alarm compares with the judge, and that a judge must not be among."""

from __future__ import annotations

import json
from pathlib import Path

from ..building.utility import Mean
from ..config import Evaluation, Recipe, load_reward, load_utility
from ..data.sources import Online
from ..errors import ConfigError, UserError, first_line
from ..rewards import Reward

BUILT = "build.json"  # beside a data set that ``diffalign build`` made


def training_rewards(recipe: Recipe | Evaluation) -> tuple[tuple[Reward, float], ...] | None:
    """Each reward with its weight, as the recipe or the data set's build.json says; None where neither does.

    The weight is that of the utility that made the labels: below 0 where less was better, and 0 for a reward that only a
    filter asked. Raises ConfigError for a build.json that cannot be read.
    """
    if recipe.evaluate is not None and recipe.evaluate.training_reward is not None:
        return ((recipe.evaluate.training_reward, 1.0),)
    if isinstance(recipe, Evaluation):
        return None
    if isinstance(recipe.source, Online):
        return ((recipe.source.reward, 1.0),)
    path = Path(recipe.data.path)
    path = (path if path.is_dir() else path.parent) / BUILT
    if not path.is_file():
        return None
    try:
        made = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        return tuple((load_reward(made["rewards"][name]), weight) for name, weight in _weights(made).items()) or None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError) as error:
        raise ConfigError(f"{path}: cannot tell which rewards this data set was built with ({first_line(error)}); name the "
                          "one in evaluate.training_reward") from None


def _weights(made: dict) -> dict[str, float]:
    """Of a build's rewards, by name, those that had a say in the labels: read by its utility, or by a filter. The others were
    only written down, and may judge.
    """
    names = list(made["rewards"])
    utility = None if made.get("utility") is None else load_utility(made["utility"])
    read = names if utility is None else utility.reads(names)
    asked = {one["reward"] for one in made.get("filters") or () if one.get("reward") is not None}
    weights = utility.weights if isinstance(utility, Mean) else {}
    return {name: weights.get(name, 1.0) if name in read else 0.0 for name in names if name in read or name in asked}
