"""PPO where the right answer is known: a bandit with its analytic optimum, and a task that must be solved."""

from __future__ import annotations

import pytest
import torch

from tests.support.ppo_worlds import EOS, LETTERS, logged, ppo, small_model

SCORES = torch.linspace(-1, 1, len(LETTERS))[torch.tensor([3, 0, 6, 1, 7, 2, 5, 4])]


def pull(completion_ids, **_) -> list[float]:
    """Each token is an arm of a bandit with a known reward."""
    return [float(SCORES[ids[0]]) for ids in completion_ids]


def chances(model) -> torch.Tensor:
    """Log-probabilities of the first token of an answer."""
    with torch.no_grad():
        return model(torch.tensor([LETTERS("ask")["input_ids"]])).logits[0, -1].double().log_softmax(-1)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("critic", "beta"), [("none", 0.5), ("shared", 0.5), ("separate", 1.0)])
def test_a_bandit_ends_at_the_analytic_optimum(tmp_path, critic, beta):
    """The policy that has the most of reward less beta KL is the reference times exp(reward / beta), normalised."""
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # a reference that prefers some arms
    before = chances(model)
    best = (before + SCORES / beta).log_softmax(-1)
    run = ppo(
        tmp_path, [{"prompt": "ask"}] * 256, reward=pull, model=model, per_device_train_batch_size=256, num_iterations=2,
        max_completion_length=1, learning_rate=1e-2, critic_learning_rate=1e-2, max_steps=40, beta=beta, critic=critic,
        lam=1.0 if critic == "none" else 0.95,
    )  # fmt: skip
    run.train()
    assert divergence(before, best) > 0.1
    assert divergence(chances(run.model), best) < 0.02
    # What the log says of the last answers is what the distributions say.
    assert logged(run, "kl")[-1] == pytest.approx(divergence(chances(run.model), before), abs=0.15)
    expected = float((chances(run.model).exp() * SCORES).sum())
    assert logged(run, "reward")[-1] == pytest.approx(expected, abs=0.1)


def matching(prompts, completion_ids, **_) -> list[float]:
    """Half for the letter that was asked for, half for stopping after it."""
    wanted = [[*LETTERS(prompt)["input_ids"][1:], EOS] for prompt in prompts]
    return [
        sum(a == b for a, b in zip(ids, want, strict=False)) / 2
        for ids, want in zip(completion_ids, wanted, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_copying_is_learnt_from_three_seeds(tmp_path, seed):
    model = small_model(seed=seed, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    run = ppo(
        tmp_path, [{"prompt": f"ask {letter}"} for letter in "abcde"] * 40, reward=matching, model=model, seed=seed,
        per_device_train_batch_size=128, num_iterations=4, max_completion_length=3, learning_rate=5e-3, beta=0.0,
        entropy_coef=0.01, max_steps=160,
    )  # fmt: skip
    run.train()
    rewards = logged(run, "reward")
    assert len(rewards) == 40 and rewards[0] < 0.3
    assert sum(rewards[-5:]) / 5 > 0.9
    assert logged(run, "completions/finished")[-1] > 0.9
    assert logged(run, "entropy")[-1] < logged(run, "entropy")[0]


@pytest.mark.slow
def test_an_adaptive_coefficient_follows_the_kl_of_the_answers(tmp_path):
    target = 0.15
    run = ppo(
        tmp_path, [{"prompt": "ask"}] * 256, reward=pull, per_device_train_batch_size=64, num_iterations=2, max_steps=24,
        max_completion_length=1, learning_rate=1e-2, beta=0.05, kl_target=target, kl_horizon=128, critic="none",
    )  # fmt: skip
    run.train()
    kls, betas = logged(run, "kl_per_answer"), logged(run, "kl_coef")
    assert len(kls) == len(betas) == 12 and betas[0] == 0.05
    for kl, beta, later in zip(kls, betas, [*betas[1:], run.kl_control.coef], strict=True):
        assert later == pytest.approx(beta * (1 + 0.5 * min(max(kl / target - 1, -0.2), 0.2)))
    assert kls[0] == 0 and betas[-1] > betas[1]
