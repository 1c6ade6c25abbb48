"""PPO's arithmetic against plain loops written from the papers, numbers by hand, and sums over small distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.losses.ppo import (
    KL_ESTIMATORS,
    AdaptiveKL,
    Moments,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    token_rewards,
    whiten,
)


@st.composite
def answers(draw, most: int = 6):
    """Lengths of right-padded answers, none at all among them, and a seed for what stands in them."""
    width = draw(st.integers(0, most))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=4))
    return width, lengths, draw(st.integers(0, 2**31))


def mask_of(width: int, lengths: list[int]) -> torch.Tensor:
    return torch.tensor([[int(t < length) for t in range(width)] for length in lengths]).reshape(len(lengths), width)


def random_like(mask: torch.Tensor, seed: int, n: int) -> list[torch.Tensor]:
    """Values on padding too: none of them may count."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(mask.shape, generator=generator) for _ in range(n)]


def close(found: torch.Tensor, expected, tolerance: float = 1e-6) -> bool:
    expected = torch.tensor(expected, dtype=torch.float64).reshape(found.shape)
    return torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


# -- rewards and advantages ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(answers(), st.floats(0, 2))
def test_token_rewards(rows, beta):
    width, lengths, seed = rows
    mask = mask_of(width, lengths)
    (kl,) = random_like(mask, seed, 1)
    scores = torch.arange(1.0, len(lengths) + 1)
    expected = [
        [
            (-beta * float(kl[i, t]) + (float(scores[i]) if t == length - 1 else 0.0)) * (t < length)
            for t in range(width)
        ]
        for i, length in enumerate(lengths)
    ]
    assert close(token_rewards(scores, kl, mask, kl_coef=beta), expected)


def test_the_score_lands_on_the_last_generated_token():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    found = token_rewards(torch.tensor([5.0, 7.0, 9.0, 2.0]), None, mask, kl_coef=0.3)
    assert found.tolist() == [[0, 5, 0], [0, 0, 7], [0, 0, 0], [2, 0, 0]]


def advantages_by_sums(rewards, values, length, gamma, lam):
    """Equation 16 of Schulman et al. (2016) as it stands: each advantage a sum over all that follows."""
    value = [*map(float, values[:length]), 0.0]
    deltas = [float(rewards[t]) + gamma * value[t + 1] - value[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@settings(deadline=None, max_examples=80)
@given(answers(), st.floats(0, 1), st.floats(0, 1))
def test_generalized_advantages(rows, gamma, lam):
    width, lengths, seed = rows
    mask = mask_of(width, lengths)
    rewards, values = random_like(mask, seed, 2)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for i, length in enumerate(lengths):
        expected = advantages_by_sums(rewards[i], values[i], length, gamma, lam)
        padding = [0.0] * (width - length)
        assert close(advantages[i], expected + padding, 1e-5)
        assert close(returns[i], [a + float(v) for a, v in zip(expected, values[i], strict=False)] + padding, 1e-5)


@settings(deadline=None, max_examples=40)
@given(answers(), st.floats(0, 1))
def test_without_a_critic_an_advantage_is_the_reward_to_go(rows, gamma):
    width, lengths, seed = rows
    mask = mask_of(width, lengths)
    (rewards,) = random_like(mask, seed, 1)
    advantages, returns = generalized_advantages(rewards, torch.zeros(mask.shape), mask, gamma=gamma, lam=1.0)
    for i, length in enumerate(lengths):
        to_go = [sum(gamma ** (k - t) * float(rewards[i, k]) for k in range(t, length)) for t in range(length)]
        assert close(advantages[i], to_go + [0.0] * (width - length), 1e-5)
    assert torch.equal(advantages, returns)


def test_advantages_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0, 99.0]]), torch.tensor([[0.5, 1.0, 3.0, 77.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    # The error of one step: 1 + 0.5 * 1 - 0.5, 2 + 0.5 * 3 - 1, 4 - 3.
    one_step, _ = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.0)
    assert one_step.tolist() == [[1.0, 2.5, 1.0, 0.0]]
    # 2.5 + 0.25 * 1 = 2.75, 1 + 0.25 * 2.75 = 1.6875.
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.6875, 2.75, 1.0, 0.0]]
    assert returns.tolist() == [[2.1875, 3.75, 4.0, 0.0]]


