"""Settings of PPO that cannot be, each named with what is expected."""

from __future__ import annotations

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.trainers.ppo import PPOTrainer
from hf_objectives.trainers.ppo_config import PPOConfig
from tests.support.ppo_worlds import PAD, count_a, logged, ppo, small_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"critic": "seperate"},
            "critic is 'seperate'; expected one of separate, shared, none; did you mean 'separate'",
        ),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'; expected one of k1, k2, k3"),
        ({"reward_errors": "skip"}, "reward_errors is 'skip'; expected one of error, missing"),
        ({"gamma": 1.1}, "gamma is 1.1; expected 0 or more, and 1 at most"),
        ({"lam": -0.1}, "lam is -0.1; expected 0 or more"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty is -1.0"),
        ({"kl_target": 0.0, "beta": 0.1}, "kl_target is 0.0; expected more than 0"),
        ({"kl_target": 1.0, "beta": 0.0}, "kl_target moves beta, and beta is 0"),
        ({"cliprange_value": 0.0}, "cliprange_value is 0.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected more than 0"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"reward_clip_range": (1.0, -1.0)}, "reward_clip_range is .*; expected a lower and a higher bound"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "expected a multiple, so that a minibatch is one st",
        ),
        ({"normalize_advantages": True}, "PPO's is whiten_advantages"),
        ({"mask_truncated_completions": True}, "PPO's is missing_eos_penalty"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_settings_of_the_trainer_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="critic_model is given and critic is 'none'"):
        ppo(tmp_path, critic="none", critic_model=small_model())
    with pytest.raises(ConfigError, match="max_perplexity_increase needs eval_lm_datasets"):
        ppo(tmp_path, max_perplexity_increase=0.1)
    with pytest.raises(ConfigError, match="train_dataset has 2 prompts and a batch of answers takes 4 "):
        ppo(tmp_path, [{"prompt": "ask a"}] * 2)
    with pytest.raises(ConfigError, match="args is int; expected PPOConfig"):
        PPOTrainer(small_model(), count_a, 7)


def test_defaults_of_the_papers(tmp_path):
    """Adam's epsilon and a rate that falls in a straight line to 0: details 3 and 4 of Huang et al. (2022)."""
    config = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.adam_epsilon == 1e-5 and config.lr_scheduler_type == "linear" and config.warmup_steps == 0
    assert config.normalize_reward_models and config.critic_warmup_steps == 0 and config.max_approx_kl is None


@pytest.mark.slow
def test_policy_and_critic_have_epsilon_decay_and_schedule(tmp_path):
    run = ppo(tmp_path, learning_rate=0.5, critic_learning_rate=0.25, weight_decay=0.125, max_steps=4, num_iterations=1)
    run.train()
    assert logged(run, "learning_rate") == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert (
        run.critic_optimizer.scheduler.get_last_lr() == [0, 0] and run.critic_optimizer.scheduler.base_lrs == [0.25] * 2
    )
    for model, optimizer in ((run.model, run.optimizer), (run.critic, run.critic_optimizer.optimizer)):
        named = {parameter: name for name, parameter in model.named_parameters()}
        decays, keeps = optimizer.param_groups
        assert (decays["weight_decay"], keeps["weight_decay"]) == (0.125, 0) and decays["eps"] == keeps["eps"] == 1e-5
        assert all("norm" in named[one] or "bias" in named[one] for one in keeps["params"])
        assert not any("norm" in named[one] or "bias" in named[one] for one in decays["params"])
        assert len(decays["params"]) > 7 and len(keeps["params"]) >= 3
        assert len(named) == len(decays["params"]) + len(keeps["params"])


@pytest.mark.slow
def test_several_answers_a_prompt(tmp_path):
    config = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.num_generations == 1 and config.num_iterations == 4 and type(config.num_generations) is int
    run = ppo(tmp_path, num_generations=2, max_steps=1)
    run.train()
    assert run._logs["prompt"][0] == run._logs["prompt"][1] and PAD not in run.eos_token_ids
