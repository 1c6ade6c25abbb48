"""PPO on the same answers under any number of processes: run in `two_processes`, and alone to compare with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaForSequenceClassification

from hf_objectives.distributed import rank
from hf_objectives.trainers.ppo import PPOTrainer
from tests.support.ppo_worlds import LETTERS, ScriptedPPO, count_a, ppo, small_model

SCRIPT = {
    "ask a": "b c <eos>", "ask b": "a", "ask a b c": "a a <eos>", "ask d": "<eos>", "ask e": "e d c b",
    "ask b b": "c a a <eos>", "ask c": "a a a a", "ask d d d d": "b <eos>",
}  # fmt: skip
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # there is no group yet when the batch is chosen
CRITICS = {"separate": 1, "shared": 2}  # with the micro-batches of a step
TIMES = ("step_time", "runtime", "per_second", "flos")
#: Answers of a micro-batch on a process, and micro-batches of a step: eight answers a step in all of them.
LAYOUTS = {1: ((8, 1), (2, 4)), 2: ((4, 1), (2, 2))}.get(PROCESSES, ())
#: Prompts of several lengths, two of them twice.
PROMPTS = [
    *SCRIPT,
    "ask a",
    "ask b b b b b b",
    "ask a b c",
    "ask d a d",
    "ask e e",
    "ask c c b",
    "ask b c",
    "ask c d e a b",
]
RUNS = {
    "one batch a step": {"max_steps": 6, "num_iterations": 1, "critic": "separate"},
    "rest and stop": {
        "max_steps": 16, "num_iterations": 3, "critic": "separate", "critic_warmup_steps": 2, "max_approx_kl": 1e-3,
        "reward": "judge", "reward_clip_range": (-1.5, 1.5), "lr_scheduler_type": "constant", "weight_decay": 0.1,
    },
    "stream": {"max_steps": 6, "num_iterations": 2, "critic": "none"},
    "minibatches": {
        "max_steps": 10, "num_iterations": 2, "critic": "shared", "num_generations": 2, "temperature": 0.7, "top_k": 6,
        "whiten_rewards": True, "entropy_coef": 0.01, "reward_errors": "missing", "critic_warmup_steps": 1,
    },
}  # fmt: skip


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


def judge():
    """A reward model whose scores lie far from 0."""
    model = small_model(seed=3, kind=LlamaForSequenceClassification, num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_(std=5)
    return model


class Noted(PPOTrainer):
    """Notes prompt and answer of each row of each step, and of each evaluation, of this process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.evaluated = [], []

    def prediction_step(self, *args, **kwargs):
        self.evaluated.append([])
        return super().prediction_step(*args, **kwargs)

    def answers_loss(self, model, inputs):
        if self.model.training and self._step % self.args.gradient_accumulation_steps == 0:
            self.steps.append([])
        (self.steps if self.model.training else self.evaluated)[-1].extend(answers_of(inputs))
        return super().answers_loss(model, inputs)


def answers_of(batch) -> list[list[list[int]]]:
    masked = [(batch[f"{part}_ids"], batch[f"{part}_mask"].bool()) for part in ("prompt", "completion")]
    parts = [[row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] for ids, mask in masked]
    return [list(row) for row in zip(*parts, strict=True)]


def by_layout(folder: Path, name: str, size: int, accumulation: int, model=None, resume=None, **options):
    """A run of eight answers a step that draws its answers, with policy and critic away from where they began."""
    minibatches = 2 if name in ("minibatches", "rest and stop") else 1
    settings = {"reward": score, "reward_errors": "missing", **RUNS[name], **options}
    if settings["reward"] == "judge":
        settings |= {"reward": [judge(), score], "reward_processing_classes": [LETTERS, None]}
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    run = ppo(
        folder, rows.to_iterable_dataset() if name == "stream" else rows, kind=Noted, model=model,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        steps_per_generation=minibatches * accumulation, eval_dataset=[{"prompt": prompt} for prompt in PROMPTS[:11]],
        eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=size, optim="sgd", learning_rate=0.1,
        critic_learning_rate=0.2, max_grad_norm=1.0, beta=0.3, kl_target=0.05, kl_horizon=64, missing_eos_penalty=0.5,
        vf_coef=0.5, **settings,
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        if run.critic is not None:
            run.critic.head.weight.normal_()
    run.train(resume_from_checkpoint=resume)
    logs = [
        {key: value for key, value in log.items() if not any(word in key for word in TIMES)}
        for log in run.state.log_history
    ]
    return {"steps": run.steps, "evaluated": run.evaluated, "logs": logs}


def layout_figures(run: dict) -> dict:
    """All that a run of `by_layout` logged, by the number of the log and the name."""
    return {f"{i} {key}": value for i, log in enumerate(run["logs"]) for key, value in log.items()}


def ppo_layouts(folder: Path) -> dict:
    """What runs of the same answers a step draw and log, by name and layout."""
    return {
        name: {f"{size} x {times}": by_layout(folder / name / str(size), name, size, times) for size, times in LAYOUTS}
        for name in RUNS
    }


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
