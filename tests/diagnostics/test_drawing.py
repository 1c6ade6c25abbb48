"""Envelope and trend of long and noisy curves, and the file of a picture."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.diagnostics.drawing import BINS, envelope, trend

RNG = np.random.default_rng(0)


def test_short_curves_stay_as_they_are():
    steps, values = np.arange(5), np.array([1.0, 2.0, 0.0, 5.0, 1.0])
    kept, same = envelope(steps, values)
    assert kept.tolist() == steps.tolist() and same.tolist() == values.tolist()


def test_every_extreme_of_a_span_is_kept():
    steps = np.arange(100_000)
    values = RNG.normal(size=100_000)
    values[41_234], values[77_777] = 50.0, -50.0
    kept, reduced = envelope(steps, values, bins=100)
    assert len(kept) <= 200 and (np.diff(kept) > 0).all()
    for begin in range(0, 100_000, 1000):
        own = reduced[(kept >= begin) & (kept < begin + 1000)]
        assert own.min() == values[begin : begin + 1000].min()
        assert own.max() == values[begin : begin + 1000].max()
    assert (values[kept] == reduced).all()


def test_spans_are_of_steps_and_not_of_points():
    steps = np.concatenate([np.arange(10_000), np.arange(10_000, 1_000_000, 1000)])
    kept, _ = envelope(steps, RNG.normal(size=len(steps)), bins=100)
    assert (kept < 9_000).sum() <= 2 and (kept >= 10_000).sum() > 150


def test_what_is_not_finite_is_a_gap_where_nothing_else_is():
    values = np.ones(10_000)
    values[3] = np.inf  # alone in its span: not seen
    values[5_000:6_000] = np.nan
    kept, reduced = envelope(np.arange(10_000), values, bins=10)
    assert np.flatnonzero(np.isnan(reduced)).size == 1
    assert 5_000 <= kept[np.isnan(reduced)][0] < 6_000
    assert np.isnan(envelope(np.arange(2), np.array([1.0, -np.inf]))[1]).tolist() == [False, True]


def test_a_smoothed_line_has_no_lag():
    steps = np.arange(200)
    at, means = trend(steps, 3.0 * steps + 1)
    assert at.tolist() == steps.tolist()
    assert means == pytest.approx(3.0 * steps + 1)


def test_a_lone_spike_leaves_no_mark():
    values = np.zeros(100)
    values[50] = 11.0
    assert not trend(np.arange(100), values)[1].any()


def test_a_step_stays_where_it_is():
    values = np.where(np.arange(400) < 200, 1.0, 5.0)
    smooth = trend(np.arange(400), values)[1]
    assert (smooth[:194] == 1.0).all() and (smooth[206:] == 5.0).all()


def test_noise_is_much_less_in_the_trend():
    smooth = trend(np.arange(1000), 2.0 + RNG.normal(size=1000))[1]
    # The median of 100 normal values has a standard deviation of sqrt(pi / 2 / 100) = 0.125.
    assert smooth[50:-50].std() < 0.2


def test_a_perplexity_has_the_trend_of_its_loss():
    loss = RNG.normal(3.0, 0.5, 200)
    of_loss = trend(np.arange(200), loss)[1]
    assert trend(np.arange(200), np.exp(loss), geometric=True)[1] == pytest.approx(np.exp(of_loss))
    smooth = trend(np.arange(50), np.where(np.arange(50) == 20, 0.0, 4.0), geometric=True)[1]
    assert np.isnan(smooth[20]) and np.delete(smooth, 20) == pytest.approx(4.0)


def test_what_is_not_finite_counts_for_nothing():
    values = np.full(100, 2.0)
    values[40], values[60] = np.nan, np.inf
    means = trend(np.arange(100), values)[1]
    assert np.flatnonzero(np.isnan(means)).tolist() == [40, 60]
    assert np.delete(means, [40, 60]) == pytest.approx(2.0)


def test_one_huge_value_does_not_spoil_the_rest():
    values = np.full(1000, 2.0)
    values[100] = 1e30
    assert trend(np.arange(1000), values)[1][500:] == pytest.approx(2.0)


def test_long_curves_are_smoothed_over_spans():
    n = 200_000
    at, means = trend(np.arange(n), 5.0 + RNG.normal(size=n))
    assert len(at) == len(means) == BINS
    assert at[0] == pytest.approx((n / BINS - 1) / 2, abs=1)
    assert means[200:-200] == pytest.approx(5.0, abs=0.05)
