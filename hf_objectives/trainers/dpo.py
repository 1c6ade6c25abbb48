"""A DPO trainer with exact figures of both answers, and of what preference optimisation does to the language model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, has_length

from hf_objectives.collators import DataCollatorForPreferencePairs
from hf_objectives.distributed import gather_objects
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import (
    EvaluatesLanguageModels,
    PairLoss,
    PairScores,
    by_column,
    nats_per_token,
    pair_figures,
    refuse_other_models,
    unique_rows,
)
from hf_objectives.labels import SIDES, encode_pair
from hf_objectives.trainers.collation import bound_ids
from hf_objectives.trainers.dpo_config import DEFAULTS
from hf_objectives.trainers.guards import map_numbered
from hf_objectives.trainers.hf_compat import copies_of_rows, free_of_trainers, let_copies_run
from hf_objectives.trainers.metrics import PairMetrics
from hf_objectives.trainers.refusals import refuse_fp16_on_cpu
from hf_objectives.trainers.shared_prompt import SharedPrompts
from hf_objectives.trainers.trl_compat import DPOCollator, DPOHooks, innermost

# TRL logs the mean of its batches' means under these names. Here they are counted over pairs or tokens.
_COUNTED = (
    *("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"),
    *("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
)
_TOKENS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@contextmanager
def asking_for_padding(args: Any) -> Iterator[None]:
    """Within it, `args` ask TRL for no `padding_free`, which TRL warns of and drops. Afterwards they are the caller's."""
    wanted = getattr(args, "padding_free", None)
    if wanted:
        args.padding_free = False
    try:
        yield
    finally:
        if wanted:
            args.padding_free = wanted