# -- losses ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(answers(), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_clipped_policy_loss(rows, low, high):
    mask = mask_of(*rows[:2])
    logps, old, advantages = random_like(mask, rows[2], 3)
    found = clipped_policy_loss(logps, old, advantages, mask, clip_low=low, clip_high=high)
    loss = clipped = kl = 0.0
    for i, length in enumerate(rows[1]):
        for t in range(length):
            log_ratio, a = float(logps[i, t]) - float(old[i, t]), float(advantages[i, t])
            ratio = math.exp(log_ratio)
            # Held back where it has moved beyond the bound in the direction that the advantage rewards.
            beyond = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
            loss -= ((1 + high if a > 0 else 1 - low) if beyond else ratio) * a
            clipped += beyond
            kl += ratio - 1 - log_ratio
    assert float(found.loss) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert float(found.clipped) == clipped
    assert float(found.approx_kl) == pytest.approx(kl, rel=1e-5, abs=1e-5)


def test_clipped_policy_loss_by_hand():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1, 3.0]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    found = clipped_policy_loss(ratios.log(), torch.zeros(1, 6), advantages, mask, clip_low=0.2, clip_high=0.3)
    # 1.3 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1: the second and the third are worse than the bound and stay.
    assert float(found.loss) == pytest.approx(-(2.6 - 3.0 + 1.0 - 1.6 + 1.1), abs=1e-6)
    assert float(found.clipped) == 2


@settings(deadline=None, max_examples=80)
@given(answers(), st.none() | st.floats(0.01, 1.0))
def test_clipped_value_loss(rows, clip):
    mask = mask_of(*rows[:2])
    values, old, returns = random_like(mask, rows[2], 3)
    found = clipped_value_loss(values, old, returns, mask, clip=clip)
    loss = clipped = 0.0
    for i, length in enumerate(rows[1]):
        for t in range(length):
            v, o, r = (float(one[i, t]) for one in (values, old, returns))
            held = v if clip is None else min(max(v, o - clip), o + clip)
            loss += 0.5 * max((v - r) ** 2, (held - r) ** 2)
            clipped += (held - r) ** 2 > (v - r) ** 2
    assert float(found.loss) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert float(found.clipped) == clipped


def test_clipped_value_loss_by_hand():
    values, old, returns = (
        torch.tensor([[2.0, 1.1, 5.0]]),
        torch.tensor([[1.0, 1.0, 0.0]]),
        torch.tensor([[3.0, 0.0, 9.0]]),
    )
    mask = torch.tensor([[1, 1, 0]])
    found = clipped_value_loss(values, old, returns, mask, clip=0.5)
    assert float(found.loss) == pytest.approx(0.5 * (1.5**2 + 1.1**2)) and float(found.clipped) == 1
    assert float(clipped_value_loss(values, old, returns, mask, clip=None).loss) == pytest.approx(0.5 * (1 + 1.21))


def test_a_value_within_the_clip_is_not_counted_for_its_rounding():
    values, old, returns = random_like(torch.ones(10, 100), 0, 3)
    assert float(clipped_value_loss(values, old, returns, torch.ones(10, 100), clip=100.0).clipped) == 0


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_finite_differences(seed):
    mask = mask_of(5, [5, 2, 0, 3])
    moved, old, other = (one.double() for one in random_like(mask, seed, 3))
    moved.requires_grad_(True)
    policy = lambda x: clipped_policy_loss(x, old, other, mask, clip_low=0.2, clip_high=0.3).loss  # noqa: E731
    value = lambda x: clipped_value_loss(x, old, other, mask, clip=0.4).loss  # noqa: E731
    for loss in (policy, value):
        assert torch.autograd.gradcheck(loss, (moved,), eps=1e-6, atol=1e-5)
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        assert gradient[mask == 0].abs().max() == 0


