"""Faults of the data on curves made by hand, and none on the same curves without the fault."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.diagnostics.detect import diagnose
from tests.support.curves_by_hand import N, T, healthy_loss, kinds, log, noisy


def test_a_loss_of_zero_from_the_first_step_on():
    """What a Trainer logs where every label is masked: no token, no gradient, nothing that looks wrong."""
    lines = [{"step": i + 1, "loss": 0.0, "grad_norm": 0.0} for i in range(40)]
    (found,) = diagnose(lines)
    assert (found.kind, found.severity) == ("few_supervised_tokens", "error")
    assert found.evidence == "the loss is exactly 0 at all of 40 logged steps, and so is the gradient norm"
    filtered = [{**line, "grad_norm": float("nan")} for line in lines]
    assert [one.kind for one in diagnose(filtered)] == ["non_finite"]


@pytest.mark.parametrize("shape", ["rises", "falls", "halves"])
def test_sawtooth(shape):
    phase = (T * 4 / N) % 1
    profile = {"rises": phase - 0.5, "falls": 0.5 - phase, "halves": np.where(phase < 0.5, 0.5, -0.5)}[shape]
    loss = healthy_loss()
    assert "sawtooth" not in kinds(log(loss, epochs=4))
    assert list(kinds(log(loss * (1 + 0.3 * profile), epochs=4))) == ["sawtooth"]


def test_few_supervised_tokens():
    found = kinds(log(num_supervised_tokens=T * 3.0, num_tokens_seen=T * 1000.0))
    assert found["few_supervised_tokens"].evidence == "897 of 299,000 tokens are trained (0.30%)"


def test_mixture_drift():
    shares = {"mixture__web__share": np.linspace(0.7, 0.55, N), "mixture__web__asked": np.full(N, 0.7)}
    found = kinds(log(**shares))
    assert found["mixture_drift"].evidence == "source 'web': 55.0% given, 70.0% asked"
    late = 0.7 - 0.15 * np.maximum(T - 120, 0) / 180 + 0.002 * np.random.default_rng(0).standard_normal(N)
    drifts = kinds(log(mixture__web__share=late, mixture__web__asked=np.full(N, 0.7)))["mixture_drift"]
    assert abs(drifts.step - 121) <= 5
    assert not kinds(log(mixture__web__share=np.full(N, 0.701), mixture__web__asked=np.full(N, 0.7)))


def test_epochs_that_are_learned_by_heart_are_no_sawtooth():
    stairs = 3 * 0.85 ** np.floor(T * 4 / N)
    assert "sawtooth" not in kinds(log(noisy(stairs), epochs=4))
