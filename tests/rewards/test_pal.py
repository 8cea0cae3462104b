"""PAL's checks with numbers (the method card's 1 to 8), and planted tastes from end to end."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from diffalign.config import load_reward
from diffalign.data.spec import DataSpec
from diffalign.errors import ConfigError, ModelError
from diffalign.reward_training import RewardRecipe, train_reward
from diffalign.rewards.base import judged
from diffalign.rewards.heads import BradleyTerry, hinge, logistic
from diffalign.rewards.learned import Learned, Pal
from diffalign.rewards.pal import PalAngle, PalDistance, angle_score, distance_score, mixture

from .toy_clip import flat, make_clip, write_pairs


def test_distance_score_by_hand():
    """Ideal (1, 0), left (2, 0), right (0, 2): distances 1 and 2.236068, so left wins by 1.236068: hinge 0, logistic 0.255049,
    P(left) 0.774879. The sign of the distances is the trap: the nearer must win.
    """
    ideal = torch.tensor([[1.0, 0.0]])
    margin = distance_score(torch.tensor([[2.0, 0]]), ideal) - distance_score(torch.tensor([[0.0, 2]]), ideal)
    left = torch.ones(1)
    assert margin.item() == pytest.approx(1.236068, abs=1e-6)
    assert hinge(margin, left).item() == 0 and logistic(margin, left).item() == pytest.approx(0.255049, abs=1e-6)
    assert margin.sigmoid().item() == pytest.approx(0.774879, abs=1e-6)


def test_mixture_by_hand():
    """Prototypes (1, 0) and (0, 1): the even mixture lies 1.581139 from both pictures, (0.9, 0.1) 1.104536 and 2.102380."""
    pictures, points = torch.tensor([[2.0, 0], [0, 2]]), torch.eye(2)
    even, left = (mixture(torch.tensor([w, w]), points) for w in ([0.5, 0.5], [0.9, 0.1]))
    assert distance_score(pictures, even).tolist() == pytest.approx([-1.581139] * 2, abs=1e-6)
    assert distance_score(pictures, left).tolist() == pytest.approx([-1.104536, -2.102380], abs=1e-6)
    each = points.expand(2, 2, 2)  # the same points given for each row
    assert torch.equal(mixture(torch.tensor([[0.9, 0.1]] * 2), each), left)


def test_weights_are_a_softmax():
    """(0, ln 9) -> (0.1, 0.9); the mean of two users; -1, a user nobody has seen, gets the mean."""
    head = PalDistance(hidden=4).make(3, 0.0, ["a", "b"])
    with torch.no_grad():
        head.user_logits.copy_(torch.tensor([[0, math.log(9)], [0, 0]]))
    found = head.user_weights(torch.tensor([0, 1, -1]))
    assert torch.allclose(found, torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.3, 0.7]]))
    assert PalAngle(hidden=4, prototypes=4).make(3, 0.0).user_weights(torch.tensor([-1])).tolist() == [[0.25] * 4]


def test_angle_score_by_hand():
    """f(x) = (3, 4): cosines 0.6 and 0.8 with the axes, times exp(2.659260) = 14.285714; clamped at 100."""
    scale = torch.tensor(2.659260)
    found = angle_score(torch.tensor([[3.0, 4]] * 2), torch.eye(2), scale)
    assert found.tolist() == pytest.approx([8.571429, 11.428571], abs=1e-5)
    for scale in (9.0, 4.605170):
        clamped = angle_score(torch.tensor([[3.0, 4]]), torch.eye(2)[:1], torch.tensor(scale))
        assert clamped.item() == pytest.approx(60, abs=1e-4)


SMALL = {"hidden": 8, "dimension": 4}
HEADS = [PalDistance(**SMALL), PalDistance(**SMALL, loss="hinge"), PalAngle(**SMALL)]


@pytest.mark.parametrize("options", HEADS)
def test_swapping_sides_and_label_leaves_the_loss(options):
    torch.manual_seed(0)
    head, loss = options.make(5, 0.0, ["a", "b"]), {"logistic": logistic, "hinge": hinge}[options.loss]
    one, other, text = torch.randn(3, 20, 5)
    weights, target = head.user_weights(torch.arange(20) % 2), torch.rand(20)
    margin = head(one, text, weights) - head(other, text, weights)
    swapped = head(other, text, weights) - head(one, text, weights)
    assert torch.allclose(loss(margin, target), loss(swapped, 1 - target), atol=1e-6)


def test_penalty_by_hand():
    """Images of norms 5 and 2 under a bound of 4: 1. With a bound of 0 it is off."""
    for bound, expected in ((4.0, 1.0), (0.0, 0.0)):
        head = PalDistance(bound=bound).make(2, 0.0, ["a"])
        head.items = nn.Identity()
        head.points.data = torch.tensor([[3.0, 4], [2, 0]])
        assert head.penalty().item() == pytest.approx(expected)


# Planted tastes: half of the users like red, half like blue.

USERS, PAIRS = 40, 20


def planted(seed: int, users: range, count: int) -> list[dict]:
    random, rows = np.random.default_rng(seed), []
    for user in users:
        for _ in range(count):
            a, b = random.choice(np.arange(0, 256, 15), 2, replace=False).tolist()
            rows.append({"jpg_0": a, "jpg_1": b, "label_0": float((a > b) == (user % 2 == 0)), "user_id": user,
                         "caption": f"picture {random.integers(10_000)}"})
    return rows


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def tastes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tastes")
    write_pairs(folder / "train.jsonl", planted(0, range(USERS), PAIRS))
    write_pairs(folder / "held.jsonl", planted(1, range(USERS), 5))
    return folder


def trained(folder, clip, tastes, head):
    data = DataSpec(path=str(tastes / "train.jsonl"), validation=str(tastes / "held.jsonl"))
    recipe = RewardRecipe(output_dir=str(folder), backbone=clip, data=data, head=head, epochs=25, batch_size=80, patience=0,
                          learning_rate=5e-3, balance="users")
    return train_reward(recipe, lambda _: None)


@pytest.fixture(scope="module")
def two(tmp_path_factory, clip, tastes):
    folder = tmp_path_factory.mktemp("two")
    head = PalAngle(prototypes=2, dimension=8, hidden=32, user_learning_rate=0.1)
    return trained(folder, clip, tastes, head), folder / "reward"


def test_one_taste_cannot_serve_two_groups(tmp_path, clip, tastes, two):
    """K = 1 is near a coin, K = 2 above 90 %; users of a group share a prototype and the weights are nearly one-hot."""
    one = trained(tmp_path, clip, tastes, PalAngle(prototypes=1, dimension=8, hidden=32))
    report, folder = two
    assert one["accuracy"]["value"] < 0.6 and report["accuracy"]["value"] > 0.9
    assert (report["unit"], report["users"], report["accuracy"]["prompts"], report["unseen_users"]) == ("user", 40, 40, 0)
    reward = Pal(path=str(folder), user="0")
    weights = reward.trained.head.user_weights(reward.trained.rows([str(user) for user in range(USERS)]))
    even, odd = weights[0::2], weights[1::2]
    assert (even.argmax(1) != odd.argmax(1)).all() and weights.max(1).values.mean() > 0.9


def test_the_distance_head_tells_tastes_apart(tmp_path, clip, tastes):
    head = PalDistance(prototypes=2, dimension=8, hidden=32, user_learning_rate=0.1)
    assert trained(tmp_path, clip, tastes, head)["accuracy"]["value"] > 0.85


def test_a_new_user_costs_a_few_pairs(two):
    """Five pairs, everything but K numbers frozen; both tastes; more than 85 % on 200 further pairs."""
    _, folder = two
    reward = Pal(path=str(folder))
    before = copy.deepcopy(reward.trained.head.state_dict())
    for user in (100, 101):
        rows = planted(7, range(user, user + 1), 205)
        first, second = ([flat(row[side]) for row in rows] for side in ("jpg_0", "jpg_1"))
        prompts, target = [row["caption"] for row in rows], [row["label_0"] for row in rows]
        weights = reward.fit_user(first[:5], second[:5], prompts[:5], target[:5])
        assert sum(weights) == pytest.approx(1)
        assert weights == reward.fit_user(first[:5], second[:5], prompts[:5], target[:5])
        theirs = Pal(path=str(folder), weights=weights)
        margin = theirs(first[5:], prompts[5:]) - theirs(second[5:], prompts[5:])
        assert ((margin > 0) == (torch.tensor(target[5:]) > 0.5)).float().mean() > 0.85
    after = reward.trained.head.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_as_a_reward(two):
    """One user, each row's own, a given mixture, or everybody's mean; the two tastes order the same pictures oppositely."""
    _, folder = two
    images, prompts = [flat(0), flat(120), flat(255)], ["a red circle"] * 3
    red, blue = (Pal(path=str(folder), user=user)(images, prompts) for user in ("0", "1"))
    assert red.argmax() == 2 and blue.argmax() == 0
    by_row = Pal(path=str(folder), by_row=True)
    assert by_row.columns == ("user",) and Pal(path=str(folder)).columns == ()
    mixed = judged(by_row, images, prompts, {"user": ["0", "1", None]})
    assert mixed[:2].tolist() == pytest.approx([red[0].item(), blue[1].item()], abs=1e-5)
    mean = Pal(path=str(folder))
    assert mixed[2].item() == pytest.approx(mean(images, prompts)[2].item(), abs=1e-5)
    weights = mean.trained.head.user_weights(mean.trained.rows(["0"]))[0].tolist()
    given = load_reward({"kind": "pal", "path": str(folder), "weights": weights})
    assert torch.allclose(given(images, prompts), red, atol=1e-5)
    pixels = torch.rand(3, 32, 32, requires_grad=True)
    given([pixels], ["p"]).sum().backward()
    assert given.differentiable and pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [(lambda path: Pal(path=path, user="nobody").check(), ConfigError, "has not seen 'nobody'; it knows 40 users"),
     (lambda path: Pal(path=path, weights=(0.2, 0.3, 0.5)).check(), ConfigError, "has 2 prototypes, got 3 weights"),
     (lambda path: Pal(path=path, weights=(0.2, 0.3)), ValueError, "weights must be at least 0 and sum to 1"),
     (lambda path: Pal(path=path, user="0", by_row=True), ValueError, "exclude each other"),
     (lambda path: Learned(path=path).check(), ModelError, "read it with the reward kind pal"),
     (lambda path: PalAngle(prototypes=0), ValueError, "prototypes must be at least 1"),
     (lambda path: PalDistance(bound=-1.0), ValueError, "bound must be at least 0"),
     (lambda path: BradleyTerry(hidden=-1), ValueError, "hidden must be at least 0")])
def test_bad_options_are_one_line(two, make, error, message):
    with pytest.raises(error, match=message):
        make(str(two[1]))
