"""The best checkpoint of PPO by reward: which it is, and that policy and critic go back to it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_objectives.trainers.ppo_config import PPOConfig
from tests.support.ppo_worlds import ppo

WORTH = {0: 1.0, 1: 0.5, 2: 3.0, 3: 2.0, 4: -1.0}  # of every answer, by the step it is given at
ROWS = [{"prompt": f"ask {letter}"} for letter in "abcd"]


def worth(prompts, trainer_state, **_) -> list[float]:
    return [WORTH[trainer_state.global_step]] * len(prompts)


def length(completion_ids, **_) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("metric", ["reward", "eval_reward"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_policy_and_critic_go_back_to_the_best_checkpoint(tmp_path, metric, critic, lora):
    run = ppo(
        tmp_path, ROWS, reward=[worth, length], reward_weights=[1.0, 0.0], critic=critic, eval_dataset=ROWS, max_steps=4,
        num_iterations=1, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model=metric, learning_rate=0.05, per_device_eval_batch_size=4,
        critic_warmup_steps=1, peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if lora else None,
        lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    best, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    assert run.state.best_model_checkpoint == str(best) and run.state.best_metric == 3.0
    assert [log["eval_reward"] for log in run.state.log_history if "eval_reward" in log] == [0.5, 3.0, 2.0, -1.0]
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    kept, moved = load_file(best / file), load_file(last / file)
    assert any(not torch.equal(value, moved[name]) for name, value in kept.items())
    own = run.model.state_dict()
    for name, value in kept.items():
        name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.") if lora else name
        assert torch.equal(own[name], value), name
    kept, moved = (torch.load(folder / "critic.pt", weights_only=True)["critic"] for folder in (best, last))
    assert any(not torch.equal(value, moved[name]) for name, value in kept.items())
    assert all(torch.equal(run.critic.state_dict()[name], value) for name, value in kept.items())


@pytest.mark.slow
def test_a_best_checkpoint_of_weights_alone_leaves_the_critic(tmp_path):
    run = ppo(
        tmp_path, ROWS, reward=worth, eval_dataset=ROWS, max_steps=3, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="reward",
        save_only_model=True, per_device_eval_batch_size=4,
    )  # fmt: skip
    run.train()
    best = tmp_path / "checkpoint-2"
    assert run.state.best_model_checkpoint == str(best) and not (best / "critic.pt").exists()


@pytest.mark.parametrize("metric", ["reward", "eval_reward", "exact_match"])
def test_more_is_better_by_the_name(tmp_path, metric):
    """As transformers has it: less is better of what is called a loss."""
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = {"use_cpu": True, "bf16": False, "load_best_model_at_end": True, **saving}
    assert PPOConfig(str(tmp_path), metric_for_best_model=metric, **settings).greater_is_better is True
    assert PPOConfig(str(tmp_path), **settings).greater_is_better is False  # of `loss`, where nothing is said
    settings |= {"metric_for_best_model": metric, "greater_is_better": False}
    assert PPOConfig(str(tmp_path), **settings).greater_is_better is False
