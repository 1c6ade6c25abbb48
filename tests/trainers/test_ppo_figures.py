"""What PPO logs between two steps: sums over tokens, divided once."""

from __future__ import annotations

import math

import pytest
import torch

from hf_objectives.losses.ppo import PolicyLoss, ValueLoss
from hf_objectives.trainers.ppo_figures import StepFigures


def losses(*values: float):
    return (torch.tensor(value) for value in values)


def test_means_are_over_the_tokens_of_all_micro_batches():
    figures = StepFigures()
    figures.add(
        torch.tensor([[1, 1, 1]]), torch.tensor(6.0), PolicyLoss(*losses(3.0, 2.0, 0.3)), ValueLoss(*losses(9.0, 1.0))
    )
    figures.add(
        torch.tensor([[1, 0, 0]]), torch.tensor(2.0), PolicyLoss(*losses(1.0, 0.0, 0.1)), ValueLoss(*losses(3.0, 1.0))
    )
    figures.add_returns(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 1, 0]]))
    figures.add_returns(torch.tensor([[5.0, 7.0]]), torch.tensor([[4.0, 9.0]]), torch.tensor([[1, 0]]))
    found = figures.take()
    # Errors 0, 0, 1 and returns 1, 2, 5: variances 2/9 and 26/9.
    expected = {
        "policy_loss": 1.0, "value_loss": 3.0, "entropy": 2.0, "clip_fraction": 0.5, "value_clip_fraction": 0.5,
        "approx_kl": 0.1, "explained_variance": 1 - 2 / 26, "rewards/failed": 0.0,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert figures.take() == {}


def test_without_a_critic_and_without_tokens():
    figures = StepFigures()
    figures.failures = 3
    assert figures.take() == {"rewards/failed": 3.0}
    figures.add(torch.tensor([[1]]), torch.tensor(2.0), PolicyLoss(*losses(1.0, 0.0, 0.0)), None)
    found = figures.take()
    assert found["value_loss"] == 0 and "explained_variance" not in found
    assert all(math.isfinite(value) for value in found.values())
