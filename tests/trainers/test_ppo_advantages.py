"""Advantages of a batch by hand: where the score and the penalty go, and what whitening does to which part."""

from __future__ import annotations

import pytest
import torch

from hf_objectives.trainers.ppo_advantages import AdvantageEstimator

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
SCORES = torch.tensor([2.0, 6.0])
KL = torch.tensor([[1.0, -2.0, 9.0], [4.0, 9.0, 9.0]])
VALUES = torch.tensor([[0.5, 1.0, 7.0], [3.0, 7.0, 7.0]])


def of(estimator, *, trains=True, scores=SCORES):
    return estimator.of(scores, KL, VALUES, MASK, kl_coef=0.5, trains=trains)


def test_by_hand():
    """Token rewards are -0.5, 1 + 2 and -2 + 6.

    Backwards, with γ = 1 and λ = 0.5: A = 3 - 1 = 2, then -0.5 + 1 - 0.5 + 0.5 * 2 = 1; and 4 - 3 = 1.
    """
    found = of(AdvantageEstimator(1.0, 0.5, False, False))
    assert found.plain.tolist() == [[1, 2, 0], [1, 0, 0]] and found.trained is found.plain
    assert found.returns.tolist() == [[1.5, 3, 0], [4, 0, 0]]
    white = of(AdvantageEstimator(1.0, 0.5, False, True))
    # Mean 4/3, deviations -1/3, 2/3, -1/3, variance 2/9.
    expected = [-1 / 3 / (2 / 9) ** 0.5, 2 / 3 / (2 / 9) ** 0.5, 0, -1 / 3 / (2 / 9) ** 0.5, 0, 0]
    assert white.trained.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(white.plain, found.plain) and torch.equal(white.returns, found.returns)


def test_rewards_are_whitened_by_the_last_batch_that_was_trained_on():
    """Token rewards -0.5, 3, 4: mean 13/6, squares 0.25 + 9 + 16. They keep their mean."""
    estimator = AdvantageEstimator(1.0, 1.0, True, False)
    plain = of(AdvantageEstimator(1.0, 1.0, False, False))
    assert torch.equal(of(estimator, trains=False).plain, plain.plain) and estimator.reward_moments == []
    mean = 6.5 / 3
    std = (25.25 / 3 - mean**2) ** 0.5
    white = [(one - mean) / std + mean for one in (-0.5, 3, 4)]
    # With γ = λ = 1 a return is the reward to go.
    expected = [white[0] + white[1], white[1], 0, white[2], 0, 0]
    assert of(estimator).returns.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert estimator.reward_moments == [3, 6.5, 25.25]
    other = of(estimator, trains=False, scores=torch.tensor([0.0, 0.0]))  # -0.5, 1, -2 on the scale of before
    white = [(one - mean) / std + mean for one in (-0.5, 1, -2)]
    expected = [white[0] + white[1], white[1], 0, white[2], 0, 0]
    assert other.returns.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert estimator.reward_moments == [3, 6.5, 25.25]
