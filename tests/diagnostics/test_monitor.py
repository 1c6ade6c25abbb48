"""The online rule for spikes, on sequences whose spikes are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.diagnostics.monitor import SpikeMonitor


def judged(values, **options):
    monitor = SpikeMonitor(**options)
    return [i for i, value in enumerate(values) if monitor.add(float(value)) is not None]


def losses(n=400, deviation=0.05, seed=0):
    return 2 + 4 * (1 + np.arange(n) / 10) ** -0.5 + deviation * np.random.default_rng(seed).standard_normal(n)


def test_a_spike_is_told_at_its_step_and_only_there():
    values = losses()
    values[200:203] += 2
    assert judged(values) == [200, 201, 202]
    monitor = SpikeMonitor()
    for value in values[:200]:
        monitor.add(float(value))
    spike = monitor.add(float(values[200]))
    assert spike.level == pytest.approx(float(np.median(values[184:200]))) and spike.level < spike.limit < spike.value
    assert spike.deviations > 10


def test_what_is_not_finite_is_told_at_once_even_in_the_warmup():
    assert judged([1.0, math.nan, 1.0, math.inf]) == [1, 3]


def test_a_new_level_is_taken_after_some_steps():
    values = losses()
    values[200:] += 2
    assert judged(values, patience=20) == list(range(200, 220))


def test_a_falling_loss_is_no_spike():
    assert judged(losses()) == [] and judged(np.linspace(10, 1, 300)) == []


def test_small_leaps_in_a_quiet_run_are_none():
    values = np.full(100, 2.0)
    values[50] = 2.19
    assert judged(values) == []
    values[50] = 2.21  # a tenth of the level
    assert judged(values) == [50]


@pytest.mark.slow
def test_noise_is_hardly_ever_one():
    rng = np.random.default_rng(1)
    normal = sum(len(judged(2 + 0.1 * rng.standard_normal(1000))) for _ in range(20))
    heavy = sum(len(judged(2 + 0.1 * rng.standard_t(4, 1000))) for _ in range(20))
    assert normal <= 2 and heavy <= 30  # of 20,000 steps each


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=100))
def test_any_sequence_is_taken_and_what_is_not_finite_always_told(values):
    found = judged(values)
    assert {i for i, value in enumerate(values) if not math.isfinite(value)} <= set(found)


def test_a_loss_that_is_high_but_no_spike_is_worth_a_look():
    monitor = SpikeMonitor()
    looks = []
    values = losses(200, deviation=0.05)
    values[150] = np.median(values[134:150]) + 0.21  # four deviations
    for i, value in enumerate(values):
        assert monitor.add(float(value)) is None
        looks += [i] if monitor.height > 2.5 else []
    assert 150 in looks and len(looks) <= 12


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25])
def test_a_harder_source_is_a_part_of_the_data(share):
    """Interleaved rows whose loss is always higher: the first few stand out, then they are known."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random(4000) < share, 2.5, 1.0) + 0.03 * rng.standard_normal(4000)
    assert len(judged(values)) <= 0.01 * len(values)


def test_a_height_that_comes_back_hides_no_other_and_no_long_rise():
    rng = np.random.default_rng(0)
    values = np.where(rng.random(1000) < 0.1, 2.5, 1.0) + 0.03 * rng.standard_normal(1000)
    values[700] = 9.0
    assert 700 in judged(values)
    shard = losses()
    shard[200:215] += 2
    assert judged(shard) == list(range(200, 215))


def test_no_loss_yet_is_no_level():
    """Sparse rewards: a loss of 0 for many steps, and then the first advantage."""
    assert judged([0.0] * 40 + [0.5] + [0.0] * 10 + [0.3, -0.4]) == []


def test_height_is_told_before_there_is_enough_to_judge_by():
    monitor = SpikeMonitor()
    for value in (1.4, 1.61, 1.03, 1.5):
        assert monitor.add(value) is None and monitor.height == 0
    assert monitor.add(30.0) is None and monitor.height > 2.5


def test_what_was_before_a_resume_is_compared_with():
    monitor = SpikeMonitor()
    monitor.seed([2.0, math.nan, *losses()[100:164].tolist()])
    assert monitor.add(9.0) is not None
