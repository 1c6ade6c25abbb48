"""Reinforcement learning from rewards with proximal policy optimisation, on TRL's generation and reward machinery."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import RLOOTrainer, SyncRefModelCallback
from trl.trainer.utils import disable_dropout_in_model

from hf_objectives.distributed import gather_objects, rank, sum_over_ranks
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import EvaluatesLanguageModels
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
from hf_objectives.trainers.ppo_config import PPOConfig
from hf_objectives.trainers.ppo_figures import StepFigures
from hf_objectives.trainers.prompt_order import PromptOrder
from hf_objectives.trainers.reference import frozen_copy, place_reference
from hf_objectives.trainers.reward_functions import FramedTexts, check_finite, checked_rewards, load_scorer

_STATE = "ppo_state_rank_{rank}.pt"


class PPOTrainer(EvaluatesLanguageModels, RLOOTrainer):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) of a language model, as in RLHF (Ziegler et al.
    2019, arXiv 1909.08593; Ouyang et al. 2022, arXiv 2203.02155).

    A batch of prompts is answered, each answer is scored and its score put on its last token, less a penalty for each
    token's distance from the reference; advantages come from a critic by generalised advantage estimation; then policy and
    critic take several epochs of clipped steps. Prompts, generation (vLLM too), reward models and functions, several
    processes and logs are `trl.RLOOTrainer`'s, and so is the signature.

    A step's loss is a sum over the tokens of all its micro-batches and ranks over their number, so that it does not depend
    on how answers fall on them. The reference is the policy as it was given; with a `peft_config` the model without
    adapters, which is the same; of a PeftModel TRL keeps a copy of its adapter as it was given.

    Args (beyond the parent's):
        args: a `PPOConfig`.
        train_dataset, eval_dataset: rows with a `prompt` (text or messages), or of any other format that `to_prompt` reads;
            all columns go to the reward functions.
        critic_model: for `critic="separate"`, a model (or its path) to begin with in place of the policy's backbone, such as
            the reward model.
        eval_lm_datasets: rows of texts or chats, or several by name; their perplexity joins every evaluation, see
            `LanguageModelEvaluation`.

    Logs (beyond the parent's): `reward` (mean score, weighted over the functions), `rewards/missing` (answers left out),
    `rewards/failed` (of these, those whose reward failed), `kl` (nats per token to the reference, k1), `kl_per_answer`,
    `kl_coef`, `entropy` (nats per token), `clip_fraction`, `approx_kl` (to the policy that generated), `policy_loss`,
    `value_loss`, `explained_variance`, and `completions/finished`, the share of answers that stopped by themselves.

    Raises:
        ConfigError: settings that do not fit, a reward model with another's tokenizer, a prompt too long for the model.
        FormatError: a row without a prompt.
        RewardError: a reward function that fails, or returns what is no reward.
    """

    loss_is_scaled_for_ga = True  # divided by the tokens of the whole step, see _count_tokens
    _tag_names = ["trl", "ppo"]  # noqa: RUF012, as the parent has it
    _name = "PPO"
    _paper = {  # noqa: RUF012
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title  = {{Proximal Policy Optimization Algorithms}},
                author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year   = 2017,
                eprint = {arXiv:1707.06347}
            }"""),
    }
    args: PPOConfig
    model: Any
    _logs: Any

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
        self._figures = {"train": StepFigures(), "eval": StepFigures()}
        self._failed: set[int] = set()
        self._forwards: list[tuple[Tensor, Tensor | None]] | None = None
        self._rewards: Tensor | None = None
        self._rows: list[Any] = []
        self._prefix = "eval"
        self.kl_control = AdaptiveKL(args.beta, args.kl_target, args.kl_horizon)
        functions, tokenizers = checked_rewards(
            reward_funcs, reward_processing_classes, on_error=args.reward_errors, tell_failed=self._tell_failed
        )
        # The parent would load its reference from where the policy's config says it is from, whatever the policy is now.
        adapted = isinstance(model, PeftModel)
        if not isinstance(model, str) and not adapted and getattr(model, "peft_config", None):
            raise ConfigError(
                "the model carries an adapter that transformers loaded; merge it, or load it with PeftModel"
            )
        copied = not isinstance(model, str) and peft_config is None and not adapted
        reference = frozen_copy(model) if copied and args.beta else None
        beta, sync = args.beta, args.sync_ref_model
        if reference is not None:
            args.beta, args.sync_ref_model = 0.0, False
        super().__init__(
            model,
            functions,
            args,
            with_prompts(train_dataset, "train_dataset"),
            with_prompts(eval_dataset, "eval_dataset"),
            processing_class,
            tokenizers,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
        )
        args.beta, args.sync_ref_model, self.beta = beta, sync, beta
        self._check_policy_and_rows()
        if reference is not None:
            self.ref_model = place_reference(reference, self.accelerator, temperature=self.temperature)
            if sync:
                self.add_callback(SyncRefModelCallback(self.ref_model, self.accelerator))
        self.critic = self._make_critic(critic_model)
        self.critic_optimizer: CriticOptimizer | None = None
        self.add_callback(_CriticSteps(self))
        self.watch_language_models(
            eval_lm_datasets,
            self._tokenizer,
            max_length=args.eval_lm_max_length,
            max_increase=args.max_perplexity_increase,
        )

    def _check_policy_and_rows(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("no parameter of the policy requires a gradient; nothing would be trained")
        if self._is_vlm:
            raise ConfigError("processing_class is a multimodal processor; PPOTrainer reads text only")
        needed = self.args.generation_batch_size // self.args.num_generations  # type: ignore[operator]
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

    def _tokenize_prompts(self, prompts: list) -> Any:
        result = super()._tokenize_prompts(prompts)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for i, ids in enumerate(result[0]):
            if limit is not None and len(ids) + int(self.max_completion_length or 0) > limit:
                raise ConfigError(
                    f"the prompt of row {self._rows[i]} has {len(ids)} tokens, which with max_completion_length="
                    f"{self.max_completion_length} is over the model's {limit} positions: {prompts[i]!r:.200}"
                )
        return result

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The parent's; a shared critic reads the backbone's states on the way."""
        keep = kwargs["logits_to_keep"] if "logits_to_keep" in kwargs else args[2]
        policy = self.accelerator.unwrap_model(self.model)
        if self.critic is None or self.critic.backbone is not None or model is self.ref_model:
            result, seen = super()._get_per_token_logps_and_entropies(model, *args, **kwargs), []
        else:
            with self.critic.watching(policy, keep) as seen:
                result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._values_seen = torch.cat(seen) if seen else None
        if self._forwards is not None:
            self._forwards.append((result[0], self._values_seen))
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> Tensor:
        """The parent's; an answer that one function failed on has no reward at all, for a part of it would be another."""
        self._failed = set()
        for tokenizer in self.reward_processing_classes:
            if isinstance(tokenizer, FramedTexts):
                tokenizer.ended = (
                    [one[-1] in self.eos_token_ids for one in ids] if isinstance(prompts[0], str) else None
                )
        rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        n = len(completions)
        own = rewards[rank() * n : (rank() + 1) * n]
        for i, function in enumerate(self.reward_funcs):
            if isinstance(function, nn.Module):
                if self.args.reward_errors == "error":
                    check_finite(own[:, i], self.reward_func_names[i], completions)
                self._failed |= set((~torch.isfinite(own[:, i])).nonzero().flatten().tolist())
        self._figures["train" if self.model.training else "eval"].failures += len(self._failed)
        failed = [i + part * n for part, those in enumerate(gather_objects(self._failed)) for i in those]
        rewards[failed] = torch.nan
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The parent's answers and scores, with values, advantages and returns of each token."""
        mode = "train" if self.model.training else "eval"
        self._forwards, self._rows = [], [one.get("row") for one in inputs]
        output = super()._generate_and_score_completions(inputs)
        (old_logps, values), *reference = self._forwards
        self._forwards = None
        mask = output["completion_mask"]
        with torch.no_grad():
            if self.critic is not None and self.critic.backbone is not None:
                size = (
                    self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
                )
                values = torch.cat([self._read_values(part) for part in _chunks(output, size)])
            values = torch.zeros_like(old_logps, dtype=torch.float32) if values is None else values
            kl = KL_ESTIMATORS[self.args.kl_estimator](old_logps - reference[0][0]) if reference else None
            scores, scored = self._scores(output, mode)
            used = mask * scored[:, None]
            rewards = token_rewards(scores, kl, used, kl_coef=self.kl_control.coef)
            if self.args.whiten_rewards:
                rewards = whiten(rewards, _over_ranks(Moments.of(rewards, used)), shift_mean=False) * used
            advantages, returns = generalized_advantages(
                rewards, values, used, gamma=self.args.gamma, lam=self.args.lam
            )
            self._show_advantages(advantages, used)
            if self.args.whiten_advantages:
                advantages = whiten(advantages, _over_ranks(Moments.of(advantages, used))) * used
        self._book_answers(kl, mask, mode)
        output.update(old_token_logps=old_logps, values=values, advantages=advantages, returns=returns, loss_mask=used)
        return output

    def _read_values(self, part: Mapping[str, Tensor]) -> Tensor:
        assert self.critic is not None
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        attention = torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1)
        with self.accelerator.autocast():
            return self.critic.read(ids, attention, part["completion_ids"].shape[1])

    def _scores(self, output: Mapping[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
        """What this rank's answers are worth, float32 [batch], and whether they have a score at all, bool [batch]."""
        assert self._rewards is not None
        n = len(output["completion_ids"])
        own = self._rewards[rank() * n : (rank() + 1) * n]  # the parent has gathered those of all ranks
        scored = ~torch.isnan(own).all(dim=1)
        scores = (own * self.reward_weights.to(own.device)).nansum(dim=1)
        if self.reward_clip_range:
            scores = scores.clamp(*self.reward_clip_range)
        stops = torch.tensor(self.eos_token_ids, device=own.device)
        finished = (torch.isin(output["completion_ids"], stops) & output["completion_mask"].bool()).any(dim=1)
        scores = scores - self.args.missing_eos_penalty * ~finished
        done, total, missing = sum_over_ranks([float(finished.sum()), float(n), float((~scored).sum())])
        self._metrics[mode]["completions/finished"].append(done / total)
        self._metrics[mode]["rewards/missing"].append(missing)
        return scores, scored

    def _book_answers(self, kl: Tensor | None, mask: Tensor, mode: str) -> None:
        if kl is None:
            return
        nats, answers = sum_over_ranks([float((kl * mask).sum()), float(len(kl))])
        self._metrics[mode]["kl_per_answer"].append(nats / answers)
        self._metrics[mode]["kl_coef"].append(self.kl_control.coef)
        if mode == "train":
            self.kl_control.update(nats / answers, int(answers))

    def _show_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """The mean advantage of each answer in the parent's table of completions, in place of RLOO's."""
        means = (advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).tolist()
        shown = [mean for part in gather_objects(means) for mean in part]
        for _ in range(min(len(shown), len(self._logs["advantages"]))):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(shown)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not before:
            self._count_tokens(self._buffered_inputs)
        return inputs

    def _count_tokens(self, batches: list[dict[str, Any]]) -> None:
        """Write into each micro-batch how many tokens its whole step has, over its accumulation and all ranks."""
        size = self.args.gradient_accumulation_steps
        for begin in range(0, len(batches), size):
            step = batches[begin : begin + size]
            total = sum_over_ranks([float(sum(batch["loss_mask"].sum() for batch in step))])[0]
            for batch in step:
                batch["step_tokens"] = torch.tensor(max(total, 1.0), device=batch["loss_mask"].device)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mask, completion = inputs["loss_mask"], inputs["completion_ids"]
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, entropies, aux = self._get_per_token_logps_and_entropies(
            model, ids, attention, completion.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        policy = clipped_policy_loss(
            logps,
            inputs["old_token_logps"],
            inputs["advantages"],
            mask,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
        )
        entropy = (entropies * mask).sum()
        loss = policy.loss - self.args.entropy_coef * entropy
        value = None
        figures = self._figures["train" if self.model.training else "eval"]
        if self.critic is not None:
            values = self._values_seen if self.critic.backbone is None else self._read_values(inputs)
            assert values is not None
            value = clipped_value_loss(
                values, inputs["values"], inputs["returns"], mask, clip=self.args.cliprange_value
            )
            loss = loss + self.args.vf_coef * value.loss
            figures.add_returns(inputs["returns"], values, mask)
        figures.add(mask, entropy, policy, value)
        if "step_tokens" not in inputs:  # evaluation
            return loss / mask.sum().clamp(min=1)
        # Gradients are averaged over ranks; the count is of all ranks, so the average is undone here.
        loss = loss / inputs["step_tokens"] * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux / self.current_gradient_accumulation_steps
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's logs, with the figures of the steps since the last one, over all their tokens and ranks."""
        mode = "train" if self.model.training else "eval"
        for name, value in self._figures[mode].take().items():
            self._metrics[mode][name] = [value]
        own = self._prefix.removeprefix("eval").removeprefix("_")
        if mode == "eval" and own:  # of several evaluation sets the parent calls each `eval_`
            for name in [*self._metrics[mode]]:
                self._metrics[mode][f"{own}_{name}"] = self._metrics[mode].pop(name)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; what it logs afterwards has the prefix of its dataset."""
        self._prefix = kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """The parent's, in an order that a resumed run finds again in later epochs too."""
        return PromptOrder.like(cast(Any, super()._get_train_sampler(dataset)))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The parent's; the critic's optimizer is made here, when the number of steps is known."""
        if self.critic is not None:
            self.critic_optimizer = CriticOptimizer(self.critic, self.args, self.model, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.save_only_model:
            return
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save and self.critic_optimizer is not None:
            self.critic_optimizer.save(folder)
        every = self.args.steps_per_generation * self.num_iterations  # type: ignore[operator]
        state = {
            "micro_steps": self._step,
            "kl_coef": self.kl_control.coef,
            "answers": self._buffered_inputs if self._step % every else None,
            "reference": self.accelerator.unwrap_model(self.ref_model).state_dict()
            if self.args.sync_ref_model
            else None,
        }
        torch.save(state, folder / _STATE.format(rank=rank()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self.critic_optimizer is not None:
            self.critic_optimizer.load(folder)
        file = folder / _STATE.format(rank=rank())
        if not file.exists():
            raise ConfigError(f"{folder} has no {file.name}; it was saved by another trainer or by fewer processes")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self._step, self.kl_control.coef = state["micro_steps"], state["kl_coef"]
        self._buffered_inputs = send_to_device(state["answers"], self.accelerator.device)
        if state["reference"] is not None:  # it moves, see sync_ref_model
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])


class _CriticSteps(TrainerCallback):
    """The critic steps when the policy does."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.critic_optimizer is not None:
            self._trainer.critic_optimizer.step()


def _over_ranks(moments: Moments) -> Moments:
    return Moments(*sum_over_ranks(list(moments)))


def _chunks(output: Mapping[str, Any], size: int) -> list[dict[str, Tensor]]:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    n = len(output["completion_ids"])
    return [{name: output[name][i : i + size] for name in names} for i in range(0, n, size)]
