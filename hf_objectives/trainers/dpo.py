"""A DPO trainer that counts exactly, and says what preference optimisation does to the language model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_objectives.collators import DataCollatorForPreferencePairs
from hf_objectives.distributed import gather_objects
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import (
    COLUMNS,
    EvaluatesLanguageModels,
    PairScores,
    nats_per_token,
    pair_figures,
    unique_rows,
)
from hf_objectives.labels import encode_pair
from hf_objectives.trainers.dpo_config import PerplexityDPOConfig
from hf_objectives.trainers.guards import check_stream
from hf_objectives.trainers.pair_drift import Drift

_ENCODED = ("chosen_mask", "rejected_mask", "row")
# What TRL logs as the mean of its batches' means, and is counted over the rows here.
_COUNTED = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
_OURS = {field.name: field.default for field in dataclasses.fields(PerplexityDPOConfig)}


class PerplexityDPOTrainer(EvaluatesLanguageModels, DPOTrainer):
    """`trl.DPOTrainer` with exact figures of both answers and of the language model, and two cures for falling ones.

    A drop-in: arguments, losses and logged metrics are the parent's, and `args` may be a `DPOConfig` or None. Different are
    the rows: encoded by `encode_pair`, so that the model is trained on what it has to produce and nothing else, in any
    format and under any template, with a bad row as an error and none dropped; too long ones give up the beginning of
    their prompt first, whatever `truncation_mode` says. Rows of vision datasets, and rows that a processor encodes, are
    left to the parent.

    `evaluate` adds, over all rows and ranks, each row once: `eval_chosen_perplexity` and `eval_rejected_perplexity`, both
    also as `eval_reference_...`, exp(nats / tokens); `eval_num_pairs`, `eval_num_chosen_tokens` and
    `eval_num_rejected_tokens`; the parent's `eval_rewards/...` counted over rows, with a 95 % interval of the accuracy
    (`..._low`, `..._high`); and `eval_logps_change/chosen` and `/rejected`, nats per token since step 0. Training logs have
    the last two as well, where the reference is the model that training started from. No logits are gathered or computed
    again for any of it.

    Args:
        eval_lm_datasets: rows of texts or chats, or several by name, whose perplexity every evaluation measures; see
            `LanguageModelEvaluation`. The others are the parent's.

    Raises:
        DataError: a row that cannot be used; names dataset and row.
        ConfigError: settings that contradict each other, a dataset without rows.
    """

    args: Any
    model: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        eval_lm_datasets: Any = None,
    ) -> None:
        self._collator_is_ours = data_collator is None
        self._pairs: list[Tensor] | None = None
        if isinstance(data_collator, DataCollatorForPreferencePairs):
            data_collator = dataclasses.replace(data_collator, return_rows=True)
        sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if args is not None and any(isinstance(one, IterableDataset) for one in sets):
            # The parent sees to it for training: joined batches of several ranks would have to be of one width.
            args.accelerator_config.dispatch_batches = False
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._use_pair_collator()
        self._reference_is_start = self._compare_reference(given=ref_model is not None)
        self._drift: Drift | None = None
        if self._reference_is_start and not (self.precompute_ref_logps and self.ld_alpha is not None):
            self._drift = Drift(_setting(self.args, "warn_chosen_drop"))
        self._starts: dict[str, dict[str, float]] = {}
        if not self._reference_is_start:
            self.add_callback(_Baseline(self))
        self.watch_language_models(
            eval_lm_datasets,
            self._tokenizer,
            max_length=self.args.max_length,
            max_increase=_setting(self.args, "max_perplexity_increase"),
        )

    # -- rows ----------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """The rows with ids, masks and their numbers; rows that have ids already keep them."""
        first = next(iter(dataset), None)
        if first is None:
            raise ConfigError(f"dataset {dataset_name!r} has no rows; expected preference pairs")
        if isinstance(processing_class, ProcessorMixin):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        options: dict[str, Any] = {"with_indices": True}
        if isinstance(dataset, Dataset):  # a stream takes neither
            options |= {"num_proc": args.dataset_num_proc, "desc": f"Encoding {dataset_name} dataset"}
        if dataset_name != "train":
            check_stream(dataset, args.dataloader_num_workers, dataset_name)
        if "prompt_ids" in first:
            return dataset.map(_number, **options)
        settings = {
            "max_length": args.max_length,
            "train_on": _setting(args, "train_on"),
            "control_tokens": _setting(args, "control_tokens"),
            "source": dataset_name,
        }
        with PartialState().main_process_first():
            return dataset.map(_encode, fn_kwargs={"tokenizer": self._tokenizer, "settings": settings}, **options)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if not self._is_vision_dataset:
            columns += [name for name in _ENCODED if name not in columns]

    def _use_pair_collator(self) -> None:
        """Our collator in the place of the one that the parent makes where it is given none."""
        theirs = self.data_collator
        if not self._collator_is_ours or type(theirs) is not DataCollatorForPreference:
            return
        self.data_collator = DataCollatorForPreferencePairs(
            self._tokenizer,
            max_length=theirs.max_length,
            train_on=_setting(self.args, "train_on"),
            control_tokens=_setting(self.args, "control_tokens"),
            pad_to_multiple_of=theirs.pad_to_multiple_of,
            return_rows=True,
        )

    # -- reference -----------------------------------------------------------------------------------------------

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The parent's; its cache knows rows and model by hash, and here also what is summed, and of how long a row."""
        self._use_pair_collator()
        known = self._precompute_model_hash
        collator = type(self.data_collator).__name__
        self._precompute_model_hash = f"{known} {collator} {self.args.max_length} {self.ld_alpha}"
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = known

    def compute_ref_log_probs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The parent's, of a batch that may carry row numbers."""
        return super().compute_ref_log_probs(model, {key: inputs[key] for key in inputs if key != "row_ids"})

    def _compare_reference(self, *, given: bool) -> bool:
        """Whether the reference is the model that training starts from."""
        if self.args.sync_ref_model:
            return False
        if self.ref_model is None:
            if not is_peft_model(self.model) or "ref" in self.model.peft_config:
                return True
            # The base model: a new adapter adds nothing to it unless it was asked to begin elsewhere.
            begins = getattr(self.model.peft_config[self.model.active_adapter], "init_lora_weights", False)
            return begins is True or begins == "gaussian"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # no rank holds all weights
            return not given
        ours, theirs = (dict(of.named_parameters()) for of in (self.model, self.ref_model))
        if ours.keys() != theirs.keys():
            return False
        return all(torch.equal(ours[name].to(theirs[name].device), theirs[name]) for name in ours)

    # -- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The parent's loss, plus `nll_weight` and `dpop_lambda`; its forwards are watched for the figures."""
        inputs = dict(inputs)
        row_ids = inputs.pop("row_ids", None)
        with _watched([self.model, self.ref_model]) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores = self._scores(seen, inputs)
        added = self._added(scores)
        if not self.model.training:
            if self._pairs is not None:
                self._pairs.append(scores.rows(self.beta, row_ids))
        elif self._drift is not None:
            self._drift.add(scores.drift())
        if added is None:
            return result
        return (result[0] + added, result[1]) if return_outputs else result + added

    def _scores(self, seen: list[Tensor], inputs: Mapping[str, Any]) -> PairScores:
        """What the parent's forwards gave: the policy's first, then the reference's where it was not computed before."""
        expected = 1 if self.precompute_ref_logps else 2
        if len(seen) != expected:
            raise ConfigError(
                f"{len(seen)} forwards of DPOTrainer gave log-probabilities, expected {expected}: this release of TRL "
                "computes its loss in another way than the one that PerplexityDPOTrainer was written for"
            )
        mask = inputs["completion_mask"][:, 1:]
        width = mask.shape[1]
        policy, *reference = [logps[:, -width:] for logps in seen]  # prompt tuning puts tokens of its own before
        sums = None
        if self.precompute_ref_logps:
            sums = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        return PairScores(policy, reference[0] if reference else None, mask, sums, self.ld_alpha)

    def _added(self, scores: PairScores) -> Tensor | None:
        """What goes to the parent's loss, None where nothing does."""
        added = None
        if weight := _setting(self.args, "nll_weight"):
            added = weight * scores.chosen_nll()
        if penalty := _setting(self.args, "dpop_lambda"):
            chosen, rejected = scores.log_ratios().chunk(2)
            margin = chosen - rejected
            plain, lowered = (-logsigmoid(self.beta * m).mean() for m in (margin, margin - penalty * (-chosen).relu()))
            term = self.loss_weights[0] * (lowered - plain)
            added = term if added is None else added + term
        return added

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's logs; those of training add how far the answers have moved since step 0."""
        if "loss" in logs and self._drift is not None:
            logs.update(self._drift.take(self.state.global_step))
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The parent's; the figures of its pairs are gathered once at the end and counted row by row."""
        self._pairs = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            own = torch.cat(self._pairs).cpu().numpy() if self._pairs else np.empty((0, len(COLUMNS)))
        finally:
            self._pairs = None
        rows = unique_rows(gather_objects(own))
        if not len(rows):
            return output
        figures = pair_figures(rows)
        for name in _COUNTED:
            self._metrics["eval"][name] = [figures[name]]  # the parent's log writes these over ours
        figures |= self._change(rows, metric_key_prefix)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _change(self, rows: Any, prefix: str) -> dict[str, float]:
        """Nats per token since step 0, of both answers."""
        now, reference = nats_per_token(rows), nats_per_token(rows, "ref_")
        if self._reference_is_start:
            start = {side: value for side, value in reference.items() if not math.isnan(value)}
        else:
            if self.state.global_step == 0:
                self._starts[prefix] = now
            start = self._starts.get(prefix) or _logged_start(self.state.log_history, prefix)
        return {f"logps_change/{side}": start[side] - now[side] for side in start}


