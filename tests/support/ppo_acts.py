"""PPO on the same answers under any number of processes: run in `two_processes`, and alone to compare with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from hf_objectives.distributed import rank
from tests.support.ppo_worlds import ScriptedPPO, count_a, ppo

SCRIPT = {
    "ask a": "b c <eos>", "ask b": "a", "ask a b c": "a a <eos>", "ask d": "<eos>", "ask e": "e d c b",
    "ask b b": "c a a <eos>", "ask c": "a a a a", "ask d d d d": "b <eos>",
}  # fmt: skip
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # there is no group yet when the batch is chosen
CRITICS = {"separate": 1, "shared": 2}  # with the micro-batches of a step
TIMES = ("step_time", "runtime", "per_second", "flos")


def score(prompts, completion_ids, **arguments) -> list[float]:
    """One answer has no reward: the ranks do not have equally many tokens that count."""
    scores = count_a(completion_ids)
    return [math.nan if prompt == "ask c" else one for prompt, one in zip(prompts, scores, strict=True)]


def trainer(folder: Path, critic: str, accumulation: int):
    """Eight answers a step, on any number of processes; policy and critic away from where they began."""
    run = ppo(
        folder, [{"prompt": prompt} for prompt in SCRIPT], kind=ScriptedPPO, script=SCRIPT, reward=score, critic=critic,
        reward_errors="missing", per_device_train_batch_size=8 // PROCESSES // accumulation,
        gradient_accumulation_steps=accumulation, steps_per_generation=accumulation, num_iterations=2, max_steps=4,
        optim="sgd", learning_rate=0.1, critic_learning_rate=0.2, max_grad_norm=1.0, beta=0.3, kl_target=0.05, kl_horizon=64,
        whiten_rewards=True, missing_eos_penalty=0.5, entropy_coef=0.01, vf_coef=0.5, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        run.critic.head.weight.normal_()
    return run


def state_of(run) -> dict[str, torch.Tensor]:
    state = {f"policy.{name}": value for name, value in run.accelerator.unwrap_model(run.model).state_dict().items()}
    return state | {f"critic.{name}": value for name, value in run.critic.state_dict().items()}


def ppo_steps(folder: Path) -> dict:
    """Two steps on each of two batches; the weights go to a file of each rank, the logs to the outcome."""
    logs, weights = {}, {}
    for critic, accumulation in CRITICS.items():
        run = trainer(folder / critic, critic, accumulation)
        run.train()
        logs[critic] = [
            {key: value for key, value in log.items() if not any(word in key for word in TIMES)}
            for log in run.state.log_history
        ]
        weights[critic] = state_of(run)
        resumed = trainer(folder / f"{critic} resumed", critic, accumulation)
        resumed.train(resume_from_checkpoint=str(folder / critic / "checkpoint-3"))
        assert all(torch.equal(weights[critic][key], value) for key, value in state_of(resumed).items()), critic
    torch.save(weights, folder / f"ppo_{rank()}.pt")
    return logs
