"""Keyed randomness: a pure function of (seed, purpose, key), with the right moments."""

import torch

from diffalign import rng


def keys(n, visit=0):
    return torch.stack([torch.arange(n), torch.full((n,), visit)], 1)


def test_values_do_not_depend_on_the_batch():
    whole = rng.normal(0, "noise", keys(10), (3, 2))
    assert torch.equal(rng.normal(0, "noise", keys(10)[7:8], (3, 2))[0], whole[7])
    assert torch.equal(rng.uniform(0, "time", keys(10))[7:8], rng.uniform(0, "time", keys(10)[7:8]))


def test_seed_purpose_and_key_all_matter():
    base = rng.normal(0, "noise", keys(1), (8,))
    for other in (rng.normal(1, "noise", keys(1), (8,)), rng.normal(0, "posterior", keys(1), (8,)),
                  rng.normal(0, "noise", keys(1, visit=1), (8,))):
        assert not torch.equal(base, other)


def test_global_generators_are_neither_read_nor_written():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rng.normal(0, "noise", keys(2), (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(rng.normal(0, "noise", keys(2), (4,)), first)


def test_moments():
    x = rng.normal(0, "noise", keys(200), (500,))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01  # 1e5 numbers: standard errors 0.003 and 0.002
    u = rng.uniform(0, "time", keys(20_000))
    assert abs(u.mean() - 0.5) < 0.008 and u.min() >= 0 and u.max() < 1


def test_golden_values_never_move():
    # a change here would change every run ever made
    assert rng.uniform(0, "time", keys(2)).tolist() == [0.6479144824634898, 0.06843341706940809]
    assert rng.permutation(5, 0, "order", 1).tolist() == [0, 2, 1, 3, 4]
