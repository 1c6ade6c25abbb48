"""Arguments of PPOTrainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers.trainer_utils import has_length
from trl import RLOOConfig

from hf_objectives.errors import ConfigError
from hf_objectives.losses import KL_ESTIMATORS
from hf_objectives.trainers.checkpoints import CheckpointSettings
from hf_objectives.types import check_one_of, option

_CHOICES = {
    "critic": ("separate", "shared", "none"),
    "kl_estimator": tuple(KL_ESTIMATORS),
    "reward_errors": ("error", "missing"),
}
_NOT_NEGATIVE = ("gamma", "lam", "vf_coef", "entropy_coef", "beta", "missing_eos_penalty", "critic_warmup_steps")
_POSITIVE = (
    *("kl_target", "cliprange_value", "critic_learning_rate", "kl_horizon", "temperature"),
    *("epsilon", "epsilon_high", "num_iterations", "max_approx_kl"),
)


@dataclass
class PPOConfig(CheckpointSettings, RLOOConfig):
    """`trl.RLOOConfig` with the settings of PPO. Generation, rewards, batches and logs are the parent's.

    Some settings of the parent in PPO's words: `num_iterations` is the number of epochs over a batch of answers (4 here),
    `steps_per_generation / gradient_accumulation_steps` the number of its minibatches, `epsilon` and `epsilon_high` the clip
    of the ratio, `beta` the coefficient of the KL penalty, `reward_clip_range` the clip of the score. One answer to a prompt
    (`num_generations`) is enough. Dropout is off, so that the ratio begins at 1.

    What each field does stands in its help; more of some:

    Args:
        critic: "separate": a value head on a copy of the policy's backbone; "shared": on the policy's own, whose weights the
            value loss then moves too; "none": no critic, V = 0.
        critic_warmup_steps: optimizer steps at the start in which the critic learns and the policy does not move; of a shared
            critic only the head learns then.
        vf_coef: weight of the value loss in the sum. A shared critic's loss is weighed against the policy's by it. A separate
            critic has an optimizer of its own: Adam's step does not depend on the scale of its loss, so that the weight
            matters only through `max_grad_norm` and `adam_epsilon`; `critic_learning_rate` is the setting for its pace.
        max_approx_kl: once `approx_kl` of a step, the divergence from the policy that generated, is over it, the other steps
            over this batch of answers are left out.
        normalize_reward_models: scale the scores of reward models (not of functions) by mean and standard deviation of all
            training answers so far, before `reward_weights` and `reward_clip_range`. What is logged stays as the model says.
        gamma, lam: discount and λ of generalised advantage estimation (arXiv 1506.02438).
        kl_estimator: see `losses.KL_ESTIMATORS`.
        kl_target: nats per answer that an adaptive coefficient aims at (arXiv 1909.08593); None keeps `beta`.
        whiten_rewards: their mean stays.
        missing_eos_penalty: for answers that did not stop within `max_completion_length`.
        reward_errors: "error", or "missing": leave out and count the answers on which a function or model fails or gives NaN,
            whatever the others give.

    Raises:
        ConfigError: an unknown name, a value out of range, or settings that contradict each other.
    """

    num_generations: int = option(1, "Answers to each prompt in a batch.")
    num_iterations: int = option(4, "Epochs over each batch of answers.")
    adam_epsilon: float = option(1e-5, "Epsilon of Adam, of policy and critic.")
    disable_dropout: bool = option(True, "Dropout off, so that the ratio begins at 1.")
    critic: str = option("separate", "separate, shared or none.")
    critic_learning_rate: float | None = option(None, "None for learning_rate.")
    critic_warmup_steps: int = option(0, "Steps at the start in which only the critic learns.")
    gamma: float = option(1.0, "Discount.")
    lam: float = option(0.95, "Lambda of generalised advantage estimation.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    cliprange_value: float | None = option(0.2, "Clip of the value around the old one.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus, per token.")
    kl_estimator: str = option("k1", "k1, k2 or k3.")
    kl_target: float | None = option(None, "Nats per answer that an adaptive beta steers to.")
    kl_horizon: int = option(10_000, "Answers over which beta moves by a fifth at most.")
    max_approx_kl: float | None = option(None, "Nats per token over which the rest of a batch's steps is left out.")
    whiten_advantages: bool = option(True, "Scale advantages to mean 0 and variance 1.")
    whiten_rewards: bool = option(False, "Scale token rewards to variance 1.")
    missing_eos_penalty: float = option(0.0, "Taken off the score of an answer that did not stop.")
    normalize_reward_models: bool = option(True, "Scale scores of reward models by their running mean and spread.")
    reward_errors: str = option("error", "error, or missing: leave out answers that could not be scored.")
    eval_lm_max_length: int | None = option(1024, "Tokens of a row of eval_lm_datasets.")
    max_perplexity_increase: float | None = option(
        None, "Stop when perplexity on an eval_lm_dataset rose by more (0.1: by 10 %%)."
    )

    def __post_init__(self) -> None:
        single = self.num_generations == 1
        if single:
            self.num_generations = _Single(1)
        super().__post_init__()
        if single:
            self.num_generations = 1
        self._check()

    def _check(self) -> None:
        for name, known in _CHOICES.items():
            check_one_of(name, getattr(self, name), known)
        for name in _NOT_NEGATIVE:
            value, high = getattr(self, name), 1 if name in ("gamma", "lam") else math.inf
            if not 0 <= value <= high:
                raise ConfigError(f"{name} is {value}; expected 0 or more{', and 1 at most' if high == 1 else ''}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; expected more than 0")
        if self.reward_clip_range and self.reward_clip_range[0] >= self.reward_clip_range[1]:
            raise ConfigError(f"reward_clip_range is {self.reward_clip_range}; expected a lower and a higher bound")
        if self.kl_target is not None and not self.beta:
            raise ConfigError("kl_target moves beta, and beta is 0; give it a value to begin with, such as 0.05")
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ConfigError(
                f"steps_per_generation is {self.steps_per_generation}, gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}; expected a multiple, so that a minibatch is one step"
            )
        if self.fp16 and self.critic != "none":
            raise ConfigError("fp16 scales the loss of one optimizer, and a critic has its own; use bf16")
        if self.fp16 and self.max_approx_kl is not None:
            raise ConfigError("fp16 scales the gradient of every step, and max_approx_kl leaves steps out; use bf16")
        if self.critic_warmup_steps and self.critic == "none":
            raise ConfigError(
                f"critic_warmup_steps is {self.critic_warmup_steps}, and critic is 'none'; expected 0 without a critic"
            )
        if self.normalize_advantages:
            raise ConfigError("normalize_advantages is RLOO's; PPO's is whiten_advantages")
        if self.mask_truncated_completions:
            raise ConfigError(
                "mask_truncated_completions takes answers that did not stop out of the loss; PPO's is missing_eos_penalty"
            )

    def check_rows(self, rows: Any) -> None:
        """Refuse training rows that are fewer than a batch of answers takes: it would not have one."""
        needed = self.generation_batch_size // self.num_generations
        if has_length(rows) and len(rows) < needed:
            raise ConfigError(
                f"train_dataset has {len(rows)} prompts and a batch of answers takes {needed} "
                "(per_device_train_batch_size x steps_per_generation x processes); expected at least as many"
            )


class _Single(int):
    """The number 1 that passes the parent's check: RLOO compares an answer with others to its prompt, PPO has a critic."""

    def __lt__(self, other: int) -> bool:
        return False
