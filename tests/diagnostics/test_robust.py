"""Robust figures against distributions whose values are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.diagnostics.robust import block_medians, excursions, noise, trend


def test_noise_is_the_deviation_of_a_normal_one_whatever_the_trend():
    rng = np.random.default_rng(0)
    values = 0.3 * rng.standard_normal(20_000)
    assert noise(values) == pytest.approx(0.3, rel=0.03)
    assert noise(values + np.linspace(0, 500, 20_000)) == pytest.approx(0.3, rel=0.03)
    values[::50] += 100  # a few outliers move it little
    assert noise(values) == pytest.approx(0.3, rel=0.1)
    assert noise(np.ones(2)) == 0


def test_block_medians_by_hand():
    assert block_medians(np.array([1.0, 9, 2, 3, 3, 8]), 2).tolist() == [2, 3]
    assert block_medians(np.array([1.0, 2]), 5).tolist() == [1, 2]


def test_trend_of_a_line_and_of_noise():
    rng = np.random.default_rng(1)
    falls = trend(np.linspace(2, 1, 400) + 0.05 * rng.standard_normal(400))
    assert falls.low < -1 < falls.high and falls.change == pytest.approx(-1, abs=0.05) and falls.p_falls < 1e-6
    flat = trend(0.05 * rng.standard_normal(400))
    assert flat.low < 0 < flat.high and flat.p_falls > 0.01
    assert trend(np.ones(3)).p_falls == 1 and trend(np.ones(100)).p_falls == 1


def curve(n=300, deviation=0.05, seed=0):
    return 3 + deviation * np.random.default_rng(seed).standard_normal(n)


def test_an_excursion_that_comes_back():
    values = curve()
    values[100:104] += 2
    (one,) = excursions(values)
    assert (one.start, one.end, one.back) == (100, 104, True)
    assert one.level == pytest.approx(3, abs=0.05) and one.height == pytest.approx(2, abs=0.2) and one.deviations > 20


def test_an_excursion_that_stays():
    values = curve()
    values[200:] += 1
    (one,) = excursions(values)
    assert (one.start, one.end, one.back) == (200, 300, False)


def test_one_low_value_among_high_ones_is_no_return():
    values = curve()
    values[100:120] += 2
    values[105] -= 2
    (one,) = excursions(values)
    assert (one.start, one.end) == (100, 120)


def test_a_new_level_below_the_limit_of_one_value():
    values = curve(deviation=0.05)
    values[150:] += 0.24  # five deviations: no single value says it, all together do
    found = excursions(values)
    assert found and abs(found[0].start - 150) <= 2 and not found[-1].back


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_noise_alone_is_none(tails):
    rng = np.random.default_rng(2)
    count = 0
    for _ in range(100):
        draws = rng.standard_normal(1000) if tails == "normal" else rng.standard_t(5, 1000)
        count += len(excursions(3 + 0.05 * draws))
    assert count <= (0 if tails == "normal" else 40)  # of 100,000 values


def test_a_falling_curve_is_none():
    t = np.arange(1, 1001)
    assert excursions(2 + 8 * t**-0.5 + 0.02 * np.random.default_rng(3).standard_normal(1000)) == []


@given(st.lists(st.floats(-1e6, 1e6), max_size=80), st.integers(1, 5))
def test_excursions_are_ordered_and_inside(values, most):
    found = excursions(np.array(values), most=most)
    assert len(found) <= most
    edges = [edge for one in found for edge in (one.start, one.end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(values) for edge in edges)
    assert all(one.height > 0 and one.end > one.start for one in found)
