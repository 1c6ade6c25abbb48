"""Proximal policy optimisation from rewards, with TRL's generation and reward machinery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SyncRefModelCallback

from hf_objectives.distributed import gather_objects, rank, sum_over_ranks
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import EvaluatesLanguageModels, refuse_other_models
from hf_objectives.labels import with_prompts
from hf_objectives.losses import (
    KL_ESTIMATORS,
    AdaptiveKL,
    Moments,
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    token_rewards,
    whiten,
)
from hf_objectives.trainers.critic import Critic, CriticOptimizer
from hf_objectives.trainers.hf_compat import free_of_trainers
from hf_objectives.trainers.metrics import PolicyMetrics
from hf_objectives.trainers.ppo_config import PPOConfig
from hf_objectives.trainers.reward_functions import FramedTexts, check_finite, checked_rewards, load_scorer
from hf_objectives.trainers.trl_compat import (
    RLOOHooks,
    asking_for_none,
    disable_dropout_in_model,
    own_reference,
    place_reference,
)

_STATE = "ppo_state_rank_{rank}.pt"


class PPOTrainer(EvaluatesLanguageModels, RLOOHooks):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) of a language model, as in RLHF (Ziegler et al.
    2019, arXiv 1909.08593; Ouyang et al. 2022, arXiv 2203.02155).

    The policy answers a batch of prompts. The score of each answer is put on its last token, minus a penalty for each
    token's distance from the reference. Advantages come from a critic by generalised advantage estimation. Then policy and
    critic take several epochs of clipped steps. Prompts, generation (vLLM too), reward models and functions, several
    processes and logs are those of `trl.RLOOTrainer`, and so is the signature.

    The loss of a step is a sum over the tokens of all its micro-batches and ranks, divided by their number, so that it does
    not depend on how answers fall on them. The reference is the policy as it was given. With a `peft_config` it is the
    model without adapters, which is the same; of a PeftModel TRL keeps a copy of the adapter as it was given.

    Args (beyond the parent's):
        args: a `PPOConfig`.
        train_dataset, eval_dataset: rows with a `prompt` (text or messages), or in any other format that `to_prompt` reads;
            all columns go to the reward functions.
        critic_model: for `critic="separate"`, a model (or its path) to begin with in place of the policy's backbone, such as
            the reward model.
        eval_lm_datasets: rows of texts or chats, or several by name, whose perplexity every evaluation measures; see
            `LanguageModelEvaluation`.

    Logs (beyond the parent's): `reward` (mean score, weighted over the functions), `rewards/missing` (answers left out),
    `rewards/failed` (those of them whose reward failed), `kl` (nats per token to the reference, k1), `kl_per_answer`,
    `kl_coef`, `entropy` (nats per token), `clip_fraction`, `approx_kl` (to the policy that generated), `policy_loss`,
    `value_loss`, `explained_variance`, and `completions/finished`, the share of answers that ended with a stop token.

    Raises:
        ConfigError: settings that contradict each other, a reward model with another model's tokenizer, a prompt that is too
            long for the model.
        TokenizerError: a tokenizer with tokens that the model has no embedding for.
        FormatError: a row without a prompt.
        RewardError: a reward function that fails, or returns something else than rewards.
    """

    loss_is_scaled_for_ga: Any = True  # divided by the tokens of the whole step, see answers_made

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        critic_model: Any = None,
        eval_lm_datasets: Any = None,
    ) -> None:
        if args is None:
            args = PPOConfig("trainer_output")
        if not isinstance(args, PPOConfig):
            raise ConfigError(f"args is {type(args).__name__}; expected PPOConfig")
        self.policy_metrics = {"train": PolicyMetrics(), "eval": PolicyMetrics()}
        self.forwards = {}
        self._failed: set[int] = set()
        self._rewards: Tensor | None = None
        self._rows: list[Any] = []
        self._prefix = "eval"
        self.kl_control = AdaptiveKL(args.beta, args.kl_target, args.kl_horizon)
        functions, tokenizers = checked_rewards(
            reward_funcs, reward_processing_classes, on_error=args.reward_errors, tell_failed=self._tell_failed
        )
        refuse_other_models(model)
        free_of_trainers(model)
        reference = own_reference(model, args, peft_config)
        with asking_for_none(args, reference is not None):
            parent: Any = super().__init__
            parent(
                *(model, functions, args),
                *(with_prompts(train_dataset, "train_dataset"), with_prompts(eval_dataset, "eval_dataset")),
                *(processing_class, tokenizers, callbacks, optimizers, quantization_config, peft_config),
            )
        self.beta = args.beta
        self._check_policy_and_rows()
        if reference is not None:
            self.ref_model = place_reference(reference, self.accelerator, temperature=self.temperature)
            if args.sync_ref_model:
                self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        self.score_tokens()
        self.critic = self._make_critic(critic_model)
        self.critic_optimizer: CriticOptimizer | None = None
        self.add_callback(_CriticSteps(self))
        self.watch_language_models(
            eval_lm_datasets,
            self.text_tokenizer,
            max_length=args.eval_lm_max_length,
            max_increase=args.max_perplexity_increase,
        )

    def _check_policy_and_rows(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("no parameter of the policy requires a gradient; nothing would be trained")
        if self.is_multimodal:
            raise ConfigError("processing_class is a multimodal processor; PPOTrainer reads text only")
        refuse_other_models(self.model, self.text_tokenizer)
        needed = self.args.generation_batch_size // self.args.num_generations
        rows: Any = self.train_dataset
        if hasattr(rows, "__len__") and len(rows) < needed:
            raise ConfigError(
                f"train_dataset has {len(rows)} prompts and a batch of answers takes {needed} "
                "(per_device_train_batch_size x steps_per_generation x processes); expected at least as many"
            )

    def _make_critic(self, model: Any) -> Critic | None:
        if isinstance(model, str):
            model, has_head = load_scorer(model)
            if not has_head and hasattr(model, "score"):
                nn.init.zeros_(model.score.weight)
        critic = Critic.of(self.accelerator.unwrap_model(self.model), self.args.critic, model)
        if critic is None:
            return None
        if self.args.disable_dropout:
            disable_dropout_in_model(critic)
        if self.args.gradient_checkpointing and critic.backbone is not None:
            critic.backbone.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        return critic.to(self.accelerator.device).train()  # in evaluation mode it would not checkpoint

    def _tell_failed(self, answers: set[int]) -> None:
        self._failed |= answers

    # -- answers -------------------------------------------------------------------------------------------------

    def tokenize_prompts(self, prompts: list) -> Any:
        """Tokenize prompts; one that leaves no room for an answer is an error that names its row."""
        result = super().tokenize_prompts(prompts)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for i, ids in enumerate(result[0]):
            if limit is not None and len(ids) + int(self.max_completion_length or 0) > limit:
                raise ConfigError(
                    f"the prompt of row {self._rows[i]} has {len(ids)} tokens, which with max_completion_length="
                    f"{self.max_completion_length} is over the model's {limit} positions: {prompts[i]!r:.200}"
                )
        return result

    @contextmanager
    def reading_values(self, role: str, keep: int) -> Iterator[list[Tensor]]:
        """Let a shared critic read the states of the policy's backbone."""
        if self.critic is None or self.critic.backbone is not None or role != "policy":
            yield []
        else:
            with self.critic.watching(self.accelerator.unwrap_model(self.model), keep) as values:
                yield values

    def calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> Tensor:
        """Compute the rewards. An answer on which one function failed has none at all: a part would be another reward."""
        self._failed = set()
        for tokenizer in self.reward_processing_classes:
            if isinstance(tokenizer, FramedTexts):
                plain = isinstance(prompts[0], str)
                tokenizer.ended = [answer[-1] in self.eos_token_ids for answer in ids] if plain else None
        rewards = super().calculate_rewards(inputs, prompts, completions, ids)
        n = len(completions)
        own = rewards[rank() * n : (rank() + 1) * n]  # TRL has gathered those of all ranks
        for i, function in enumerate(self.reward_funcs):
            if isinstance(function, nn.Module):
                if self.args.reward_errors == "error":
                    check_finite(own[:, i], self.reward_func_names[i], completions)
                self._failed |= set((~torch.isfinite(own[:, i])).nonzero().flatten().tolist())
        self.policy_metrics[self.mode].failures += len(self._failed)
        failed = [i + part * n for part, answers in enumerate(gather_objects(self._failed)) for i in answers]
        rewards[failed] = torch.nan
        self._rewards = rewards
        return rewards

    def generate_and_score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer and score prompts, with values, advantages and returns of each token."""
        self._rows = [row.get("row") for row in inputs]
        self.forwards.clear()
        output = super().generate_and_score(inputs)
        policy, reference = self.forwards.pop("policy"), self.forwards.pop("reference", None)
        mask = output["completion_mask"]
        with torch.no_grad():
            kl = None
            if reference is not None:
                kl = KL_ESTIMATORS[self.args.kl_estimator](policy.logps - reference.logps)
            values = self._old_values(output, policy.values)
            scores, scored = self._scores(output)
            used = mask * scored[:, None]
            rewards = token_rewards(scores, kl, used, kl_coef=self.kl_control.coef)
            if self.args.whiten_rewards:
                rewards = whiten(rewards, _over_ranks(Moments.of(rewards, used)), shift_mean=False) * used
            advantages, returns = generalized_advantages(
                rewards, values, used, gamma=self.args.gamma, lam=self.args.lam
            )
            means = (advantages.sum(dim=1) / used.sum(dim=1).clamp(min=1)).tolist()
            self.show_advantages([mean for part in gather_objects(means) for mean in part])
            if self.args.whiten_advantages:
                advantages = whiten(advantages, _over_ranks(Moments.of(advantages, used))) * used
        if kl is not None:
            self._book_kl(kl, mask)
        return {
            **output,
            "old_token_logps": policy.logps,
            "values": values,
            "advantages": advantages,
            "returns": returns,
            "loss_mask": used,
        }

    def _old_values(self, output: Mapping[str, Any], shared: Tensor | None) -> Tensor:
        """The critic's values of all answers, float32 [batch, length]; 0 without a critic."""
        if self.critic is None or self.critic.backbone is None:
            ids = output["completion_ids"]
            return torch.zeros(ids.shape, device=ids.device) if shared is None else shared
        train = self.mode == "train"
        size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        starts = range(0, len(output["completion_ids"]), size)
        return torch.cat([self._read_values({name: output[name][i : i + size] for name in names}) for i in starts])

    def _read_values(self, part: Mapping[str, Tensor]) -> Tensor:
        assert self.critic is not None
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        attention = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            return self.critic.read(ids, attention, part["completion_ids"].shape[1])

    def _scores(self, output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The scores of this rank's answers, float32 [batch], and whether each has one, bool [batch]."""
        assert self._rewards is not None
        n = len(output["completion_ids"])
        own = self._rewards[rank() * n : (rank() + 1) * n]
        scored = ~torch.isnan(own).all(dim=1)
        scores = (own * self.reward_weights.to(own.device)).nansum(dim=1)
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        stops = torch.tensor(self.eos_token_ids, device=own.device)
        finished = (torch.isin(output["completion_ids"], stops) & output["completion_mask"].bool()).any(dim=1)
        scores = scores - self.args.missing_eos_penalty * ~finished
        done, total, missing = sum_over_ranks([float(finished.sum()), float(n), float((~scored).sum())])
        self.book({"completions/finished": done / total, "rewards/missing": missing})
        return scores, scored

    def _book_kl(self, kl: Tensor, mask: Tensor) -> None:
        nats, answers = sum_over_ranks([float((kl * mask).sum()), float(len(kl))])
        self.book({"kl_per_answer": nats / answers, "kl_coef": self.kl_control.coef})
        if self.mode == "train":
            self.kl_control.update(nats / answers, int(answers))

    def answers_made(self, batches: list[dict[str, Any]]) -> None:
        """Write into each micro-batch how many tokens its whole step has, over its accumulation and all ranks."""
        size = self.args.gradient_accumulation_steps
        for begin in range(0, len(batches), size):
            step = batches[begin : begin + size]
            total = sum_over_ranks([float(sum(batch["loss_mask"].sum() for batch in step))])[0]
            for batch in step:
                batch["step_tokens"] = torch.tensor(max(total, 1.0), device=batch["loss_mask"].device)

    # -- steps ---------------------------------------------------------------------------------------------------

    def answers_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Compute the clipped losses of policy and critic, and the entropy bonus, of a micro-batch."""
        mask, completion = inputs["loss_mask"], inputs["completion_ids"]
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, entropies, aux = self.per_token(
            model, ids, attention, completion.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        values = self.forwards.pop("policy").values
        policy = clipped_policy_loss(
            logps,
            inputs["old_token_logps"],
            inputs["advantages"],
            mask,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        entropy = (entropies * mask).sum()
        loss = policy.loss - self.args.entropy_coef * entropy if self.args.entropy_coef else policy.loss
        value = errors = returns = None
        if self.critic is not None:
            values = self._read_values(inputs) if values is None else values
            clip = self.args.cliprange_value
            value = clipped_value_loss(values, inputs["values"], inputs["returns"], mask, clip=clip)
            loss = loss + self.args.vf_coef * value.loss
            errors, returns = Moments.of(inputs["returns"] - values, mask), Moments.of(inputs["returns"], mask)
        self.policy_metrics[self.mode].add(mask, entropy, policy, value, errors, returns)
        if "step_tokens" not in inputs:  # evaluation
            return loss / mask.sum().clamp(min=1)
        # Gradients are averaged over ranks. The count is over all ranks, so the average is undone here.
        loss = loss / inputs["step_tokens"] * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux / self.current_gradient_accumulation_steps
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does, with the metrics of the steps since the last log, over all their tokens and ranks."""
        self.replace_booked(self.policy_metrics[self.mode].take())
        dataset = self._prefix.removeprefix("eval").removeprefix("_")
        if self.mode == "eval" and dataset:  # the parent calls the metrics of each evaluation set `eval_`
            self.rename_booked(lambda name: f"{dataset}_{name}")
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the parent does; the logs afterwards have the prefix of the dataset."""
        self._prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the parent's schedule, and the critic's optimizer, now that the number of steps is known."""
        if self.critic is not None:
            self.critic_optimizer = CriticOptimizer(self.critic, self.args, self.model, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_extra_state(self, folder: Path) -> None:
        """Write the critic, and this rank's answers, KL coefficient and moving reference."""
        if self.args.should_save and self.critic_optimizer is not None:
            self.critic_optimizer.save(folder)
        moves = self.args.sync_ref_model
        state = {
            **self.answers_state(),
            "kl_coef": self.kl_control.coef,
            "reference": self.accelerator.unwrap_model(self.ref_model).state_dict() if moves else None,
        }
        torch.save(state, folder / _STATE.format(rank=rank()))

    def extra_state_files(self) -> list[str]:
        """Names of the files that `load_extra_state` reads on this rank."""
        return [_STATE.format(rank=rank()), *([] if self.critic is None else [CriticOptimizer.file])]

    def load_extra_state(self, folder: Path) -> None:
        """Read what `save_extra_state` wrote."""
        if self.critic_optimizer is not None:
            self.critic_optimizer.load(folder)
        file = folder / _STATE.format(rank=rank())
        if not file.exists():
            raise ConfigError(f"{folder} has no {file.name}; it was saved by another trainer or by fewer processes")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.load_answers_state(state)
        self.kl_control.coef = state["kl_coef"]
        if state["reference"] is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])


class _CriticSteps(TrainerCallback):
    """Steps the critic when the policy steps."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.critic_optimizer is not None:
            self._trainer.critic_optimizer.step()


def _over_ranks(moments: Moments) -> Moments:
    return Moments(*sum_over_ranks(list(moments)))
