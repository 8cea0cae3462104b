"""Rewards by name. Built-in ones are a literal table; third parties add theirs through the entry points "diffalign.rewards".

Nothing heavy is imported until a reward is asked for. A third party's package says, in its pyproject.toml,

    [project.entry-points."diffalign.rewards"]
    my_reward = "my_package:MyReward"
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..redact import redact

if TYPE_CHECKING:
    from collections.abc import Callable

    from .base import Reward

GROUP = "diffalign.rewards"


def _scenes(**options) -> Reward:
    from .scenes import SceneChecker

    return SceneChecker(**options)


def _brightness(**options) -> Reward:
    from .rules import Brightness

    return Brightness(**options)


def _colourfulness(**options) -> Reward:
    from .rules import Colourfulness

    return Colourfulness(**options)


def _compressibility(**options) -> Reward:
    from .rules import Compressibility

    return Compressibility(**options)


def _remote(**options) -> Reward:
    from .remote import RemoteReward

    return RemoteReward(**options)


def _vlm(**options) -> Reward:
    from .remote import VLMJudge

    return VLMJudge(**options)


REWARDS: dict[str, Callable[..., Reward]] = {
    "scenes": _scenes,
    "brightness": _brightness,
    "colourfulness": _colourfulness,
    "compressibility": _compressibility,
    "remote": _remote,
    "vlm": _vlm,
}


def reward_names() -> list[str]:
    """All names that ``load_reward`` knows, sorted."""
    return sorted({*REWARDS, *_plugins()})


def load_reward(name: str, **options) -> Reward:
    """The reward called ``name``, built with its own options. A built-in wins over a plugin of the same name.

    Raises ConfigError for an unknown name, for options it does not take and for a plugin that cannot be loaded.
    """
    build = REWARDS.get(name) or _plugin(name)
    try:
        return build(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'reward "{name}" refuses its options {redact(str(options))}: {error}') from error


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _plugin(name: str) -> Callable[..., Reward]:
    point = _plugins().get(name)
    if point is None:
        raise ConfigError(_unknown(name))
    try:
        return point.load()
    except Exception as error:  # a stranger's package may fail in any way; its name is what helps
        source = point.dist.name if point.dist else point.value
        raise ConfigError(f'reward "{name}" of the package {source} cannot be loaded: {error}') from error


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, reward_names(), n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return f'unknown reward "{name}".{hint} Known rewards: {", ".join(reward_names())}'


__all__ = ["GROUP", "REWARDS", "load_reward", "reward_names"]