class PerplexityDPOTrainer(EvaluatesLanguageModels, DPOHooks):
    """`trl.DPOTrainer` with exact figures of both answers and of the language model, and two cures for falling answers.

    Arguments, losses and logged metrics are the parent's, and `args` may be a `DPOConfig` or None. The rows differ:
    `encode_pair` encodes them in any format and under any template, so that only what the model must produce is trained.
    A bad row is an error, and no row is dropped. A row that is too long loses the beginning of its prompt first, whatever
    `truncation_mode` says. The parent keeps rows of vision datasets and rows that a processor encodes.

    The figures of `evaluate` are sums over all pairs or tokens of all ranks, each row once, whatever the batch size and the
    number of processes. `eval_loss` is the loss of one batch that holds every pair, in float64: the mean over pairs; for
    `sft` and `nll_weight` over tokens; `aot` and `aot_unpaired` sort all pairs. It has no auxiliary loss of experts, whose
    `eval_aux_loss` is the parent's mean over batches. A subclass that overrides the loss keeps the parent's `eval_loss`, a
    mean over batches. Pairs without numbers (vision, a collator of the parent) are counted once where their dataset has a
    length. The parent's other figures keep their names. Added are
    `eval_chosen_perplexity` and `eval_rejected_perplexity`, also as `eval_reference_...`, exp(nats / tokens);
    `eval_num_pairs`, `eval_num_chosen_tokens` and `eval_num_rejected_tokens`; a 95 % interval of `eval_rewards/accuracies`
    (`..._low`, `..._high`); and `eval_logps_change/chosen` and `/rejected`, nats per token since step 0. Training logs
    have the last two as well, where the reference is the model that training started from. They cost no further forward
    pass.

    Args:
        eval_lm_datasets: rows of texts or chats, or several by name, whose perplexity every evaluation measures; see
            `LanguageModelEvaluation`. The other arguments are the parent's.

    Raises:
        DataError: a row that cannot be used; names dataset and row.
        ConfigError: settings that contradict each other, a dataset without rows, or what `padding_free` does not go with.
        TokenizerError: a tokenizer with tokens that the model has no embedding for.
        PackingLeakError: under `padding_free`, before a model is used that does not give the numbers of the padded batch.
    """

    extra_columns = ("chosen_mask", "rejected_mask", "row")

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        eval_lm_datasets: Any = None,
    ) -> None:
        self._collator_is_ours = data_collator is None
        self._pairs: list[Tensor] | None = None  # of an evaluation, the figures of each batch
        if isinstance(data_collator, DataCollatorForPreferencePairs):
            data_collator = dataclasses.replace(data_collator, return_rows=True)
        sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if args is not None and any(isinstance(rows, IterableDataset) for rows in sets):
            # As the parent does for training: joined batches of several ranks would have to be of one width.
            args.accelerator_config.dispatch_batches = False
        self._shared = SharedPrompts(self) if getattr(args, "padding_free", False) else None
        refuse_fp16_on_cpu(args)
        _check_policy(model, ref_model, args, peft_config)
        free_of_trainers(model, ref_model)
        given = (model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics)
        with asking_for_padding(args):
            super().__init__(*given, callbacks, optimizers, quantization_config, peft_config)
        refuse_other_models(self.model, self.text_tokenizer)
        self._whole_loss = self._loss_of_a_set()
        self._use_pair_collator()
        if self._shared is not None:
            self._shared.install()
            self.padding_free = True
        else:
            for used in (self.model, self.ref_model):
                if used is not None:
                    let_copies_run(innermost(used))
        self.reference_is_start = self._compare_reference(given=ref_model is not None)
        self.pair_metrics: PairMetrics | None = None
        if self.reference_is_start and not (self.precompute_ref_logps and self.ld_alpha is not None):
            self.pair_metrics = PairMetrics(self._setting("warn_chosen_drop"))
        self._starts: dict[str, dict[str, float]] = {}
        if not self.reference_is_start:
            self.add_callback(_Baseline(self))
        self.watch_language_models(
            eval_lm_datasets,
            self.text_tokenizer,
            max_length=self.args.max_length,
            max_increase=self._setting("max_perplexity_increase"),
        )

    def _setting(self, name: str) -> Any:
        """A setting of `PerplexityDPOConfig`, or its default where `args` are the parent's."""
        return getattr(self.args, name, DEFAULTS[name])

    # -- rows ----------------------------------------------------------------------------------------------------

    def prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Encode and number the rows. Rows that have ids already keep them."""
        first = next(iter(dataset), None)
        if first is None:
            raise ConfigError(f"dataset {dataset_name!r} has no rows; expected preference pairs")
        if isinstance(processing_class, ProcessorMixin):
            return super().prepare_dataset(dataset, processing_class, args, dataset_name)
        if "prompt_ids" in first:
            return map_numbered(dataset, _number, dataset_name, args)
        settings = {
            "max_length": args.max_length,
            "train_on": getattr(args, "train_on", DEFAULTS["train_on"]),
            "control_tokens": getattr(args, "control_tokens", DEFAULTS["control_tokens"]),
            "source": dataset_name,
        }
        arguments = {"tokenizer": self.text_tokenizer, "settings": settings}
        return map_numbered(dataset, _encode, dataset_name, args, fn_kwargs=arguments)

    def _use_pair_collator(self) -> None:
        """Replace the collator that the parent makes where it is given none."""
        theirs = self.data_collator
        if self._collator_is_ours and type(theirs) is DPOCollator:
            self.data_collator = DataCollatorForPreferencePairs(
                self.text_tokenizer,
                max_length=theirs.max_length,
                train_on=self._setting("train_on"),
                control_tokens=self._setting("control_tokens"),
                pad_to_multiple_of=theirs.pad_to_multiple_of,
                return_rows=True,
            )
        bound_ids(self.data_collator, self.model)

    # -- reference -----------------------------------------------------------------------------------------------

    def reference_settings(self) -> str:
        """What the sums under the reference depend on; the parent's cache knows rows and model only."""
        self._use_pair_collator()
        if self._shared is not None:  # the parent is still in its __init__
            self._shared.install()
        return f"{type(self.data_collator).__name__} {self.args.max_length} {self.ld_alpha}"

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Compute what the parent does, of a batch that may carry row numbers."""
        if self._shared is not None:
            self._shared.prove(model)
        return super().compute_ref_log_probs(
            model, {key: inputs[key] for key in inputs if key not in ("row_ids", "margin")}
        )

    def _compare_reference(self, *, given: bool) -> bool:
        """Whether the reference is the model that training starts from."""
        if self.args.sync_ref_model:
            return False
        if self.ref_model is None:
            if not is_peft_model(self.model) or "ref" in self.model.peft_config:
                return True
            # The reference is the base model. A new adapter changes nothing unless its config asks for another start.
            begins = getattr(self.model.peft_config[self.model.active_adapter], "init_lora_weights", False)
            return begins is True or begins == "gaussian"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # no rank holds all weights
            return not given
        policy, reference = (dict(model.named_parameters()) for model in (self.model, self.ref_model))
        if policy.keys() != reference.keys():
            return False
        return all(torch.equal(policy[name].to(reference[name].device), reference[name]) for name in policy)

    # -- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the parent's loss, plus `nll_weight` and `dpop_lambda`; the figures come from its forward passes."""
        inputs = dict(inputs)
        row_ids = inputs.pop("row_ids", None)
        inputs.pop("margin", None)  # of a reward model
        if self._shared is not None:
            for used in (model, self.ref_model if not self.precompute_ref_logps else None):
                if used is not None:
                    self._shared.prove(used)
        with self.watching_forwards() as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores = self._scores(seen, inputs)
        added = self._added(scores)
        if not self.model.training:
            if self._pairs is not None:
                self._pairs.append(scores.rows(row_ids))
        elif self.pair_metrics is not None:
            self.pair_metrics.add(scores.drift())
        if added is None:
            return result
        return (result[0] + added, result[1]) if return_outputs else result + added

    def _scores(self, seen: Mapping[str, Any], inputs: Mapping[str, Any]) -> PairScores:
        mask = inputs["completion_mask"][:, 1:]
        width = mask.shape[1]  # prompt tuning puts tokens before
        own = {role: output.log_probs[:, -width:] for role, output in seen.items()}
        sums = None
        if self.precompute_ref_logps:
            sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        tokens = {name: value[:, -width:] for name in _TOKENS if (value := getattr(seen["policy"], name)) is not None}
        lengths = inputs["completion_mask"].sum(dim=1)
        return PairScores(own["policy"], own.get("reference"), mask, sums, self.ld_alpha, lengths, tokens)

    def _added(self, scores: PairScores) -> Tensor | None:
        """What is added to the parent's loss; None for nothing."""
        added = None
        if weight := self._setting("nll_weight"):
            added = weight * scores.chosen_nll()
        if penalty := self._setting("dpop_lambda"):
            chosen, rejected = scores.log_ratios().chunk(2)
            margin = chosen - rejected
            plain, lowered = (-logsigmoid(self.beta * m).mean() for m in (margin, margin - penalty * (-chosen).relu()))
            term = self.loss_weights[0] * (lowered - plain)
            added = term if added is None else added + term
        return added

    def _loss_of_a_set(self) -> PairLoss | None:
        """The loss over all pairs; None where a subclass has another loss."""
        own: Any = type(self)
        if own.compute_loss is not PerplexityDPOTrainer.compute_loss or own.batch_loss is not DPOHooks.batch_loss:
            return None
        names = [field.name for field in dataclasses.fields(PairLoss)][2:]
        return PairLoss(tuple(self.loss_types), tuple(self.loss_weights), *map(self._setting, names))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does; training logs add how far the answers have moved since step 0."""
        if "loss" in logs and self.pair_metrics is not None:
            logs.update(self.pair_metrics.take(self.state.global_step))
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as the parent does; the figures of pairs are gathered once at the end and counted row by row."""
        self._pairs = []
        try:
            output: EvalLoopOutput = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            parts = gather_objects([rows.cpu().numpy() for rows in self._pairs])
        finally:
            self._pairs = None
        dataset = getattr(dataloader, "dataset", None)
        rows = unique_rows(parts[:: copies_of_rows()], len(dataset) if has_length(dataset) else None)
        if len(rows):
            figures = pair_figures(rows, self.beta)
            counted = [name for name in _COUNTED if name in figures]
            if self._whole_loss is not None:
                figures["loss"] = self._whole_loss.of(by_column(rows))
            self.add_figures(output, figures | self._change(rows, metric_key_prefix), metric_key_prefix, counted)
        return output

    def _change(self, rows: Any, prefix: str) -> dict[str, float]:
        """Nats per token since step 0, of both answers."""
        now, reference = nats_per_token(rows), nats_per_token(rows, "ref_")
        if self.reference_is_start:
            start = {side: value for side, value in reference.items() if not math.isnan(value)}
        else:
            if self.state.global_step == 0:
                self._starts[prefix] = now
            start = self._starts.get(prefix) or _logged_start(self.state.log_history, prefix)
        return {f"logps_change/{side}": start[side] - now[side] for side in start}


