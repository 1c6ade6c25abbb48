"""What kind of a run a log is of."""

from __future__ import annotations

import numpy as np

from tests.support.curves_by_hand import N, kinds, log


def test_kto_is_no_policy_run():
    """It logs a kl beside the rewards of its pairs, and a loss that means something."""
    loss = np.full(N, 0.5) + 0.01 * np.random.default_rng(1).standard_normal(N)
    loss[150:] = 50
    curves = {"kl": np.full(N, 0.1), "rewards__chosen": np.linspace(0, 1, N), "rewards__margins": np.linspace(0, 1, N)}
    assert "spike_sustained" in kinds(log(loss, **curves))


def test_classifiers_and_evaluated_preferences_are_not_too_good():
    for key in ("eval_accuracy", "eval_f1", "eval_rewards/margins"):
        history = log(eval_loss=[0.5, 0.2, 0.05])
        history.append({"step": 300, key: 0.97})
        assert not kinds(history)


def test_a_policy_at_rest_is_no_fault():
    """PPO's critic warms up alone, and steps over answers that the policy has left are logged with a loss of 0."""
    losses = np.linspace(1.4, 0.2, N) + 0.01 * np.random.default_rng(1).standard_normal(N)
    policy = {"kl": np.zeros(N), "reward": np.ones(N), "policy_loss": np.zeros(N)}
    assert "not_decreasing" in kinds(log(losses, grad_norm=np.zeros(N)))
    assert not kinds(log(losses, grad_norm=np.zeros(N), value_loss=losses, **policy))
    losses[-40:] = 0
    assert "non_finite" in kinds(log(losses))
    assert not kinds(log(losses, value_loss=losses, **policy))


def test_a_divergence_is_no_text_and_no_policy():
    """The loss of distillation may be small from the beginning; that it rises is told, whatever answers are logged."""
    small = 0.02 + 0.05 * np.exp(-np.arange(N) / 50) + 0.001 * np.random.default_rng(1).standard_normal(N)
    assert "too_good" in kinds(log(small, epochs=1))
    given, own = {"on_policy": np.zeros(N)}, {"on_policy": np.ones(N), "completions/mean_length": np.full(N, 4.0)}
    for curves in (given, own):
        assert not kinds(log(small, epochs=1, **{key.replace("/", "__"): value for key, value in curves.items()}))
        jumps = np.where(np.arange(N) < 150, small, 50)
        found = kinds(log(jumps, **{key.replace("/", "__"): value for key, value in curves.items()}))
        assert "spike_sustained" in found
    evaluated = log(eval_loss=[0.5, 0.2, 0.05])
    evaluated.append({"step": 300, "eval_divergence": 0.05})
    assert not kinds(evaluated)
