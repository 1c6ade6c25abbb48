"""Proximal policy optimisation from rewards, with TRL's generation and reward machinery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
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
)
from hf_objectives.trainers.critic import Critic, CriticOptimizer, CriticSteps
from hf_objectives.trainers.hf_compat import free_of_trainers, processing_last
from hf_objectives.trainers.metrics import PolicyMetrics
from hf_objectives.trainers.ppo_advantages import AdvantageEstimator
from hf_objectives.trainers.ppo_config import PPOConfig
from hf_objectives.trainers.ppo_evaluation import EvaluatedAnswers
from hf_objectives.trainers.ppo_minibatches import deal
from hf_objectives.trainers.ppo_reference import asking_for_none, own_reference
from hf_objectives.trainers.ppo_scores import AnswerScores
from hf_objectives.trainers.ppo_stop import KLStop
from hf_objectives.trainers.ppo_warmup import CriticWarmup
from hf_objectives.trainers.refusals import refuse_zero_gradients
from hf_objectives.trainers.reward_functions import FramedTexts, check_finite, checked_rewards
from hf_objectives.trainers.sampling import OwnNoise
from hf_objectives.trainers.trl_compat import RLOOHooks, innermost, place_reference

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
    `value_loss`, `explained_variance`, `steps_skipped` (with `max_approx_kl`: the share of steps left out, whose loss and
    gradient norm count as 0), and `completions/finished`, the share of answers that ended with a stop token.

    Raises:
        ConfigError: settings that contradict each other, a reward model with another model's tokenizer, a prompt that is too
            long for the model.
        TokenizerError: a tokenizer with tokens that the model has no embedding for.
        FormatError: a row without a prompt.
        RewardError: a reward function that fails, or returns something else than rewards.
    """

    loss_is_scaled_for_ga: Any = True  # divided by the tokens of the whole step, see answers_made
    _prefix = "eval"
    # Of the answers of this process in the last batch: row, number in the batch, whether it is no repetition, rewards.
    _rows: list[Any]
    _numbers: range
    _new: Tensor
    _rewards: Tensor

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
        self._make_parts(args)
        functions, tokenizers = checked_rewards(
            reward_funcs,
            reward_processing_classes,
            on_error=args.reward_errors,
            tell_failed=lambda answers: self._failed.update(answers),
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
        self._evaluated = EvaluatedAnswers(self.reward_func_names, self.reward_weights)
        self.scores = AnswerScores.for_run(self)
        self.score_tokens()
        policy = self.accelerator.unwrap_model(self.model)
        self.critic = Critic.for_run(policy, args, critic_model, self.accelerator.device)
        self.critic_optimizer: CriticOptimizer | None = None
        self.add_callback(CriticSteps(lambda: self.critic_optimizer))
        self.add_callback(self.kl_stop)
        self.watch_language_models(
            eval_lm_datasets,
            self.text_tokenizer,
            max_length=args.eval_lm_max_length,
            max_increase=args.max_perplexity_increase,
        )

    def _make_parts(self, args: PPOConfig) -> None:
        """What the parent's constructor needs already."""
        self.policy_metrics = {"train": PolicyMetrics(), "eval": PolicyMetrics()}
        self.forwards = {}
        self._failed: set[int] = set()
        self._advantages = AdvantageEstimator(args.gamma, args.lam, args.whiten_rewards, args.whiten_advantages)
        self.kl_control = AdaptiveKL(args.beta, args.kl_target, args.kl_horizon)
        self.kl_stop, self.warmup = KLStop(args.max_approx_kl), CriticWarmup(args.critic_warmup_steps)

    def _check_policy_and_rows(self) -> None:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("no parameter of the policy requires a gradient; nothing would be trained")
        if self.is_multimodal:
            raise ConfigError("processing_class is a multimodal processor; PPOTrainer reads text only")
        refuse_zero_gradients(
            self, {name: getattr(self.args, name) for name in ("critic_warmup_steps", "max_approx_kl")}
        )
        refuse_other_models(self.model, self.text_tokenizer)
        self.args.check_rows(self.train_dataset)

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

    def generate_answers(self, prompt_ids: list, images: Any, multimodal_fields: Any) -> Any:
        """Answer prompts. What transformers' `generate` draws does not depend on batches and processes, see `OwnNoise`."""
        answer = super().generate_answers
        if self.use_vllm or self.use_transformers_continuous_batching:
            return answer(prompt_ids, images, multimodal_fields)
        generation = self.state.global_step + 1 if self.mode == "train" else 0
        noise = OwnNoise(self.args.seed, generation, self._numbers, self.accelerator.device)
        with processing_last(innermost(self.model), noise):
            return answer(prompt_ids, images, multimodal_fields)

    @contextmanager
    def reading_values(self, role: str, keep: int) -> Iterator[list[Tensor]]:
        """Let a shared critic read the states of the policy's backbone."""
        if self.critic is None or self.critic.backbone is not None or role != "policy":
            yield []
        else:
            policy = self.accelerator.unwrap_model(self.model)
            with self.critic.watching(policy, keep, alone=self.warmup.in_pass) as values:
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
        self.policy_metrics[self.mode].failures += sum(bool(self._new[i]) for i in self._failed)
        failed = [i + part * n for part, answers in enumerate(gather_objects(self._failed)) for i in answers]
        rewards[failed] = torch.nan
        self._rewards = rewards[rank() * n : (rank() + 1) * n]
        return rewards

    def generate_and_score(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Answer and score prompts, with values, advantages and returns of each token."""
        self._rows = [row.get("row") for row in inputs]
        n, trains = len(inputs), self.mode == "train"
        self._numbers = range(rank() * n, (rank() + 1) * n) if trains else self._evaluated.next_numbers(n)
        self._new = torch.tensor([trains or self._evaluated.is_new(number) for number in self._numbers])
        self.forwards.clear()
        output = super().generate_and_score(inputs)
        policy, reference = self.forwards.pop("policy"), self.forwards.pop("reference", None)
        mask = output["completion_mask"]
        size = self.args.per_device_train_batch_size if trains else self.args.per_device_eval_batch_size
        with torch.no_grad():
            ratio = None if reference is None else policy.logps - reference.logps
            kl = None if ratio is None else KL_ESTIMATORS[self.args.kl_estimator](ratio)
            values = self._values(output, policy.values, size)
            scores, scored, figures = self.scores.of(
                self._rewards, output["completion_ids"], mask, self._new, trains=trains
            )
            self.book(figures)
            used = mask * scored[:, None]
            advantages = self._advantages.of(scores, kl, values, used, kl_coef=self.kl_control.coef, trains=trains)
            means = (advantages.plain.sum(dim=1) / used.sum(dim=1).clamp(min=1)).tolist()
            self.show_advantages([mean for part in gather_objects(means) for mean in part])
        if not trains:
            stops, pad = self.eos_token_ids, self.text_tokenizer.pad_token_id
            self._evaluated.add(output["completion_ids"], mask, self._rewards, ratio, kl, stops=stops, pad=pad)
        elif kl is not None:
            self._book_kl(kl, mask)
        return {
            **output,
            "number": torch.tensor([*self._numbers], device=mask.device),
            "old_token_logps": policy.logps,
            "values": values,
            "advantages": advantages.trained,
            "returns": advantages.returns,
            "loss_mask": used,
        }

    def _values(self, batch: Mapping[str, Tensor], shared: Tensor | None, size: int | None = None) -> Tensor:
        """The critic's values of answers, float32 [batch, length], `size` rows at once; 0 without a critic."""
        if self.critic is not None and self.critic.backbone is not None:
            with self.accelerator.autocast():
                return self.critic.read_answers(batch, size)
        ids = batch["completion_ids"]
        return torch.zeros(ids.shape, device=ids.device) if shared is None else shared

    def _book_kl(self, kl: Tensor, mask: Tensor) -> None:
        nats, answers = sum_over_ranks([float((kl * mask).sum()), float(len(kl))])
        self.book({"kl_per_answer": nats / answers, "kl_coef": self.kl_control.coef})
        if not self.warmup.covers(self.state.global_step):  # a policy at rest says nothing about β
            self.kl_control.update(nats / answers, int(answers))

    def answers_of_epoch(self, batches: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        """Deal the answers to the steps of an epoch over them; see `deal`. TRL shuffles the answers of each process, once."""
        if epoch == 0:
            self.kl_stop.begin()
        size = self.args.gradient_accumulation_steps
        generation = self.state.global_step // (len(batches) // size * self.num_iterations)
        return deal(batches, size, (self.args.seed, generation, epoch))

    def leaves_out(self) -> bool:
        """Whether the policy is too far from the one that gave these answers, by `max_approx_kl`."""
        return self.kl_stop.is_over

    # -- steps ---------------------------------------------------------------------------------------------------

    def answers_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Compute the clipped losses of policy and critic, and the entropy bonus, of a micro-batch."""
        mask, completion = inputs["loss_mask"], inputs["completion_ids"]
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        rests = self.mode == "train" and self.warmup.covers(self.state.global_step)  # the critic learns alone
        with self.warmup.resting(rests):
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
        loss = torch.zeros_like(loss) if rests else loss
        value = errors = returns = None
        if self.critic is not None:
            values = self._values(inputs, values)
            clip = self.args.cliprange_value
            value = clipped_value_loss(values, inputs["values"], inputs["returns"], mask, clip=clip)
            loss = loss + self.args.vf_coef * value.loss
            errors, returns = Moments.of(inputs["returns"] - values, mask), Moments.of(inputs["returns"], mask)
        self.policy_metrics[self.mode].add(mask, entropy, policy, value, errors, returns)
        if "step_tokens" not in inputs:  # evaluation
            return loss / mask.sum().clamp(min=1)
        self.kl_stop.add(policy.approx_kl, inputs["step_tokens"])
        # Gradients are averaged over ranks. The count is over all ranks, so the average is undone here.
        loss = loss / inputs["step_tokens"] * self.accelerator.num_processes
        if self.aux_loss_enabled and not rests:
            loss = loss + self.router_aux_loss_coef * aux / self.current_gradient_accumulation_steps
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does, with the metrics of the steps since the last log, over all their tokens and ranks."""
        stopped = self.kl_stop.take() if self.mode == "train" else {}
        self.replace_booked({**self.policy_metrics[self.mode].take(), **stopped})
        dataset = self._prefix.removeprefix("eval").removeprefix("_")
        if self.mode == "eval" and dataset:  # the parent calls the metrics of each evaluation set `eval_`
            self.rename_booked(lambda name: f"{dataset}_{name}")
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the parent does, with figures of all answers; the logs afterwards have the prefix of the dataset."""
        self._prefix = kwargs.get("metric_key_prefix", "eval")
        rows, generations = dataloader.dataset, self.num_generations_eval
        self._evaluated.begin(len(rows) * generations if has_length(rows) else None)
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        figures = self.policy_metrics["eval"].take()
        if "policy_loss" in figures:
            loss = figures["policy_loss"] - self.args.entropy_coef * figures["entropy"]
            output.metrics[f"{self._prefix}_loss"] = loss + self.args.vf_coef * figures["value_loss"]
        figures |= self._evaluated.figures(generations, self.reward_clip_range, self.beta)
        self.replace_booked({**figures, **({"kl_coef": self.kl_control.coef} if "kl" in figures else {})}, "eval")
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the parent's schedule, and the critic's optimizer, now that the number of steps is known."""
        if self.critic is not None:
            known = {"decayed": self.get_decay_parameter_names(self.critic)}
            self.critic_optimizer = CriticOptimizer(self.critic, self.args, self.model, num_training_steps, **known)
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
            "kl_is_over": self.kl_stop.is_over,
            "reward_moments": self._advantages.reward_moments,
            "score_moments": self.scores.scale.state_dict(),
            "reference": self.accelerator.unwrap_model(self.ref_model).state_dict() if moves else None,
        }
        torch.save(state, folder / _STATE.format(rank=rank()))

    def load_best_state(self, folder: Path) -> None:
        """Read the critic that belongs to the best policy."""
        if self.critic_optimizer is not None and (folder / CriticOptimizer.file).exists():
            self.critic_optimizer.load(folder)

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
        self.kl_control.coef, self._advantages.reward_moments = state["kl_coef"], state.get("reward_moments", [])
        self.kl_stop.is_over = state.get("kl_is_over", False)
        self.scores.scale.load_state_dict(state.get("score_moments", {}))
        if state["reference"] is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])
