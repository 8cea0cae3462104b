"""Which pictures come next: the least compared model, the opponents K-Sort Arena would choose, a prompt not yet judged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, product

import numpy as np

from .. import rng
from ..evaluate.ratings import KSort, matchmake
from .gallery import Entry, Gallery
from .spec import ArenaSpec
from .store import Ballot, Record, new_id, now

SKILLS = KSort(full_pairs=3)  # the printed rule up to four pictures, and sound beyond


class Ballots:
    """Holds what the choice depends on: skills, meetings, and what each voter has judged. Not thread-safe."""

    def __init__(self, gallery: Gallery, spec: ArenaSpec):
        self.gallery, self.spec = gallery, spec
        self._place = {model: i for i, model in enumerate(gallery.models)}
        self.restart()

    def restart(self, records: list[Record] = ()) -> None:
        """Forgets everything and learns these."""
        size = len(self._place)
        self._skills = [SKILLS.new] * size
        self._met = np.zeros((size, size))
        self._shown: Counter[str] = Counter()
        self._prompts: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by voter
        self._judged: defaultdict[str, set[frozenset]] = defaultdict(set)  # by voter, sets of pictures
        for record in records:
            self.learn(record)

    def learn(self, record: Record) -> None:
        """Takes a vote into account; models that have left the gallery no longer matter."""
        ballot, vote = record.ballot, record.vote
        self._shown[ballot.prompt] += 1
        self._prompts[ballot.voter][ballot.prompt] += 1
        self._judged[ballot.voter].add(frozenset(zip(ballot.models, ballot.images)))
        if vote is None:
            return
        known = [(self._place[model], rank) for model, rank in zip(vote.models, vote.ranks or [0] * len(vote.models))
                 if model in self._place]
        ids = [place for place, _ in known]
        self._met[np.ix_(ids, ids)] += 1 - np.eye(len(ids))
        if vote.ranks is not None and len(ids) > 1:
            for i, skill in zip(ids, SKILLS.update([self._skills[i] for i in ids], [rank for _, rank in known])):
                self._skills[i] = skill

    def next(self, voter: str, number: int) -> Ballot | None:
        """A new ballot, in the order to be shown; None when the voter has judged all there is. number: keys the lots."""
        draw = rng.generator(self.spec.seed, "arena", number)
        lot = dict(zip(self.gallery.prompts, draw.random(len(self.gallery.prompts))))
        order = sorted(self.gallery.prompts, key=lambda p: (self._prompts[voter][p], self._shown[p], lot[p]))
        rank = np.argsort(np.lexsort((draw.random(len(self._place)), self._met.sum(1))))  # place among the least compared
        for pivot in sorted(self._place, key=lambda model: rank[self._place[model]]):
            for prompt in order:
                models = self.gallery.prompts[prompt]
                if pivot in models and len(models) > 1:
                    for group in self._groups(models, pivot, draw):
                        for chosen in self._sets(prompt, group, draw):
                            if frozenset((e.model, e.picture.sha256) for e in chosen) not in self._judged[voter]:
                                return self._ballot(prompt, chosen, voter, draw)
        return None

    def progress(self, voter: str) -> dict[str, int]:
        """votes: ballots answered. seen, prompts: prompts this voter has answered, of how many."""
        seen = self._prompts[voter]
        return {"votes": seen.total(), "seen": sum(seen[prompt] > 0 for prompt in self.gallery.prompts),
                "prompts": len(self.gallery.prompts)}

    def _groups(self, models: dict[str, list[Entry]], pivot: str, draw: np.random.Generator) -> Iterator[list[str]]:
        """The pivot with its opponents, of those with a picture of the prompt: the best choice first, then all others."""
        names = sorted(models)
        ids = [self._place[name] for name in names]
        scores = np.asarray([SKILLS.score(self._skills[i]) for i in ids])
        _, *order = matchmake(scores, self._met[np.ix_(ids, ids)], len(names), draw, pivot=names.index(pivot))
        for opponents in combinations(order, min(self.spec.k, len(names)) - 1):
            yield [pivot, *(names[i] for i in opponents)]

    def _sets(self, prompt: str, models: list[str], draw: np.random.Generator) -> Iterator[tuple[Entry, ...]]:
        """Every set of one picture each, in an order of lots: of the first model's seed where a model has one of it."""
        table = self.gallery.prompts[prompt]
        for first in _in_lots(table[models[0]], draw):
            same = ([entry for entry in table[model] if entry.seed is not None and entry.seed == first.seed]
                    for model in models[1:])
            others = [_in_lots(own or table[model], draw) for model, own in zip(models[1:], same)]
            yield from product([first], *others)

    def _ballot(self, prompt: str, chosen: Sequence[Entry], voter: str, draw: np.random.Generator) -> Ballot:
        shown = [chosen[i] for i in draw.permutation(len(chosen))]
        return Ballot(id=new_id(), prompt=prompt, models=tuple(entry.model for entry in shown),
                      images=tuple(entry.picture.sha256 for entry in shown), voter=voter, criteria=self.spec.criteria,
                      issued=now())


def _in_lots(entries: Sequence[Entry], draw: np.random.Generator) -> list[Entry]:
    return [entries[i] for i in draw.permutation(len(entries))]
