"""Faults of the optimizer's steps on curves made by hand, and none on the same curves without the fault."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.diagnostics.detect import diagnose
from tests.support.curves_by_hand import N, T, healthy_loss, kinds, log, noisy


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_non_finite(key):
    loss, norm = healthy_loss(), np.ones(N)
    (loss if key == "loss" else norm)[100:] = np.nan
    found = kinds(log(loss, grad_norm=norm))
    assert list(found) == ["non_finite"] and found["non_finite"].step == 101 and found["non_finite"].severity == "error"


def test_the_zero_that_a_nan_becomes():
    loss = healthy_loss()
    loss[100:] = 0
    (found,) = kinds(log(loss)).values()
    assert found.kind == "non_finite" and "logging_nan_inf_filter" in found.advice and found.step == 101


def test_one_skipped_step_of_a_loss_scaler_is_no_fault():
    norm = np.ones(N)
    norm[3] = np.inf
    assert [(one.kind, one.severity) for one in diagnose(log(grad_norm=norm))] == [("non_finite", "info")]


def test_gradient_explosion():
    norm = np.exp(0.2 * np.random.default_rng(1).standard_normal(N))
    norm[180:] *= 200
    found = kinds(log(grad_norm=norm))
    assert list(found) == ["gradient_explosion"] and found["gradient_explosion"].step == 181


def test_a_single_large_gradient():
    """Clipping takes care of it, unless the loss goes with it or it is out of all proportion."""
    norm, loss = np.exp(0.2 * np.random.default_rng(1).standard_normal(N)), healthy_loss()
    norm[180] *= 60
    assert [(one.kind, one.severity) for one in diagnose(log(grad_norm=norm))] == [("gradient_explosion", "info")]
    loss[181] *= 2
    assert kinds(log(loss, grad_norm=norm))["gradient_explosion"].severity == "warning"
    norm[180] *= 20
    assert kinds(log(grad_norm=norm))["gradient_explosion"].severity == "warning"


def test_restarts_whose_loss_answers_are_a_schedule():
    within = T % 75
    rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * within / 75))
    loss = noisy((2 + 4 * (1 + T / 5) ** -0.5) * np.where((T >= 75) & (within < 15), 1.3, 1.0))
    found = [one for one in diagnose(log(loss, learning_rate=rate)) if one.kind == "schedule_fault"]
    assert [(one.severity, one.step, one.last_step) for one in found] == [("info", 76, 226)]
    assert "starts anew 3 times" in found[0].evidence


def test_what_breaks_together_is_told_together():
    loss, norm = healthy_loss(), np.ones(N)
    loss[200:], norm[200:] = np.nan, np.nan
    (found,) = [one for one in diagnose(log(loss, grad_norm=norm)) if one.kind == "non_finite"]
    assert found.evidence == "loss is nan at step 201 and at every one after it; so is grad_norm"


def test_a_rate_of_zero():
    rate = np.full(N, 1e-3)
    rate[200:] = 0
    found = kinds(log(learning_rate=rate))["schedule_fault"]
    assert (found.step, found.severity) == (201, "error") and "0 at 100 of 300 logged steps" in found.evidence
    rate[:] = 0
    assert kinds(log(learning_rate=rate))["schedule_fault"].evidence == "the learning rate is 0 at every step"


def test_a_rate_that_leaps():
    rate, loss = np.full(N, 1e-3), healthy_loss()
    rate[200:] = 2e-2
    assert [(one.kind, one.severity) for one in diagnose(log(learning_rate=rate))] == [("schedule_fault", "info")]
    loss[200:] *= 1.5
    found = kinds(log(loss, learning_rate=rate))
    assert found["schedule_fault"].step == 201 and "from 0.001 to 0.02" in found["schedule_fault"].evidence
    assert "the learning rate goes from 0.001 to 0.02" in found["spike_sustained"].evidence


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "restarts"])
def test_the_usual_schedules_do_not_leap(schedule):
    from torch import ones
    from torch.nn import Parameter
    from torch.optim import SGD
    from transformers import get_scheduler

    optimizer = SGD([Parameter(ones(1))], lr=1e-3)
    name = {"restarts": "cosine_with_restarts"}.get(schedule, schedule)
    made = get_scheduler(name, optimizer, num_warmup_steps=30, num_training_steps=N)
    rates = []
    for _ in range(N):
        rates.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    assert not kinds(log(learning_rate=rates))
