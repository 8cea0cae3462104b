"""Pictures of texts and their scores: the frozen generator and the rewards, behind one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..building import draw, judge
from ..building.spec import Drawer, Sampling
from ..errors import DataError
from ..rewards import Reward
from ..sampling.generate import generate, picture_seed


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A user's prompt. meaning: what pictures are scored against; the prompt itself where nothing else is said."""

    prompt: str
    meaning: str


class Studio:
    """generator: with its own sampling. seeds: pictures a text; all texts of a prompt get the prompt's seeds, so that they
    differ by their words and not by their noise. The reward's weights stay in memory beside the pipeline's.
    """

    def __init__(self, generator: Drawer, rewards: dict[str, Reward], *, seed: int, seeds: int,
                 device: torch.device | str = "cpu"):
        self._sampling, self._rewards, self._seed, self._seeds = sampling_of(generator), rewards, seed, seeds
        with draw.named("generator", generator):
            self._pipe = draw.pipeline(generator, self._sampling, device)

    def fits(self, text: str) -> bool:
        """Whether the text is not cut by any of the generator's tokenizers."""
        parts = [part for name, part in self._pipe.components.items() if name.startswith("tokenizer") and part is not None]
        return all(len(tokenizer(text).input_ids) <= tokenizer.model_max_length for tokenizer in parts)

    def scores(self, asked: Sequence[tuple[Asked, str]]) -> list[dict[str, float | None]]:
        """For each text, by reward, the mean over the seeds; None where no picture could be scored. Raises UserError
        children.
        """
        table = self.table(asked)
        return [{name: _mean(rows[n]) for name, rows in table.items()} for n in range(len(asked))]

    def table(self, asked: Sequence[tuple[Asked, str]]) -> dict[str, list[list[float | None]]]:
        """By reward, for each text one score a seed. Never against the text itself: a rewrite that drops what was asked for
        must not score higher for it. Raises UserError children.
        """
        if not asked:
            return {name: [] for name in self._rewards}
        texts = [text for _, text in asked for _ in range(self._seeds)]
        seeds = [picture_seed(self._seed, one.prompt, n) for one, _ in asked for n in range(self._seeds)]
        images = generate(self._pipe, texts, seeds, progress=None, **draw.how(self._sampling))
        meanings = [one.meaning for one, _ in asked for _ in range(self._seeds)]
        columns = {name: judge.scored(reward, images, meanings) for name, reward in self._rewards.items()}
        return {name: [values[n:n + self._seeds] for n in range(0, len(values), self._seeds)]
                for name, values in columns.items()}


def check(generator: Drawer, rewards: dict[str, Reward]) -> None:
    """Raises UserError children for what can be refused before anything is loaded."""
    judge.check(rewards)
    with draw.named("generator", generator):
        draw.check_drawer(generator, sampling_of(generator))


def facts(generator: Drawer) -> dict[str, Any]:
    """What decides the pictures of a text and a seed."""
    return draw.drawer_facts(generator)


def sampling_of(generator: Drawer) -> Sampling:
    return generator.sampling or Sampling()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def read_asked(path: str, option: str) -> list[Asked]:
    """Users' prompts from any prompt list (``diffalign.data.prompts``), with its column ``meaning`` if there is one. Raises
    DataError: nothing there, or a prompt that comes twice, which would be two answers to one question.
    """
    from ..data.prompts import read_prompts

    found = read_prompts(path, option)
    meanings = found.meanings or found.texts
    seen: set[str] = set()
    for text in found.texts:
        if text in seen:
            raise DataError(f'{option}: {path} holds the prompt "{text[:80]}" twice; keep one')
        seen.add(text)
    return [Asked(prompt=text, meaning=meaning) for text, meaning in zip(found.texts, meanings, strict=True)]
