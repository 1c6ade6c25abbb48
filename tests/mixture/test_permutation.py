"""Permutations that are looked up: each number once, whatever part is asked for, and no order more likely than another."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.mixture import permutation
from hf_objectives.mixture.permutation import permuted


@pytest.fixture(params=["written down", "looked up"])
def way(request, monkeypatch):
    if request.param == "looked up":
        monkeypatch.setattr(permutation, "_SHORT", 0)


@pytest.mark.parametrize("size", [*range(1, 70), 1_000, 4_097, 20_000])
def test_every_number_once(way, size):
    assert np.array_equal(np.sort(permuted(np.arange(size), size, (3, size))), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(1, 10**12), key=st.lists(st.integers(0, 2**32), min_size=1, max_size=3), data=st.data())
def test_any_part_at_any_time(size, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    if size > 1 << 14:  # shorter ones are written down
        some = permuted(positions, size, key)
        assert ((some >= 0) & (some < size)).all()
        assert len(set(some.tolist())) == len(set(positions.tolist()))
        assert permuted(positions[::-1], size, key)[::-1].tolist() == some.tolist()


def test_keys_give_other_orders(way):
    orders = {tuple(permuted(np.arange(50), 50, key).tolist()) for key in ([1], [2], [1, 0, 1], [1, 1])}
    assert len(orders) == 4


@pytest.mark.parametrize("size", [3, 4])
def test_short_orders_are_equally_likely(size):
    # chi-square with 23 degrees of freedom is over 53 once in 2,500 times, with 5 over 22 once in 2,000.
    draws = 12_000
    counts = Counter(tuple(permuted(np.arange(size), size, [5, key]).tolist()) for key in range(draws))
    orders = list(itertools.permutations(range(size)))
    expected = draws / len(orders)
    assert sum((counts[order] - expected) ** 2 / expected for order in orders) < {3: 22, 4: 53}[size]


def test_long_orders_look_like_any_other():
    size = 100_000
    order = permuted(np.arange(size), size, [11])
    # Neighbours are as far apart as strangers, (n + 1) / 3 on average, and the number of cycles' fixed points is about one.
    assert abs(np.abs(np.diff(order)).mean() / (size / 3) - 1) < 0.01
    fixed = [int((permuted(np.arange(20_000), 20_000, [key]) == np.arange(20_000)).sum()) for key in range(60)]
    assert 0.5 < np.mean(fixed) < 1.6
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.02
