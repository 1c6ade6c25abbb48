"""Intervals and calibration against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation.calibration import reliability, wilson_interval


@given(trials=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_is_scipys(trials, share):
    successes = round(share * trials)
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_halves_lies_between():
    below, half, above = (wilson_interval(wins, 10) for wins in (6, 6.5, 7))
    assert below[0] < half[0] < above[0] and below[1] < half[1] < above[1]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_of_nothing(successes, trials):
    with pytest.raises(ConfigError, match="expected at least one trial"):
        wilson_interval(successes, trials)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_calibration_by_hand():
    """Three pairs at 0.93 (two right), two at -0.71 and 0.73 and one tie: bins (0.9, 0.95], (0.7, 0.75] and [0.5, 0.55]."""
    margins = [logit(0.93), logit(0.93), -logit(0.93), -logit(0.71), logit(0.73), 0.0]
    found = reliability(margins)
    assert found.counts.tolist() == [1, 0, 0, 0, 2, 0, 0, 0, 3, 0]
    assert found.accuracy[[0, 4, 8]] == pytest.approx([0.5, 0.5, 2 / 3])
    assert found.confidence[[0, 4, 8]] == pytest.approx([0.5, 0.72, 0.93])
    assert found.expected_calibration_error == pytest.approx((1 * 0 + 2 * 0.22 + 3 * (0.93 - 2 / 3)) / 6)


def test_ends_of_bins():
    """A bin holds its upper end; a certain choice falls into the last."""
    assert reliability([logit(0.75)], bins=2).counts.tolist() == [1, 0]
    assert reliability([1000.0, -1000.0], bins=10).counts.tolist() == [0] * 9 + [2]
    assert reliability([1000.0, -1000.0]).expected_calibration_error == pytest.approx(0.5)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=60), st.integers(1, 12))
def test_calibration_is_a_plain_loop(margins, bins):
    groups: dict[int, list[tuple[float, float]]] = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        ends = np.linspace(0.5, 1, bins + 1)
        which = next(i for i in range(bins) if confidence <= ends[i + 1] or i == bins - 1)
        groups.setdefault(which, []).append((confidence, 0.5 if margin == 0 else float(margin > 0)))
    expected = sum(
        abs(sum(right for _, right in group) - sum(said for said, _ in group)) for group in groups.values()
    ) / len(margins)
    assert reliability(margins, bins=bins).expected_calibration_error == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("margins", "bins"), [([], 10), ([math.nan], 10), ([1.0], 0)])
def test_calibration_of_nothing(margins, bins):
    with pytest.raises(ConfigError, match="expected at least one of each, all margins finite"):
        reliability(margins, bins=bins)