def test_only_the_tokens_that_the_clip_lets_through_have_a_gradient():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]])
    logps = ratios.log().requires_grad_(True)
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 3.0]])
    found = clipped_policy_loss(logps, torch.zeros(1, 5), advantages, torch.ones(1, 5), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(found.loss, logps)
    assert gradient[0].tolist() == pytest.approx([0, 3.0, -1.0, 0, -3.0], abs=1e-6)


# -- KL --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(0, 2**31), st.floats(0.05, 2.0))
def test_kl_estimates_in_expectation(n, seed, scale):
    """k1 and k3 are KL(p || q) under p; k2 is half the second moment of the log-ratio; k3 is nowhere negative."""
    generator = torch.Generator().manual_seed(seed)
    p, q = ((torch.randn(n, generator=generator).double() * scale).log_softmax(0) for _ in range(2))
    exact = sum(math.exp(float(a)) * (float(a) - float(b)) for a, b in zip(p, q, strict=True))
    mean = {name: float((p.exp() * estimate(p - q)).sum()) for name, estimate in KL_ESTIMATORS.items()}
    assert mean["k1"] == pytest.approx(exact, abs=1e-9) and mean["k3"] == pytest.approx(exact, abs=1e-9)
    second = sum(math.exp(float(a)) * (float(a) - float(b)) ** 2 / 2 for a, b in zip(p, q, strict=True))
    assert mean["k2"] == pytest.approx(second, abs=1e-9)
    assert float(KL_ESTIMATORS["k3"](p - q).min()) >= 0


def test_k3_keeps_its_digits_near_zero():
    """1e-4 squared over two, and not what is left of 1 - 1 in float32."""
    assert float(KL_ESTIMATORS["k3"](torch.tensor(1e-4))) == pytest.approx(5e-9, rel=0.05)


def test_adaptive_kl_by_hand():
    control = AdaptiveKL(0.1, target=6.0, horizon=1000)
    assert control.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert control.update(60.0, 100) == pytest.approx(0.101 * (1 + 0.2 * 0.1))
    assert control.update(-3.0, 500) == pytest.approx(0.10302 * (1 - 0.2 * 0.5))
    fixed = AdaptiveKL(0.1)
    assert fixed.update(50.0, 100) == 0.1


def test_a_batch_over_the_horizon_moves_beta_by_a_fifth_and_never_below_zero():
    control = AdaptiveKL(1.0, target=1.0, horizon=10)
    assert control.update(0.0, 1000) == pytest.approx(0.8)


@given(st.floats(0.2, 5.0))
def test_adaptive_kl_meets_its_target(target):
    """KL falls as beta grows, here as 1 / beta: the coefficient settles where KL is the target."""
    control = AdaptiveKL(1.0, target=target, horizon=100)
    for _ in range(400):
        control.update(1 / control.coef, 50)
    assert 1 / control.coef == pytest.approx(target, rel=0.01)


# -- moments ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(answers(), st.floats(-100, 100))
def test_moments_add_up_and_whiten_is_numpys(rows, shift):
    mask = mask_of(*rows[:2])
    values = random_like(mask, rows[2], 1)[0] + shift
    kept = np.array([float(values[i, t]) for i, length in enumerate(rows[1]) for t in range(length)])
    parts = [Moments.of(values[i : i + 1], mask[i : i + 1]) for i in range(len(rows[1]))]
    moments = Moments(*(sum(one) for one in zip(*parts, strict=True)))
    whole = Moments.of(values, mask)
    assert moments.number == whole.number == len(kept)
    if not len(kept):
        assert whole.mean == whole.variance == 0
        return
    for one in (moments, whole):
        assert one.mean == pytest.approx(kept.mean(), abs=1e-9)
        assert one.variance == pytest.approx(kept.var(), abs=1e-7)
    if kept.std() > 1e-2:
        expected = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
        found = whiten(values, moments)[mask.bool()].numpy()
        assert np.allclose(found, expected, atol=1e-3 if abs(shift) > 1 else 1e-4)
        unmoved = whiten(values, moments, shift_mean=False)[mask.bool()].numpy()
        assert np.allclose(unmoved, expected + kept.mean(), atol=1e-3)


def test_whitening_equal_values_leaves_nothing():
    values, mask = torch.full((2, 3), 0.7), torch.ones(2, 3)
    assert whiten(values, Moments.of(values, mask)).abs().max() < 1e-3


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = torch.ones(4)

    def of(values: list[float]) -> float:
        return explained_variance(Moments.of(returns - torch.tensor(values), mask), Moments.of(returns, mask))

    assert of([1.0, 2.0, 3.0, 4.0]) == 1
    assert of([2.5] * 4) == pytest.approx(0)
    assert of([1.5, 2.0, 2.5, 3.0]) == pytest.approx(1 - 0.3125 / 1.25)  # errors -0.5, 0, 0.5, 1 about their mean 0.25
    assert math.isnan(explained_variance(Moments.of(mask, mask), Moments.of(mask, mask)))
