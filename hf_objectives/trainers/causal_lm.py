"""A Trainer of language models whose loss and evaluation are exact sums over predicted tokens."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, PredictionOutput

from hf_objectives.distributed import any_rank, sum_over_ranks, world_size
from hf_objectives.errors import ConfigError, NothingSupervisedError
from hf_objectives.evaluation import (
    EvaluationCounts,
    count_batch,
    next_token_outputs,
    predicting_places,
    refuse_other_models,
    split_extra_columns,
)
from hf_objectives.labels import token_byte_lengths
from hf_objectives.losses import shifted_columns
from hf_objectives.preparation import OrderedStream
from hf_objectives.trainers.causal_lm_config import PerplexityTrainingArguments
from hf_objectives.trainers.collation import OUR_COLLATORS, bound_ids, collator_for, evaluation_loader, settle_batches
from hf_objectives.trainers.context_parallel import (
    check_rows,
    collator_of_parts,
    columns_to_cut,
    refuse_uncuttable,
)
from hf_objectives.trainers.guards import ensure_stop_tokens, stop_if_not_finite
from hf_objectives.trainers.hf_compat import (
    StepWatch,
    TrainerHooks,
    copies_of_rows,
    count_shifted_labels,
    free_of_trainers,
    prepare_sharded,
    prepared_batch,
    reshard,
    router_loss,
    stop_ids,
    train_batch_size,
    watch_steps,
)
from hf_objectives.trainers.isolation import ModelProbes
from hf_objectives.trainers.long_rows import LongRows
from hf_objectives.trainers.metrics import SourceLosses, TokenMetrics, TrainedStops
from hf_objectives.trainers.refusals import refuse_callables, refuse_devices
from hf_objectives.trainers.stream_callback import OrderedStreamCallback
from hf_objectives.types import IGNORE_INDEX, check_one_of

logger = logging.getLogger(__name__)


class PerplexityTrainer(TrainerHooks, LongRows, Trainer):
    """`transformers.Trainer` for next-token objectives, with exact numbers.

    The loss of a step is the summed negative log-likelihood of its trained tokens, over all accumulation steps and ranks,
    divided by their number. `evaluate` gives `eval_loss`, `eval_perplexity`, `eval_bits_per_byte`, `eval_num_tokens` and
    `eval_stop_probability`, in all and per source where rows carry a `source`. They come from sums in float64 that count
    each row once, whatever the batch size, packing and number of processes. Logits are computed only where a token is
    predicted, and are never gathered. The loss of a mixture of experts has its auxiliary term as the model's own loss has it,
    if `output_router_logits` is on in the model's config; `aux_loss` in logs is that term without its weight, and neither
    `eval_loss` nor a perplexity has it. Everything else is the parent's, the signature too.

    Without a `data_collator`, and with a tokenizer as `processing_class`, rows are collated by
    `DataCollatorForAssistantOnlyLM`, and those of a packed dataset by `DataCollatorWithEosPacking` (see `collator_for`).

    Under context parallelism each process trains on its part of the same rows, and evaluates whole rows of its own.

    Raises:
        ConfigError: `compute_metrics`, `preprocess_logits_for_metrics` and `compute_loss_func`, which would never be called;
            `args` that are not `PerplexityTrainingArguments`; a model that is no causal language model; parallelism under
            which the loss would be another (`docs/compatibility.md`).
        TokenizerError: a tokenizer with tokens that the model has no embedding for.
    """

    args: PerplexityTrainingArguments
    model: Any
    _signature_columns: Any

    def __init__(self, model: Any = None, args: Any = None, data_collator: Any = None, **kwargs: Any) -> None:
        refuse_callables(kwargs)
        if args is None:
            args = PerplexityTrainingArguments("trainer_output")
        if not isinstance(args, PerplexityTrainingArguments):
            raise ConfigError(f"args is {type(args).__name__}; expected PerplexityTrainingArguments")
        tokenizer = kwargs.get("processing_class")
        self._chosen_collator = None
        if data_collator is None and tokenizer is not None:
            sets = kwargs.get("eval_dataset") if kwargs.get("train_dataset") is None else kwargs["train_dataset"]
            self._chosen_collator = data_collator = collator_for(sets, tokenizer)
        elif isinstance(data_collator, OUR_COLLATORS):
            data_collator = dataclasses.replace(data_collator, return_source=True)
            tokenizer = tokenizer or data_collator.tokenizer
        settle_batches(args, kwargs.get("train_dataset"))
        free_of_trainers(model)
        super().__init__(model, args, data_collator, **kwargs)
        refuse_devices(self.args)
        refuse_other_models(self.model, tokenizer, own_loss=True)
        bound_ids(self.data_collator, self.model)
        if self.get_cp_size() > 1:
            refuse_uncuttable(self.model, compiled=self._compiled)
            self.data_collator = collator_of_parts(self.data_collator, self.get_cp_size())
            self._chosen_collator = self._chosen_collator and self.data_collator
        self.tokenizer = tokenizer
        count_shifted_labels(self)  # the loss below always divides by their number
        self._byte_lengths = None if tokenizer is None else token_byte_lengths(tokenizer)
        self._stops = TrainedStops()
        self._probes = ModelProbes()
        self.token_metrics, self.source_losses = TokenMetrics(), SourceLosses()
        self.add_callback(_RunCallback(self))
        self._stream: OrderedStreamCallback | None = None
        if isinstance(self.train_dataset, OrderedStream):
            self._stream = OrderedStreamCallback(self.train_dataset)
            self.add_callback(self._stream)

    # -- training ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Make the parent's loader.

        An `OrderedStream` is told how many rows all ranks take together. It draws nothing from the run's random state, so
        that a resumed run draws what an uninterrupted one does.
        """
        if not isinstance(self.train_dataset, OrderedStream):
            return super().get_train_dataloader()
        self.train_dataset.batch_rows = train_batch_size(self) * world_size() // copies_of_rows()
        loader: Any = super().get_train_dataloader()
        # A DataLoader without a generator of its own draws from the run's when an iteration begins.
        loader.base_dataloader.generator = torch.Generator()
        return loader

    takes_parts = True

    def rows_to_cut(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What context parallelism cuts, see `columns_to_cut`."""
        return columns_to_cut(batch, self.get_cp_size())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train on a micro-batch as the parent does, and remember what turns end with; its rows are still whole here."""
        self._stops.add(shifted_columns(inputs)["shift_labels"])
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def rows_taken(self) -> int:
        """Rows of an `OrderedStream` that all ranks have taken, from its row 0."""
        return 0 if self._stream is None else self._stream.rows_taken

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss of one micro-batch as its share of the mean over the whole step; see the parent.

        Raises:
            ConfigError: `return_outputs`: there are no logits of all positions to return.
        """
        if return_outputs:
            raise ConfigError("logits are computed at trained positions only; call the model for its outputs")
        model_inputs, extra = split_extra_columns(inputs)
        columns = shifted_columns(extra)
        targets = columns["shift_labels"]
        places = predicting_places(targets)
        weights, sources = columns.get("shift_weights"), columns.get("shift_sources")
        result, output = next_token_outputs(
            model,
            model_inputs,
            targets,
            weights=None if weights is None else weights.flatten()[places],
            label_smoothing=self.args.label_smoothing_factor,
            z_loss=self.args.z_loss,
            full=self._compiled,
            implementation=self.args.head_implementation,
            places=places,
        )
        aux, weight = router_loss(self.accelerator.unwrap_model(model), output) or (None, 0.0)
        share = 1.0 if num_items_in_batch is None else 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        if aux is not None and self.get_cp_size() > 1:
            raise ConfigError(
                "under context parallelism the auxiliary loss of experts would be of parts of rows; set "
                "output_router_logits=False in the model's config, or cp_size to 1"
            )
        self.token_metrics.add(result.nll, targets != IGNORE_INDEX, model_inputs, extra.get("source_ids"), aux, share)
        if sources is not None:
            self.source_losses.add(result.token_nll, sources.flatten()[places], extra["source_names"])
        divisor = result.weight if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        divisor = divisor.to(result.loss.device)
        loss = result.loss / divisor.where(divisor > 0, 1)  # weights may sum to less than 1, or to nothing
        if num_items_in_batch is not None:
            # Gradients are averaged over ranks. The count is over all ranks, so the average is undone here.
            loss = loss * self.accelerator.num_processes
        # The balance of experts is a mean over a micro-batch, of which a step takes the mean over micro-batches and ranks.
        return loss if aux is None else loss + weight * aux.to(loss.device) * share

    def count_targets(self, batches: Sequence[Mapping[str, Any]]) -> float | None:
        """Sum the weights of the trained tokens of a step over all ranks; None where no row has weights."""
        if all("labels" in batch and "loss_weights" not in batch for batch in batches):
            return None
        total = 0.0
        for columns in map(shifted_columns, batches):
            trained = columns["shift_labels"] != IGNORE_INDEX
            weights = columns.get("shift_weights")
            total += float(trained.sum() if weights is None else weights[trained].sum())
        return sum_over_ranks([total])[0] / copies_of_rows()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the parent does; training logs add the metrics of tokens and of the sources of a mixture."""
        if "loss" in logs:
            logs.update(self.token_metrics.take() | self.source_losses.take())
            if self._stream is not None:
                logs.update(self._stream.stream.metrics(self._stream.rows_taken))
        super().log(logs, start_time)

    # -- stop tokens ---------------------------------------------------------------------------------------------

    def trained_stop_ids(self) -> list[int]:
        """Control tokens that trained turns ended with, on any rank."""
        return self._stops.ids(self.tokenizer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the parent does, with every trained stop token among the EOS ids of the generation config.

        Raises:
            StopTokenError: the model has no generation config.
        """
        stops = self.trained_stop_ids()
        inner = self.accelerator.unwrap_model(self.model)
        if stops:
            ensure_stop_tokens(inner, stops, self.tokenizer)
        super().save_model(output_dir, _internal_call)
        if stops and self.args.should_save and hasattr(inner, "peft_config"):
            # The folder of an adapter has no generation config, and that of the base model would not stop.
            inner.generation_config.save_pretrained(output_dir or self.args.output_dir)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Load this rank's share of the rows, no row twice; see the parent."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ConfigError("evaluation needs an eval_dataset")
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            check_one_of("eval_dataset", rows, self.eval_dataset if isinstance(self.eval_dataset, dict) else ())
            rows = self.eval_dataset[rows]  # type: ignore[index]
        if isinstance(rows, OrderedStream):
            raise ConfigError("evaluation needs rows that end; a mixture's are in its eval_dataset")
        chosen = self._chosen_collator is not None and self.data_collator is self._chosen_collator
        collate: Any = collator_for(rows, self.tokenizer) if chosen else self.data_collator
        if self.get_cp_size() > 1:
            collate = collator_of_parts(collate, self.get_cp_size())
        return evaluation_loader(rows, collate, self.args)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Count all batches of all ranks; the parent's `evaluate` calls this method."""
        model = self._evaluation_model()
        self.prove_isolation(model, getattr(dataloader, "collate_fn", None))
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        counts, rows = EvaluationCounts(), 0
        options: dict[str, Any] = {"byte_lengths": self._byte_lengths, "stop_ids": self._stop_ids()}
        for batch, is_own in self._in_step(dataloader):
            if self.get_cp_size() > 1:
                check_rows(batch)  # each rank evaluates whole rows, but accelerate has taken the mask from the model
            with self.compute_loss_context_manager():
                found = count_batch(model, prepared_batch(self, batch), **options, full_logits=self._compiled)
            if is_own:
                counts.add(found)
                rows += len(batch["input_ids"])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reshard(model)
        counts = counts.over_ranks()
        if not counts.total.num_tokens:
            raise NothingSupervisedError("no row of the evaluation data has a trained token")
        total_rows = int(sum_over_ranks([rows])[0])
        # No predictions are kept: the parent's `evaluate` reads only the metrics and the number of rows.
        return EvalLoopOutput(None, None, counts.metrics(metric_key_prefix), total_rows)  # type: ignore[arg-type]

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Refuse: the parent's would have no predictions.

        Raises:
            ConfigError: always; names `evaluate`.
        """
        raise ConfigError(
            "predict() would return the logits of all tokens, which are never computed; evaluate(test_dataset, "
            f"metric_key_prefix={metric_key_prefix!r}) gives loss and perplexity, and the model itself gives logits"
        )

    @property
    def _compiled(self) -> bool:
        # `args.torch_compile` is not enough: the config of accelerate can ask for it too.
        return self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _in_step(self, dataloader: DataLoader) -> Iterator[tuple[Any, bool]]:
        """Batches, each with whether it counts. A sharded model runs on all ranks or on none: a rank that has no more
        batches gives its last one again until the others have finished."""
        batches, last = iter(dataloader), None
        while True:
            batch = next(batches, None)
            if not (any_rank(batch is not None) if self._sharded else batch is not None):
                return
            if batch is None and last is None:
                raise ConfigError("fewer evaluation rows than processes; a sharded model needs one on each")
            yield (last, False) if batch is None else (batch, True)
            last = last if batch is None else batch

    def _evaluation_model(self) -> nn.Module:
        """The model to evaluate. It is not wrapped for data parallelism: the wrapper's forward synchronises
        buffers, and ranks with fewer batches would not take part."""
        half = not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval)
        if self._sharded and half:
            raise ConfigError(
                "bf16_full_eval and fp16_full_eval cast a whole model, not a sharded one; use bf16 or fp16"
            )
        if self._sharded:
            return prepare_sharded(self)
        if half:
            return self.model.to(self.args.device, torch.bfloat16 if self.args.bf16_full_eval else torch.float16)
        return self.model

    def prove_isolation(self, model: nn.Module, collator: Any = None) -> None:
        """Run the probes of the model that were not made yet, for the collator of training or another one."""
        if self.args.check_isolation:
            self._probes.run(model, self.data_collator if collator is None else collator)

    def _stop_ids(self) -> set[int]:
        generation = getattr(self.model, "generation_config", None)
        return {*self.trained_stop_ids(), *stop_ids(self.tokenizer), *stop_ids(generation)}


class _RunCallback(TrainerCallback, StepWatch):
    """What `PerplexityTrainer` does during a run: it probes isolation once the model is placed and wrapped, counts tokens on
    where a resumed run stopped, and stops all ranks before a step whose loss or gradient is not finite."""

    def __init__(self, trainer: PerplexityTrainer) -> None:
        self._trainer = trainer
        self._end_watch: Callable[[], None] = lambda: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = [log for log in state.log_history if "num_tokens_seen" in log]
        counted = (logs[-1]["num_supervised_tokens"], logs[-1]["num_tokens_seen"]) if logs else (0, 0)
        self._trainer.token_metrics.start(*counted)
        self._trainer.source_losses = SourceLosses()
        self._trainer.prove_isolation(self._trainer.model_wrapped)
        self._end_watch()  # a run before this one may have ended in an error
        if args.stop_on_non_finite:
            self._end_watch = watch_steps(self._trainer, self)

    def step_ends(self, batches: list[tuple[Mapping[str, Any], Tensor]], grad_norm: Any) -> None:
        trainer = self._trainer
        scaled = getattr(trainer.accelerator, "scaler", None) is not None
        stop_if_not_finite(
            [loss for _, loss in batches],
            None if scaled else grad_norm,
            [prepared_batch(trainer, batch) for batch, _ in batches],
            model=trainer.model_wrapped if trainer._sharded else trainer.model,
            tokenizer=trainer.tokenizer,
            step=trainer.state.global_step + 1,
            folder=Path(trainer.args.output_dir or "."),
        )

    def step_fails(self) -> None:
        self._end_watch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The count is kept in the log, so a checkpoint needs a log line of its own step.
        if control.should_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
