"""Faults of the training loss on curves made by hand, and none on the same curves without the fault."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from hf_objectives.diagnostics.detect import diagnose
from tests.support.curves_by_hand import N, T, healthy_loss, kinds, log, noisy


def test_spike_recovered():
    loss = healthy_loss()
    loss[150:153] *= 2.5
    (found,) = kinds(log(loss)).values()
    assert (found.kind, found.step, found.last_step, found.severity) == ("spike_recovered", 151, 153, "warning")
    assert "before step 151" in found.evidence and "back after 3 logged steps" in found.evidence


def test_spike_sustained_names_what_else_happened_there():
    loss, norm = healthy_loss(), np.ones(N)
    loss[200:] *= 2
    norm[200] = 30
    found = kinds(log(loss, grad_norm=norm))["spike_sustained"]
    assert (found.step, found.last_step, found.severity) == (201, 300, "error")
    assert "gradient norm 30, usually 1" in found.evidence


def test_spike_at_a_resume_says_so():
    history = log()
    loss = healthy_loss()
    loss[200:] += 3
    again = [line for line in log(loss) if line["step"] > 200]
    found = kinds([line for line in history if line["step"] <= 230] + again)["spike_sustained"]
    assert found.step == 201 and "the run was resumed there" in found.evidence


def test_a_spike_at_the_very_end_is_not_judged():
    loss = healthy_loss()
    loss[-2:] *= 3
    assert [(one.kind, one.severity) for one in diagnose(log(loss))] == [("spike_recovered", "info")]


def test_plateau():
    found = kinds(log(noisy(2 + 3 * np.exp(-T / 5))))
    assert list(found) == ["plateau"] and 15 <= found["plateau"].step <= 121 and found["plateau"].last_step == 300


def test_a_plateau_with_correlated_noise():
    """Neighbours that go together make the blocks of a standing loss wander; that is no rise."""
    found = []
    for seed in range(45, 60):
        draws = np.random.default_rng(seed).standard_normal(N + 50)
        noise = lfilter([np.sqrt(1 - 0.8**2)], [1, -0.8], draws)[50:]
        found += kinds(log((3 + 0.8 * np.exp(-T / 8)) * (1 + 0.03 * noise)))
    assert set(found) == {"plateau"} and len(found) >= 5


@pytest.mark.parametrize(("start", "slope", "severity"), [(8.0, 0.0, "warning"), (3.0, 0.5, "error")])
def test_not_decreasing(start, slope, severity):
    found = kinds(log(noisy(start * (1 + slope * T / N))))
    assert list(found) == ["not_decreasing"] and found["not_decreasing"].severity == severity


@pytest.mark.parametrize(("start", "fall"), [(1.2, 0.0), (2.1, 0.0), (2.1, 0.015), (2.9, 0.01)])
def test_a_trained_model_with_little_to_learn_is_no_fault(start, fall):
    found = diagnose(log(noisy(start * (1 - fall * T / N))))
    assert all(one.severity == "info" for one in found)
    assert all("knew such text before, or nothing is trained" in one.evidence for one in found)


def test_the_first_steps_of_a_noisy_fine_tuning_are_no_spike():
    """Losses of a 135M model on real instructions, four rows a step; nothing is wrong."""
    first = [1.34, 2.38, 1.63, 1.97, 1.92, 1.66, 1.62, 2.21, 1.5, 1.85, 1.14, 1.31, 1.67, 1.65, 1.78, 1.76, 1.67, 1.54]
    rest = [1.77, 1.57, 1.94, 1.75, 1.69, 1.69, 1.77, 1.35, 1.42, 1.5, 2.14, 1.34, 2.05, 1.42, 1.65, 1.71, 1.47, 1.73]
    losses = first + rest
    for n in range(2, len(losses) + 1):
        assert not kinds([{"step": i + 1, "loss": loss} for i, loss in enumerate(losses[:n])]), n


def test_few_points_that_rise():
    rising = [2.0, 2.9, 3.1, 4.4, 6.0, 7.3, 9.0]
    assert kinds([{"step": 500 * i, "loss": x} for i, x in enumerate(rising)])["not_decreasing"].severity == "error"
    leaps = [1.7, 1.72, 1.69, 1.71, 1.68, 1.7, 1.73, 50.0, 51.0, 49.0, 50.5, 52.0, 50.0, 49.5, 51.5]
    assert "not_decreasing" in kinds([{"step": 500 * i, "loss": x} for i, x in enumerate(leaps)])
    assert not kinds([{"step": 500 * i, "loss": x} for i, x in enumerate(rising[::-1])])
    assert not kinds([{"step": 500 * i, "loss": x} for i, x in enumerate([2.0, 2.1, 1.9, 2.2, 2.0, 2.1, 2.15])])


def test_a_slow_fall_in_heavy_noise_is_a_fall():
    assert not kinds(log(noisy(3 - 0.25 * T / N, deviation=0.05)))


def test_many_spikes_are_told_once():
    loss = healthy_loss()
    loss[60::20] *= 2.5
    spikes = [one for one in diagnose(log(loss)) if one.kind == "spike_recovered" and one.severity == "warning"]
    assert len(spikes) == 1 and spikes[0].evidence.startswith("12 spikes, the first: ")
    assert (spikes[0].step, spikes[0].last_step) == (61, 281)


def test_nothing_has_a_gradient():
    found = kinds(log(noisy(np.full(N, 2.5)), grad_norm=np.zeros(N)))["not_decreasing"]
    assert found.severity == "error" and found.evidence == "the gradient norm is exactly 0 at all of 300 logged steps"
