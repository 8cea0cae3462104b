"""RELIABILITY A4: the row order is a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import rng
from diffalign.data.order import BLOCK, Order

CASES = st.fixed_dictionaries({
    "sizes": st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum), "seed": st.integers(0, 2**40),
    "batch": st.integers(1, 5), "accumulation": st.integers(1, 4), "world": st.integers(1, 4), "step": st.integers(0, 60)})


@settings(max_examples=500, deadline=None, derandomize=True)
@given(CASES)
def test_order_is_pure_exact_and_independent_of_the_world(case):
    size = case["batch"] * case["accumulation"] * case["world"]
    order = Order(case["sizes"], seed=case["seed"], groups_per_step=size)
    walked = [order.at(step) for step in range(case["step"] + 1)]
    streams = {bucket: [] for bucket in range(len(case["sizes"]))}
    for place in walked:
        assert len(place.rows) == size
        streams[place.bucket] += zip(place.visits.tolist(), place.rows.tolist(), strict=True)
    for bucket, read in streams.items():  # every visit is a permutation (a prefix of one, in the visit under way)
        n = case["sizes"][bucket]
        if n == 0:
            assert not read
            continue
        assert [visit for visit, _ in read] == [i // n for i in range(len(read))]
        for start in range(0, len(read), n):
            rows = [row for _, row in read[start:start + n]]
            assert len(set(rows)) == len(rows) and set(rows) <= set(range(n))
    jumped = Order(case["sizes"], seed=case["seed"], groups_per_step=size).at(case["step"])
    assert jumped.bucket == walked[-1].bucket
    np.testing.assert_array_equal(jumped.rows, walked[-1].rows)
    np.testing.assert_array_equal(jumped.visits, walked[-1].visits)
    ranks = [jumped.part(rank, case["world"]) for rank in range(case["world"])]
    cut = [micro for rank in ranks for micro in rank.micro_batches(case["accumulation"])]
    assert all(len(micro.rows) == case["batch"] for micro in cut)
    np.testing.assert_array_equal(np.concatenate([micro.rows for micro in cut]), jumped.rows)
    np.testing.assert_array_equal(np.concatenate([micro.visits for micro in cut]), jumped.visits)


def test_buckets_get_their_share():
    """Sizes 30, 20, 10 of 60: after 6 steps the buckets had 3, 2, 1 of them, and after any s nearly s/2, s/3, s/6."""
    order, taken = Order([30, 20, 10], seed=0, groups_per_step=4), [0, 0, 0]
    for step in range(600):
        taken[order.at(step).bucket] += 1
        for got, n in zip(taken, (30, 20, 10), strict=True):
            assert abs(got - (step + 1) * n / 60) < 1 + 1e-9
    assert taken == [300, 200, 100]


def test_the_rule_over_many_steps():
    """Two thousand steps and more by the rule as it is said, walked and jumped to: blocks of steps leave no seam."""
    sizes, seed, taken = [7, 0, 19, 5], 11, [0, 0, 0, 0]
    order = Order(sizes, seed=seed, groups_per_step=3)
    for step in range(2 * BLOCK + 100):
        deficits = [(step + 1) * n - 31 * had for n, had in zip(sizes, taken, strict=True)]
        bucket = deficits.index(max(deficits))
        if step % 97 == 0 or step % BLOCK in (0, BLOCK - 1):
            visit, inside = divmod(3 * taken[bucket], sizes[bucket])
            first = rng.permutation(sizes[bucket], seed, "order", bucket, visit)[inside]
            for place in (order.at(step), Order(sizes, seed=seed, groups_per_step=3).at(step)):
                assert (place.bucket, place.visits[0], place.rows[0]) == (bucket, visit, first)
        taken[bucket] += 1
    assert order.at(5).rows.tolist() == Order(sizes, seed=seed, groups_per_step=3).at(5).rows.tolist()  # backwards


@pytest.mark.parametrize("n", [1, 2, 100, 70_000])
def test_rows_are_those_of_the_permutation(n):
    """In numbers of 32 bits, the swaps are the same."""
    rows = Order([n], seed=3, groups_per_step=n).at(2).rows
    np.testing.assert_array_equal(rows, rng.permutation(n, 3, "order", 0, 2))


def test_visits_differ_and_seeds_differ():
    first, second = (Order([64], seed=3, groups_per_step=64).at(step).rows for step in (0, 1))
    other = Order([64], seed=4, groups_per_step=64).at(0).rows
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


def test_an_empty_data_set_has_no_order():
    with pytest.raises(ValueError, match="empty"):
        Order([0], seed=0, groups_per_step=1)