class _Baseline(TrainerCallback):
    """Evaluates once before the first step: where the reference is another model, nothing else tells the start."""

    def __init__(self, trainer: PerplexityDPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if state.global_step or trainer.eval_dataset is None:
            return
        if not trainer._starts and not args.eval_on_start:
            trainer.evaluate()
            return
        for prefix, nats in trainer._starts.items():  # measured before training: a resumed run reads it from the log
            Trainer.log(trainer, {f"{prefix}_{side}_perplexity": math.exp(value) for side, value in nats.items()})


def _encode(row: Mapping[str, Any], index: int, *, tokenizer: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**encode_pair(tokenizer, row, row_index=index, **settings), "row": index}


def _number(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Rows of ids have a number, and masks of all of their answers where they have none."""
    masks = {f"{side}_mask": row.get(f"{side}_mask") for side in SIDES}
    whole = {name: [1] * len(row[name.replace("mask", "ids")]) for name, mask in masks.items() if mask is None}
    return {**whole, "row": index}


def _logged_start(history: Iterable[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Nats per token of the evaluation at step 0 in a log; empty where it has none."""
    names = {side: f"{prefix}_{side}_perplexity" for side in ("chosen", "rejected")}
    for entry in history:
        if entry.get("step") == 0 and all(name in entry for name in names.values()):
            return {side: math.log(entry[name]) for side, name in names.items()}
    return {}


def _check_policy(model: Any, ref_model: Any, args: Any, peft_config: Any) -> None:
    refuse_other_models(model)
    # TRL loads no reference for an adapter, nor for sums that are computed before training.
    needs_none = (
        peft_config is not None or hasattr(model, "peft_config") or getattr(args, "precompute_ref_log_probs", False)
    )
    if ref_model is None and not needs_none and getattr(model, "name_or_path", None) == "":
        raise ConfigError(
            "the model comes from no folder and no repository, where its reference would be loaded from; pass "
            "ref_model=copy.deepcopy(model)"
        )
