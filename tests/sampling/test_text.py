"""The sampler of masked text: how many tokens settle at a step, which, in which block; keyed; the model's own distribution."""

from collections import Counter

import pytest
import torch

from diffalign.methods import Context
from diffalign.process import Masking
from diffalign.sampling.text import TextSampler
from diffalign.types import Memory

MASK = 9


def context(predict, seed=0):
    return Context(predict=predict, process=Masking(mask_id=MASK), param=None, seed=seed, step=0, memory=Memory())


class Model:
    """Word = place modulo 8; surer of later places. Keeps what it was asked."""

    def __init__(self, scale=1.0):
        self.asked, self.scale = [], scale

    def __call__(self, name, xt, t, cond):
        self.asked.append(xt.clone())
        places = (xt == MASK).nonzero()[:, 1]
        logits = torch.zeros(len(places), 10)
        logits[torch.arange(len(places)), places % 8] = self.scale * (1.0 + places.float())
        return logits


def run(prompts=((7, 7),), seed=0, keys=None, scale=1.0, **options):
    model = Model(scale)
    keys = torch.arange(len(prompts))[:, None] if keys is None else keys
    found = TextSampler(**{"length": 6, "steps": 6, **options})(context(model, seed), "current", prompts, keys)
    return found, model.asked


def test_the_surest_stay_first():
    found, asked = run()
    assert found == [[2, 3, 4, 5, 6, 7]]  # places 2 to 7
    left = [(x == MASK)[0, 2:].int().tolist() for x in asked]
    assert left == [[1] * k + [0] * (6 - k) for k in range(6, 0, -1)]


def test_several_a_step_and_blocks():
    _, asked = run(steps=4)
    # six tokens in four steps: 2, 2, 1, 1
    assert [int((x == MASK).sum()) for x in asked] == [6, 4, 2, 1]
    _, asked = run(steps=2, block=3)
    assert [(x == MASK)[0, 2:].int().tolist() for x in asked] == [[1] * 6, [0, 0, 0, 1, 1, 1]]


def test_rows_do_not_depend_on_their_batch():
    options = {"temperature": 1.0, "remasking": "random", "scale": 0.2}
    prompts = ((7, 7), (1,), (2, 3, 4, 5))
    together, _ = run(prompts, **options)
    assert [run(prompts[i:i + 1], keys=torch.tensor([[i]]), **options)[0][0] for i in range(3)] == together
    assert run(prompts, **options)[0] == together and run(prompts, seed=1, **options)[0] != together


def test_random_remasking_draws_from_the_model():
    """Two tokens that must agree, 0 0 with 0.3 and 1 1 with 0.7: only a sampler that follows its own draws keeps that."""
    def predict(name, xt, t, cond):
        rows, places = (xt == MASK).nonzero().T
        other = xt[rows, 3 - places]
        p = torch.tensor([0.3, 0.7] + [0.0] * 8).log().repeat(len(rows), 1)
        known = torch.full((len(rows), 10), -torch.inf).scatter(1, other.clamp(max=9)[:, None], 0.0)
        return torch.where((other == MASK)[:, None], p, known)

    sampler = TextSampler(length=2, steps=2, temperature=1.0, remasking="random")
    found = Counter(map(tuple, sampler(context(predict), "current", [(5,)] * 2000, torch.arange(2000)[:, None])))
    assert set(found) == {(0, 0), (1, 1)} and found[1, 1] / 2000 == pytest.approx(0.7, abs=0.04)
    likely = Counter(map(tuple, TextSampler(length=2, steps=2, temperature=0.0)(
        context(predict), "current", [(5,)] * 3, torch.arange(3)[:, None])))
    assert set(likely) == {(1, 1)}


@pytest.mark.parametrize("options", [{"length": 0}, {"block": 4}, {"steps": 7}, {"steps": 3, "block": 3}, {"steps": 0},
                                     {"temperature": -1.0}])
def test_bad_options(options):
    with pytest.raises(ValueError):
        TextSampler(**{"length": 6, "steps": 6, **options})
