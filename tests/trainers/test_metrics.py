"""Metrics between two logs: sums over tokens, divided once."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from hf_objectives.losses.ppo import Moments, PolicyLoss, ValueLoss
from hf_objectives.trainers.metrics import PairMetrics, PolicyMetrics


def losses(*values: float):
    return (torch.tensor(value) for value in values)


def test_means_are_over_the_tokens_of_all_micro_batches():
    figures = PolicyMetrics()
    # Returns 1, 2 and 5 under values 1, 2 and 4: errors 0, 0 and 1.
    first = Moments(2, 0, 0), Moments(2, 3, 5)
    second = Moments(1, 1, 1), Moments(1, 5, 25)
    policy, value = PolicyLoss(*losses(3.0, 2.0, 0.3)), ValueLoss(*losses(9.0, 1.0))
    figures.add(torch.tensor([[1, 1, 1]]), torch.tensor(6.0), policy, value, *first)
    policy, value = PolicyLoss(*losses(1.0, 0.0, 0.1)), ValueLoss(*losses(3.0, 1.0))
    figures.add(torch.tensor([[1, 0, 0]]), torch.tensor(2.0), policy, value, *second)
    found = figures.take()
    # Variances 2/9 of the errors and 26/9 of the returns.
    expected = {
        "policy_loss": 1.0, "value_loss": 3.0, "entropy": 2.0, "clip_fraction": 0.5, "value_clip_fraction": 0.5,
        "approx_kl": 0.1, "explained_variance": 1 - 2 / 26, "rewards/failed": 0.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert figures.take() == {}


def test_without_a_critic_and_without_tokens():
    figures = PolicyMetrics()
    figures.failures = 3
    assert figures.take() == {"rewards/failed": 3.0}
    figures.add(torch.tensor([[1]]), torch.tensor(2.0), PolicyLoss(*losses(1.0, 0.0, 0.0)), None)
    found = figures.take()
    assert found["value_loss"] == 0 and "explained_variance" not in found
    assert all(math.isfinite(value) for value in found.values())


def test_the_warning_needs_a_fall_and_a_growing_margin(caplog):
    steps = [  # chosen, rejected, tokens of each, pairs
        ([-1.0, -2.0, 100, 100, 4], False),  # a fall of 0.01 only
        ([-30.0, -30.1, 100, 100, 4], False),  # a margin that is smaller than before
        ([-30.0, -90.0, 100, 100, 4], True),
        ([-60.0, -300.0, 100, 100, 4], False),  # said once
    ]
    drift, silent = PairMetrics(0.1), PairMetrics(None)
    for sums, warns in steps:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for one in (drift, silent):
                one.add(torch.tensor(sums, dtype=torch.float64))
            figures = drift.take(3)
            silent.take(3)
        assert figures["logps_change/chosen"] == sums[0] / 100
        assert len(caplog.records) == int(warns)
    assert drift.take(4) == {}