class _Baseline(TrainerCallback):
    """Evaluates once before the first step: where the reference is another model, nothing else tells where it began."""

    def __init__(self, trainer: PerplexityDPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if state.global_step or trainer.eval_dataset is None:
            return
        if not trainer._starts and not args.eval_on_start:
            trainer.evaluate()
            return
        for (
            prefix,
            nats,
        ) in trainer._starts.items():  # measured before: the new history has to hold it, for a resumed run
            Trainer.log(trainer, {f"{prefix}_{side}_perplexity": math.exp(value) for side, value in nats.items()})


def _setting(args: Any, name: str) -> Any:
    """A setting of ours, at its default where the arguments are the parent's."""
    return getattr(args, name, _OURS[name])


def _encode(row: Mapping[str, Any], index: int, *, tokenizer: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**encode_pair(tokenizer, row, row_index=index, **settings), "row": index}


def _number(row: Mapping[str, Any], index: int) -> dict[str, int]:
    return {"row": index}


def _logged_start(history: Iterable[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Nats per token of the evaluation at step 0 that a log holds; empty where it holds none."""
    names = {side: f"{prefix}_{side}_perplexity" for side in ("chosen", "rejected")}
    for entry in history:
        if entry.get("step") == 0 and all(name in entry for name in names.values()):
            return {side: math.log(entry[name]) for side, name in names.items()}
    return {}


@contextmanager
def _watched(models: Iterable[nn.Module | None]) -> Iterator[list[Tensor]]:
    """The per-token log-probabilities of every forward of these models that computes them, in order."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        if (logps := getattr(output, "log_probs", None)) is not None:
            seen.append(logps)

    handles = [model.register_forward_hook(keep) for model in models if model is not None]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
