"""A distillation trainer: a student learns the token distributions of a teacher, on its own answers or on given ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from hf_objectives.distributed import rank, sum_over_ranks
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import EvaluatesLanguageModels, HeadInputs, at_head, refuse_other_models
from hf_objectives.labels import token_byte_lengths
from hf_objectives.trainers.distillation_config import PerplexityDistillationConfig
from hf_objectives.trainers.distillation_evaluation import GIVEN, OWN, EvaluatedRows, RowSums, figures_of
from hf_objectives.trainers.distillation_rows import parts_of, read_rows, without_nulls
from hf_objectives.trainers.distillation_teacher import (
    check_sizes,
    check_tokenizers,
    refuse_same_model,
    teacher_tokenizer,
)
from hf_objectives.trainers.guards import ensure_stop_tokens
from hf_objectives.trainers.hf_compat import free_of_trainers, positions_behind_padding, processing_last, stop_ids
from hf_objectives.trainers.metrics import MetricSums, TrainedStops
from hf_objectives.trainers.refusals import refuse_fp16_on_cpu
from hf_objectives.trainers.sampling import OwnNoise
from hf_objectives.trainers.trl_compat import innermost
from hf_objectives.trainers.trl_distillation import DistillationHooks, target_nats, token_divergences
from hf_objectives.types import IGNORE_INDEX


class PerplexityDistillationTrainer(EvaluatesLanguageModels, DistillationHooks):
    """`trl.DistillationTrainer` with exact figures, on the student's own answers or on those of the rows.

    Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649): the loss is the generalised Jensen-Shannon
    divergence between the teacher's and the student's distribution of each trained token. `lmbda` is the share of steps whose
    answers are the student's; the others are trained on the answers of their rows, on exactly the tokens that fine-tuning
    trains (`encode_row`). Arguments, generation and logs are the parent's.

    The loss of a step is a sum over the tokens of all its micro-batches and ranks, divided by their number. An answer has
    noise of its own, so that it does not depend on the batch and the process that draw it. The student stops where the
    teacher does.

    `evaluate` sums over all tokens of all ranks, each row once, whatever the batch size and the number of processes. Of rows
    with answers: `eval_perplexity`, `eval_bits_per_byte`, `eval_num_tokens`, `eval_teacher_perplexity`, and
    `eval_divergence`, nats per token under `beta` and `temperature`. Of the student's own answers, unless `lmbda` is 0:
    `eval_on_policy_divergence`, `eval_entropy` and the parent's `eval_completions/...`. `eval_loss` weighs the two
    divergences by `lmbda`.

    Args (beyond the parent's):
        args: a `PerplexityDistillationConfig`.
        train_dataset, eval_dataset: rows in any format that `to_prompt` reads; with `lmbda` below 1 those that `encode_row`
            reads too. With `lmbda=0` texts and encoded rows as well.
        teacher_processing_class: the teacher's tokenizer; None for that of the folder or repository the teacher came from.
        eval_lm_datasets: rows of texts or chats, or several by name, whose perplexity every evaluation measures; see
            `LanguageModelEvaluation`.

    Raises:
        ConfigError: settings that contradict each other; a teacher that is missing, is the student, or has another
            vocabulary; a model that is no causal language model; tools or a multimodal processor; a stream to evaluate.
        DataError: a row that cannot be used; names dataset and row.
        TokenizerError: a tokenizer with tokens that a model has no embedding for.
    """

    extra_columns = ("row", "input_ids", "labels")
    args: PerplexityDistillationConfig
    _evaluated: EvaluatedRows

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: PerplexityDistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        *,
        teacher_processing_class: Any = None,
        eval_lm_datasets: Any = None,
    ) -> None:
        if args is None:
            args = PerplexityDistillationConfig("trainer_output")
        if not isinstance(args, PerplexityDistillationConfig):
            raise ConfigError(f"args is {type(args).__name__}; expected PerplexityDistillationConfig")
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is None:
            raise ConfigError("teacher_model is missing; give a model, or its folder or Hub id")
        if tools:
            raise ConfigError(
                "tools are not supported: an answer of several turns has no noise of its own; leave them out"
            )
        refuse_fp16_on_cpu(args)
        for one in (model, teacher_model):
            refuse_other_models(one)
        check_sizes(model, teacher_model, args)
        free_of_trainers(model, teacher_model)
        given = (model, teacher_model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        super().__init__(*given, quantization_config, peft_config)
        self._check_models(teacher_processing_class)
        tokenizer = self.text_tokenizer
        self.train_dataset = read_rows(train_dataset, "train_dataset", tokenizer, args)
        self.eval_dataset = read_rows(eval_dataset, "eval_dataset", tokenizer, args)
        args.check_rows(self.train_dataset)
        self._byte_lengths = token_byte_lengths(tokenizer)
        self._sums, self._stops = MetricSums("tokens", "entropy"), TrainedStops()
        self._teacher_stops = stop_ids(getattr(innermost(self.teacher_model), "generation_config", None))
        self.stop_at(ensure_stop_tokens(innermost(self.model), self._teacher_stops, tokenizer))
        self.watch_language_models(
            eval_lm_datasets,
            tokenizer,
            max_length=args.eval_lm_max_length,
            max_increase=args.max_perplexity_increase,
        )

    def _check_models(self, teachers: Any) -> None:
        if self.is_multimodal:
            raise ConfigError("processing_class is a multimodal processor; distillation reads text only")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("no parameter of the student requires a gradient; nothing would be trained")
        if getattr(self.model.config.get_text_config(), "output_router_logits", False):
            raise ConfigError(
                "the student's config asks for the auxiliary loss of experts, which the divergence does not have; set "
                "output_router_logits=False there"
            )
        teacher = innermost(self.teacher_model)
        for one in (self.model, teacher):
            refuse_other_models(one, self.text_tokenizer)
        if teachers is None:
            teachers = teacher_tokenizer(teacher, self.args)
        check_tokenizers(self.text_tokenizer, teachers)
        if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:  # else no rank holds all weights here
            refuse_same_model(self.model, self.teacher_model)

    # -- answers -------------------------------------------------------------------------------------------------

    def tokenize_prompts(self, prompts: list) -> Any:
        """Tokenize prompts; one that leaves no room for an answer is an error that names its row."""
        prompts = [prompt if isinstance(prompt, str) else without_nulls(prompt) for prompt in prompts]
        result = super().tokenize_prompts(prompts)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for i, ids in enumerate(result[0]):
            if limit is not None and len(ids) + int(self.max_completion_length) > limit:
                raise ConfigError(
                    f"the prompt of row {self._rows[i]} has {len(ids)} tokens, which with max_completion_length="
                    f"{self.max_completion_length} is over the model's {limit} positions: {prompts[i]!r:.200}"
                )
        return result

    def generate_answers(self, prompt_ids: list, images: Any, multimodal_fields: Any, *more: Any) -> Any:
        """Answer prompts. What transformers' `generate` draws does not depend on batches and processes, see `OwnNoise`."""
        answer = super().generate_answers
        if self.use_vllm:
            return answer(prompt_ids, images, multimodal_fields, *more)
        noise = OwnNoise(self.args.seed, self._step_number(), self._numbers, self.accelerator.device)
        with processing_last(innermost(self.model), noise):
            return answer(prompt_ids, images, multimodal_fields, *more)

    def _step_number(self) -> int:
        """The step that answers are made for, from 1; 0 in an evaluation."""
        return self.state.global_step + 1 if self.mode == "train" else 0

    def answer(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Give the answers to rows: the student's own in an evaluation and in a share `lmbda` of the steps."""
        if self.mode == "eval":
            return super().answer(inputs)
        self._rows, n = [row["row"] for row in inputs], len(inputs)
        self._numbers = range(rank() * n, (rank() + 1) * n)
        draw = np.random.default_rng((self.args.seed, self._step_number())).random()  # the same on all ranks
        is_own = draw < self.args.lmbda
        self.book({"on_policy": float(is_own)})
        return super().answer(inputs) if is_own else self.given_answers(inputs)

    def given_answers(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch of the answers that rows have, as TRL makes one of the student's: int64 [rows, length] each."""
        parts = [parts_of(list(row["input_ids"]), list(row["labels"])) for row in rows]
        pad = self.text_tokenizer.pad_token_id
        batch = {
            "prompt_ids": self.padded([part.prompt for part in parts], pad, "left"),
            "prompt_mask": self.padded([[1] * len(part.prompt) for part in parts], 0, "left"),
            "completion_ids": self.padded([part.completion for part in parts], pad, "right"),
            "completion_mask": self.padded([[1] * len(part.completion) for part in parts], 0, "right"),
            "tool_mask": self.padded([part.trained for part in parts], 0, "right"),
        }
        if self.mode == "train":
            seen = sum(len(part.prompt) + len(part.completion) for part in parts)
            trained = sum(sum(part.trained) for part in parts)
            total, everything = sum_over_ranks([float(trained), float(seen)])
            self.state.num_input_tokens_seen += int(everything)
            self.replace_booked({"num_tokens": self.state.num_input_tokens_seen})
            batch["num_items_in_batch"] = torch.tensor(total, device=self.accelerator.device)
            self._stops.add(torch.where(_mask(batch), batch["completion_ids"], IGNORE_INDEX))
        return batch

    # -- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the divergence of a micro-batch as its share of the mean over the whole step.

        Raises:
            ConfigError: `return_outputs`: there are no logits of all positions to return.
        """
        if return_outputs:
            raise ConfigError("logits are never made whole; call the model for its outputs")
        (divergence, entropy, *_), nothing = self._compare(model, inputs, with_nats=False)
        counted = entropy.new_tensor(len(entropy))
        self._sums.add(torch.stack([counted.double(), entropy.double().sum()]))
        # Gradients are averaged over ranks. The count is over all ranks, so the average is undone here.
        share = self.accelerator.num_processes / inputs["num_items_in_batch"].clamp(min=1)
        return divergence.sum() * share + nothing

    def _compare(
        self, model: Any, batch: Mapping[str, Tensor], *, with_nats: bool
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of each trained token of a batch, row by row: divergence and entropy; and, if wanted, its nats under student and
        teacher. The 0 of `at_head` comes with them.
        """
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        }
        mask = _mask(batch)
        rows, columns = mask.nonzero(as_tuple=True)
        places = rows * ids.shape[1] + batch["prompt_ids"].shape[1] + columns - 1
        targets = batch["completion_ids"][mask]

        def read(head: HeadInputs) -> tuple[HeadInputs, Tensor]:
            return head, target_nats(head, targets) if with_nats else targets

        def compare(head: HeadInputs) -> tuple[Tensor, ...]:
            if head.weight.device != teacher.weight.device:
                raise ConfigError(
                    f"the student's head is on {head.weight.device} and the teacher's on {teacher.weight.device}; expected "
                    "one device: set device_map of both models so"
                )
            found = token_divergences(head, teacher, beta=self.beta, temperature=self.temperature)
            return *found, *((target_nats(head, targets), teacher_nats) if with_nats else ())

        self.teacher_model.eval()
        with torch.no_grad(), positions_behind_padding(innermost(self.teacher_model)):
            (teacher, teacher_nats), _ = at_head(self.teacher_model, inputs, ids.shape, places, read)
        with positions_behind_padding(innermost(model)):
            return at_head(model, inputs, ids.shape, places, compare)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does; `entropy` of training is over all tokens since the last log."""
        if "loss" in logs:
            sums = self._sums.take()
            if sums["tokens"]:
                self.replace_booked({"entropy": sums["entropy"] / sums["tokens"]}, "train")
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Load all rows of an evaluation, whatever `dataloader_drop_last`; those without a name are read first."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = read_rows(eval_dataset, "eval_dataset", self.text_tokenizer, self.args)
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the parent does; the sums of rows are gathered once at the end.

        Raises:
            ConfigError: a stream, whose last batch would count rows twice.
        """
        rows = dataloader.dataset
        if not has_length(rows):
            raise ConfigError("eval_dataset is a stream; expected rows with a number, such as a Dataset or a list")
        self._evaluated = EvaluatedRows(len(rows))
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = figures_of(self._evaluated.over_ranks(), self.args.lmbda)
        self.drop_booked("eval")  # means of means of batches
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, None, None]:
        """Sum over the tokens of rows, with the student's own answers and with those that they have."""
        self._rows = [row["row"] for row in inputs]
        self._numbers = self._evaluated.next_numbers(len(inputs))
        with torch.no_grad():
            if self.args.lmbda:
                batch = self.answer(inputs)
                self._evaluated.add(OWN, self._numbers, self._row_sums(model, batch, OWN))
            if "input_ids" in inputs[0]:
                self._evaluated.add(GIVEN, self._numbers, self._row_sums(model, self.given_answers(inputs), GIVEN))
        return None, None, None

    def _row_sums(self, model: Any, batch: Mapping[str, Tensor], kind: str) -> RowSums:
        found, _ = self._compare(model, batch, with_nats=kind == GIVEN)
        mask, ids = _mask(batch), batch["completion_ids"]
        rows = mask.nonzero()[:, 0]
        values = [torch.ones(len(rows), device=ids.device), *found]
        if kind == GIVEN:
            lengths = self._byte_lengths[ids[mask].cpu().numpy()]
            values.append(torch.from_numpy(lengths).to(ids.device))
        values += [values[0] * 0] * (len(RowSums._fields) - 1 - len(values))
        sums = [torch.zeros(len(ids), dtype=torch.float64, device=ids.device) for _ in values]
        sums = [total.index_add_(0, rows, value.double()) for total, value in zip(sums, values, strict=True)]
        last = ids.gather(1, batch["completion_mask"].sum(dim=1, keepdim=True) - 1)[:, 0]
        ends = torch.tensor([*self.eos_token_ids, self.text_tokenizer.pad_token_id], device=ids.device)
        return RowSums(*(part.cpu().numpy() for part in (*sums, (~torch.isin(last, ends)).double())))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, with every stop token that was learnt among the EOS ids of the generation config."""
        stops = [*dict.fromkeys([*self._teacher_stops, *self._stops.ids(self.text_tokenizer)])]
        inner = self.accelerator.unwrap_model(self.model)
        ensure_stop_tokens(innermost(inner), stops, self.text_tokenizer)
        super().save_model(output_dir, _internal_call)
        if stops and self.args.should_save and hasattr(inner, "peft_config"):
            # The folder of an adapter has no generation config, and that of the base model would not stop.
            innermost(inner).generation_config.save_pretrained(output_dir or self.args.output_dir)


def _mask(batch: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of the answers are trained, bool [rows, length]."""
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
