"""Groups that hold samples of the model: who wins, what the samples see."""

from types import SimpleNamespace

import torch

from diffalign.data.sources import Online, Sampled, SemiPolicy
from diffalign.types import Batch, Cond


class Offline:
    """A stored source of one micro-batch."""

    identity, k, soft, groups, elements = "toy", 3, True, 5, 4

    def __init__(self, batch):
        self.batch = batch

    def take(self, step):
        return [self.batch]

    def prompts(self, step):
        return [[f"prompt {i}" for i in range(self.batch.groups)]]


def stored():
    """A clear win of the second; a tie; one alone and liked; one alone and disliked; padding."""
    utility = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [True, False, False], [False] * 3])
    x0 = torch.arange(15.0).view(5, 3, 1, 1, 1)
    return Batch(x0=x0, cond=Cond(tokens=torch.arange(5.0).view(5, 1, 1), extra={"time_ids": x0.view(5, 3, 1)}),
                 utility=utility, valid=valid, key=torch.tensor([[i, 0] for i in range(5)]), soft=torch.full((5,), 0.5))


def test_winners_beside_samples():
    """The first of a tie has won nothing, nor has a disliked picture; a sample has its winner's prompt and sizes."""
    seen = SimpleNamespace()

    def draw(cond, keys, shape):
        seen.cond, seen.keys = cond, keys
        return torch.full((len(keys), *shape), -1.0)

    batch, = Sampled(Offline(stored()), SemiPolicy(), draw).take(0)
    assert batch.valid.tolist() == [[True, True], [False, False], [True, True], [False, False], [False, False]]
    assert batch.x0[[0, 2]].flatten(1).tolist() == [[1.0, -1.0], [6.0, -1.0]] and batch.soft is None
    assert batch.utility.tolist() == [[1.0, 0.0]] * 5 and batch.cond.extra["time_ids"][0].flatten().tolist() == [1.0, 1.0]
    assert seen.cond.tokens.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0] and seen.cond.extra["time_ids"][0].item() == 1
    assert seen.keys.tolist() == [[i, 0, 0] for i in range(5)]


def test_scored_samples_replace_what_is_stored():
    """A score that is no number leaves its sample out; padding stays padding."""
    def draw(cond, keys, shape):
        return keys[:, -1].float().view(-1, 1, 1, 1).expand(-1, *shape)

    def score(x0, prompts):
        assert prompts[:2] == ["prompt 0", "prompt 0"] and len(prompts) == len(x0) == 10
        scores = x0.flatten().clone()
        scores[2] = torch.nan
        return scores

    batch, = Sampled(Offline(stored()), Online(reward="any", k=2), draw, score).take(0)
    assert batch.valid.tolist() == [[True, True], [False, True], [True, True], [True, True], [False, False]]
    assert batch.utility.tolist() == [[0.0, 1.0]] * 5
