"""Reward-guided evolution of prompts, and the sampling of candidates, which is its first round alone.

A round: the proposer writes new texts for each prompt, from the prompt and the best texts so far; the generator draws them;
the rewards score the pictures against what the user asked for. Prompts go in units of a fixed grid; a unit is written down
when all its rounds are done, so a killed run repeats one unit at most, and processes share units without changing any
number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm.auto import tqdm

from ..building.journal import Journal
from .propose import Past, Proposing
from .select import Pairs, Score, Scores
from .studio import Asked, Studio

UNIT = 16  # prompts that are done and written down at once


@dataclass
class Explored:
    """A prompt and every text that was tried for it. own: scores of the prompt as the user wrote it. texts: text -> (round,
    scores), in the order of their trial. cut: texts that the generator would have cut, which were not drawn.
    """

    asked: Asked
    own: Scores
    texts: dict[str, tuple[int, Scores]] = field(default_factory=dict)
    cut: int = 0

    def record(self) -> dict:
        return {"prompt": self.asked.prompt, "meaning": self.asked.meaning, "own": dict(self.own), "cut": self.cut,
                "texts": [{"text": text, "round": number, "scores": dict(scores)}
                          for text, (number, scores) in self.texts.items()]}

    @classmethod
    def of(cls, record: dict) -> Explored:
        return cls(asked=Asked(prompt=record["prompt"], meaning=record["meaning"]), own=record["own"], cut=record["cut"],
                   texts={one["text"]: (one["round"], one["scores"]) for one in record["texts"]})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """rounds: at most. proposals: new texts a round and prompt. parents: best texts that the proposer is shown. score: what
    "best" means.
    """

    rounds: int
    proposals: int
    parents: int
    score: Score


def explore(asked: Sequence[Asked], plan: Plan, proposing: Proposing, studio: Studio, journal: Journal, *,
            rank: int = 0, world: int = 1, label: str = "evolving", progress: bool = True) -> None:
    """This process's share of the units that are not there yet, into the journal. Raises UserError children."""
    done = {record["unit"] for record in journal}
    units = [(start // UNIT, asked[start:start + UNIT]) for start in range(rank * UNIT, len(asked), world * UNIT)]
    with tqdm(total=sum(len(part) for _, part in units), desc=label, unit="prompt", disable=None if progress else True) as bar:
        for number, part in units:
            if number not in done:
                found = _unit(part, plan, proposing, studio)
                journal.add({"unit": number, "explored": [one.record() for one in found]})
            bar.update(len(part))
    journal.close()


def explored(journal: Journal) -> list[Explored]:
    """All that is there, in the order of the prompts."""
    records = {record["unit"]: record["explored"] for record in journal}
    return [Explored.of(one) for _, part in sorted(records.items()) for one in part]


def _unit(part: Sequence[Asked], plan: Plan, proposing: Proposing, studio: Studio) -> list[Explored]:
    found = [Explored(asked=one, own=own) for one, own in zip(part, studio.scores([(one, one.prompt) for one in part]))]
    for number in range(1, plan.rounds + 1):
        pasts = [Past(prompt=one.asked.prompt, own=dict(one.own), best=_best(one, plan), round=number) for one in found]
        fresh = [(one, text) for one, texts in zip(found, proposing(pasts, plan.proposals), strict=True)
                 for text in _new(one, texts, studio)]
        for (one, text), scores in zip(fresh, studio.scores([(one.asked, text) for one, text in fresh]), strict=True):
            one.texts[text] = (number, scores)
    return found


def _new(one: Explored, texts: Sequence[str], studio: Studio) -> Iterator[str]:
    """Texts that were not tried before; a text that the generator would cut is counted and left out."""
    for text in dict.fromkeys(texts):
        if text and text != one.asked.prompt and text not in one.texts:
            if studio.fits(text):
                yield text
            else:
                one.cut += 1


def _best(one: Explored, plan: Plan) -> tuple[tuple[str, Scores], ...]:
    ranked = [(value, text) for text, (_, scores) in one.texts.items() if (value := plan.score(scores)) is not None]
    ranked.sort(key=lambda pair: -pair[0])  # stable: of equals the earlier one
    return tuple((text, one.texts[text][1]) for _, text in ranked[:plan.parents])


def targets(found: Sequence[Explored], score: Score) -> list[dict]:
    """SFT rows (prompt, completion, score, own_score): the highest-scoring text that ``score`` allows, where it scores
    above the user's own prompt. The first of equals.
    """
    rows = []
    for one in found:
        own = score(one.own)
        able = [(value, text) for text, (_, scores) in one.texts.items()
                if (value := score(scores)) is not None and score.allows(text, scores) and (own is None or value > own)]
        if able:
            value, text = max(able, key=lambda pair: pair[0])
            rows.append({"prompt": one.asked.prompt, "completion": text, "score": value, "own_score": own})
    return rows


def pairs(found: Sequence[Explored], rule: Pairs) -> list[dict]:
    """DPO rows (prompt, chosen, rejected and their scores) among each prompt's candidates."""
    rows = []
    for one in found:
        candidates = [(text, scores) for text, (_, scores) in one.texts.items()]
        for w, l in rule(candidates):
            rows.append({"prompt": one.asked.prompt, "chosen": candidates[w][0], "rejected": candidates[l][0],
                         "chosen_score": rule.score(candidates[w][1]), "rejected_score": rule.score(candidates[l][1])})
    return rows
