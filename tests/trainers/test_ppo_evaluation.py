"""An evaluation of PPO: each answer counts once, and the same answers are drawn each time."""

from __future__ import annotations

import math

import pytest

from tests.support.ppo_worlds import ScriptedPPO, count_a, ppo


@pytest.mark.slow
def test_figures_of_an_evaluation_are_those_of_all_answers(tmp_path):
    """Seven prompts in batches of two and of seven, by hand; one answer has no reward, and one reached the bound."""
    script = {
        "ask a": "b c <eos>", "ask b": "a a a a", "ask d": "<eos>", "ask e": "a d <eos>", "ask c": "a <eos>",
        "ask a a": "a a <eos>", "ask d d": "b <eos>",
    }  # fmt: skip

    def reward(prompts, completion_ids, **_):
        counts = count_a(completion_ids)
        return [None if prompt == "ask e" else one for prompt, one in zip(prompts, counts, strict=True)]

    rewards, lengths = [0, 4, 0, 1, 2, 0], [3, 4, 1, 3, 2, 3, 2]  # by hand
    mean = sum(rewards) / 6
    std = math.sqrt(sum((one - mean) ** 2 for one in rewards) / 5)
    for size in (2, 7):
        run = ppo(
            tmp_path, kind=ScriptedPPO, script={**script, "ask a": "b c <eos>"}, reward=reward, critic="none", beta=0.1,
            eval_dataset=[{"prompt": prompt} for prompt in script], per_device_eval_batch_size=size,
        )  # fmt: skip
        metrics = run.evaluate()
        expected = {
            "reward": mean, "reward_std": std, "rewards/reward/mean": mean, "rewards/reward/std": std,
            "rewards/missing": 1, "completions/mean_length": sum(lengths) / 7, "completions/min_length": 1,
            "completions/max_length": 4, "completions/clipped_ratio": 1 / 7, "completions/finished": 6 / 7,
            "completions/mean_terminated_length": 14 / 6, "completions/min_terminated_length": 1,
            "completions/max_terminated_length": 3, "kl": 0, "kl_per_answer": 0, "frac_reward_zero_std": 1,
        }  # fmt: skip
        for name, value in expected.items():
            assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6), (size, name)


@pytest.mark.slow
def test_answers_of_an_evaluation_are_those_of_the_evaluation_before(tmp_path):
    run = ppo(tmp_path, eval_dataset=[{"prompt": "ask a"}] * 6, per_device_eval_batch_size=4, beta=0.1, critic="none")
    first, second = run.evaluate(), run.evaluate()
    assert first["eval_kl"] == second["eval_kl"] and first["eval_reward"] == second["eval_reward"]
    shown = list(run._logs["completion"])[-6:]
    assert len({*shown}) > 3  # the same prompt has answers of its own
