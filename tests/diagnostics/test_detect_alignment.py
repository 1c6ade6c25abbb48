"""Faults of preference and reinforcement learning on curves made by hand, and none without the fault."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.diagnostics.detect import diagnose
from tests.support.curves_by_hand import N, T, kinds, log, noisy, policy


def test_falling_chosen():
    curves = {"rewards__margins": np.linspace(0, 2, N), "logps__chosen": noisy(np.linspace(-100, -130, N))}
    loss = noisy(np.linspace(0.69, 0.4, N))
    assert list(kinds(log(loss, **curves))) == ["falling_chosen"]
    assert not kinds(log(loss, **{**curves, "logps__chosen": noisy(np.full(N, -100.0))}))


def test_a_policy_that_learns_has_no_finding():
    assert diagnose(policy()) == []


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("reward_hacking", {"kl": noisy(0.5 * np.exp(5 * (T / N) ** 2))}),
        ("entropy_collapse", {"entropy": noisy(np.where(T < 150, 2.0, 0.05))}),
        ("length_growth", {"completions__mean_length": noisy(100 + T), "completions__clipped_ratio": T / N}),
        ("length_growth", {"completions__mean_length": noisy(100 + T), "reward": noisy(np.full(N, 0.3))}),
    ],
)
def test_a_policy_that_runs_away(kind, changed):
    assert list(kinds(policy(**changed))) == [kind]


def test_answers_that_grow_with_their_reward_are_worth_knowing():
    (found,) = diagnose(policy(completions__mean_length=noisy(100 + T)))
    assert (found.kind, found.severity) == ("length_growth", "info") and "; reward 0." in found.evidence
