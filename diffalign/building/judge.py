"""Scores of pictures, reward after reward, in units that a killed run need not do again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..rewards import Reward, columns_of, judged
from ..rewards import check as check_reward
from .draw import Plan, Wanted
from .journal import Journal
from .pictures import fetch

UNIT = 64  # pictures scored and written down at once


def check(rewards: Mapping[str, Reward], columns: Iterable[str] = ()) -> None:
    """Raises a UserError for what is wrong with a reward, or a column that it reads and that there is none of."""
    for name, reward in rewards.items():
        check_reward(reward)
        missing = [column for column in columns_of(reward) if column not in columns]
        if missing:
            raise ConfigError(f"rewards.{name}: reads a column '{missing[0]}' beside picture and prompt, which prompts alone "
                              "do not have; score a data set that has it with `diffalign score`")


def copied(reward: Reward) -> Reward:
    """A loaded reward stays loaded, so the weights are a copy's, which goes. What cannot be copied (a lock) is used itself."""
    try:
        return copy.deepcopy(reward)
    except Exception:
        return reward


def scored(reward: Reward, images: Sequence[Image.Image | None], prompts: Sequence[str],
           columns: Mapping[str, Sequence] | None = None) -> list[float | None]:
    """One number per picture; None for one that is None itself, or that the reward could not score."""
    whole = [n for n, image in enumerate(images) if image is not None]
    result: list[float | None] = [None] * len(images)
    if whole:
        given = {name: [values[n] for n in whole] for name, values in (columns or {}).items()}
        found = judged(reward, [images[n] for n in whole], [prompts[n] for n in whole], given)
        for n, value in zip(whole, found.tolist()):
            result[n] = None if math.isnan(value) else value
    return result


Key = tuple[str, str, int, str]  # reward, model, place, image


def known(journal: Journal) -> dict[Key, float]:
    """Scores that are there, NaN for a picture that could not be scored."""
    return {(record["reward"], record["model"], place, image): math.nan if value is None else value
            for record in journal for place, image, value in record["scores"]}


def score(rewards: Mapping[str, Reward], plan: Plan, images: Mapping[tuple[str, int], str], folder: Path, journal: Journal, *,
          rank: int = 0, world: int = 1, progress: bool = True) -> None:
    """This process's share of the scores that are not there yet. One reward's weights in memory at a time.

    images: (model, place) -> file. Raises UserError children, of the reward or for a damaged picture.
    """
    done = known(journal)
    for name, reward in rewards.items():
        units = [(model, [one for one in wanted[start:start + UNIT]
                          if (name, model, one.place, images[model, one.place]) not in done])
                 for model, wanted in plan.wanted.items() for start in range(rank * UNIT, len(wanted), world * UNIT)]
        units = [(model, unit) for model, unit in units if unit]
        if units:
            own = copied(reward)
            _score(own, name, units, images, folder, journal, progress)
            del own
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    journal.close()


def _score(reward: Reward, name: str, units: Sequence[tuple[str, list[Wanted]]], images: Mapping[tuple[str, int], str],
           folder: Path, journal: Journal, progress: bool) -> None:
    total = sum(len(unit) for _, unit in units)
    with tqdm(total=total, desc=f"scoring with {name}", unit="picture", disable=None if progress else True) as bar:
        for model, unit in units:
            files = [images[model, one.place] for one in unit]
            values = scored(reward, [fetch(folder, file) for file in files], [one.prompt for one in unit])
            journal.add({"reward": name, "model": model,
                         "scores": [[one.place, file, value] for one, file, value in zip(unit, files, values)]})
            bar.update(len(unit))
