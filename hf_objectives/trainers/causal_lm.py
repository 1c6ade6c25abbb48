"""A Trainer of language models whose loss and evaluation are exact sums over predicted tokens."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.distributed import any_rank, rank, sum_over_ranks, world_size
from hf_objectives.errors import ConfigError, NothingSupervisedError
from hf_objectives.evaluation import EvaluationCounts, count_batch, selected_logits, split_extra_columns
from hf_objectives.labels import token_byte_lengths
from hf_objectives.losses import next_token_loss, next_token_targets
from hf_objectives.preparation import OrderedStream
from hf_objectives.trainers.causal_lm_config import PerplexityTrainingArguments
from hf_objectives.trainers.guards import ends_of_runs, ensure_stop_tokens, stop_if_not_finite
from hf_objectives.trainers.isolation import probe_isolation
from hf_objectives.trainers.stream_callback import OrderedStreamCallback
from hf_objectives.trainers.tally import Tally
from hf_objectives.types import IGNORE_INDEX

logger = logging.getLogger(__name__)


class PerplexityTrainer(Trainer):
    """`transformers.Trainer` for next-token objectives, with exact numbers.

    The loss of a step is the summed negative log-likelihood of the supervised tokens of all accumulation steps and all
    ranks over their number. `evaluate` gives `eval_loss`, `eval_perplexity`, `eval_bits_per_byte`, `eval_num_tokens` and
    `eval_stop_probability` from sums in float64, each row counted once, whatever batch size, packing and number of
    processes; and the same per source where rows carry a `source`. Logits are computed at supervised positions only and
    never gathered. Everything else is the parent's, and so is the signature; `args` are `PerplexityTrainingArguments`.

    Without a `data_collator`, and with a tokenizer as `processing_class`, rows are collated by
    `DataCollatorForAssistantOnlyLM`.

    Raises:
        ConfigError: `compute_metrics`, which would need all logits, or arguments of another class.
    """

    args: PerplexityTrainingArguments
    model: Any

    def __init__(self, model: Any = None, args: Any = None, data_collator: Any = None, **kwargs: Any) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError(
                "compute_metrics needs the logits of all tokens, which are never gathered; see evaluate()"
            )
        if args is None:
            args = PerplexityTrainingArguments("trainer_output")
        if not isinstance(args, PerplexityTrainingArguments):
            raise ConfigError(f"args is {type(args).__name__}; expected PerplexityTrainingArguments")
        tokenizer = kwargs.get("processing_class")
        if data_collator is None and tokenizer is not None:
            data_collator = DataCollatorForAssistantOnlyLM(tokenizer)
        if isinstance(data_collator, (DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking)):
            data_collator = dataclasses.replace(data_collator, return_source=True)
            tokenizer = tokenizer or data_collator.tokenizer
        if isinstance(kwargs.get("train_dataset"), OrderedStream):
            settings: Any = args.accelerator_config
            if settings.split_batches:
                raise ConfigError("split_batches divides each batch of a stream among the ranks; leave it off")
            settings.dispatch_batches = False  # every rank reads, and keeps its own batches
            args.ignore_data_skip = True  # the stream goes on by itself, see OrderedStreamCallback
        super().__init__(model, args, data_collator, **kwargs)
        self.tokenizer = tokenizer
        # The parent counts `num_items_in_batch` only for models whose forward takes it; our loss always does.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._byte_lengths = None if tokenizer is None else token_byte_lengths(tokenizer)
        self._window: list[tuple[Mapping[str, Any], Tensor]] = []
        self._stops_seen: Tensor | None = None
        self._isolation_proved = False
        self._tally = Tally()
        self.add_callback(_Companion(self))
        self._stream: OrderedStreamCallback | None = None
        if isinstance(self.train_dataset, OrderedStream):
            self._stream = OrderedStreamCallback(self.train_dataset)
            self.add_callback(self._stream)

    # -- training ------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The parent's; an `OrderedStream` is told how many rows all ranks take together, and leaves the random state of
        the run alone, so that a resumed run draws what an uninterrupted one does."""
        if not isinstance(self.train_dataset, OrderedStream):
            return super().get_train_dataloader()
        self.train_dataset.batch_rows = self._train_batch_size * world_size()
        loader: Any = super().get_train_dataloader()
        # Where an iteration begins, a DataLoader without a generator of its own draws from the run's.
        loader.base_dataloader.generator = torch.Generator()
        return loader

    @property
    def rows_taken(self) -> int:
        """Rows of an `OrderedStream` that all ranks have taken, from its row 0."""
        return 0 if self._stream is None else self._stream.rows_taken

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, as its share of the whole step's mean; see the parent.

        Raises:
            ConfigError: `return_outputs`: there are no outputs of all positions to return.
        """
        if return_outputs:
            raise ConfigError("logits are computed at supervised positions only; call the model for its outputs")
        forward, riders = split_extra_columns(inputs)
        targets = next_token_targets(riders["labels"])
        positions = targets != IGNORE_INDEX
        logits = selected_logits(model, forward, positions, full=self._compiled)
        weights = riders.get("loss_weights")
        if weights is not None:
            weights = torch.nn.functional.pad(weights[:, 1:], (0, 1))[positions]
        result = next_token_loss(
            logits,
            targets[positions],
            weights=weights,
            label_smoothing=self.args.label_smoothing_factor,
            z_loss=self.args.z_loss,
        )
        self._tally.add(result.nll, positions, forward, riders.get("source_ids"))
        self._remember_stops(riders["labels"])
        if num_items_in_batch is None:
            return result.loss / result.weight.clamp(min=1)
        # Gradients are averaged over ranks; the count is of all ranks, so the average is undone here.
        loss = result.loss / torch.as_tensor(num_items_in_batch, device=result.loss.device).clamp(min=1)
        return loss * (self.accelerator.num_processes // self.get_tp_size())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """See the parent; keeps the batch until the step is taken, for the report of a loss that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.stop_on_non_finite:
            self._window.append((inputs, loss))
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        if not any("loss_weights" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        total = 0.0
        for batch in batch_samples:
            trained = batch["labels"][:, 1:] != IGNORE_INDEX
            weights = batch.get("loss_weights")
            total += float(trained.sum() if weights is None else weights[:, 1:][trained].sum())
        return torch.tensor(sum_over_ranks([total])[0], device=device)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The parent's; the last call before the optimizer's step, so non-finite values are caught here."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.args.stop_on_non_finite:
            scaled = getattr(self.accelerator, "scaler", None) is not None
            window, self._window = self._window, []
            stop_if_not_finite(
                [loss for _, loss in window],
                None if scaled else norm,
                [self._prepare_inputs(dict(batch)) for batch, _ in window],
                model=self.model_wrapped if self._sharded else self.model,
                tokenizer=self.tokenizer,
                step=self.state.global_step + 1,
                folder=Path(self.args.output_dir or "."),
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's logs; training logs add perplexity, tokens seen and supervised, tokens per second and padding, and
        what each source of a mixture has given."""
        if "loss" in logs:
            logs.update(self._tally.take())
            if self._stream is not None:
                logs.update(self._stream.stream.metrics(self._stream.rows_taken))
        super().log(logs, start_time)

    # -- stop tokens ---------------------------------------------------------------------------------------------

    def _remember_stops(self, labels: Tensor) -> None:
        ends = ends_of_runs(labels)
        if self._stops_seen is None:
            size = max(
                len(self.tokenizer or ()),
                int(self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size),
            )
            self._stops_seen = torch.zeros(size, dtype=torch.bool, device=labels.device)
        self._stops_seen[ends] = True

    def trained_stop_ids(self) -> list[int]:
        """Control tokens with which turns were trained to end, on any rank."""
        if self._stops_seen is None or self.tokenizer is None:
            return []
        seen = [bool(flag) for flag in sum_over_ranks(self._stops_seen.double().tolist())]
        control = set(self.tokenizer.added_tokens_decoder)
        return [i for i, flag in enumerate(seen) if flag and i in control]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's, after every stop token that was trained is among the generation config's EOS ids.

        Raises:
            StopTokenError: the model has no generation config.
        """
        stops = self.trained_stop_ids()
        inner = self.accelerator.unwrap_model(self.model)
        if stops:
            ensure_stop_tokens(inner, stops, self.tokenizer)
        super().save_model(output_dir, _internal_call)
        if stops and self.args.should_save and hasattr(inner, "peft_config"):
            # An adapter folder holds no generation config of its own, and the base's would not stop.
            inner.generation_config.save_pretrained(output_dir or self.args.output_dir)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every rank's own share of the rows, no row twice; see the parent."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ConfigError("evaluation needs an eval_dataset")
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index]
        if isinstance(dataset, OrderedStream):
            raise ConfigError("evaluation needs rows that end; a mixture's are in its eval_dataset")
        collate: Any = self.data_collator
        if isinstance(collate, (DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking)):
            collate = dataclasses.replace(collate, allow_empty=True)
        ours: Any
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            ours = _EveryNth(dataset)
        elif world_size() > 1:
            ours = Subset(dataset, range(rank(), len(dataset), world_size()))
        else:
            ours = dataset
        return DataLoader(
            ours,
            batch_size=self.args.eval_batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Counts over all batches and ranks; the parent's `evaluate` calls this.

        Raises:
            NothingSupervisedError: no row of the evaluation data trains a token.
        """
        model = self._evaluation_model()
        self.callback_handler.eval_dataloader = dataloader
        counts, rows = EvaluationCounts(), 0
        stop_ids = self._stop_ids()
        for batch in self._in_step(dataloader):
            if batch is None:  # other ranks have more batches, and a sharded model runs on all ranks or none
                continue
            prepared = self._prepare_inputs(dict(batch))
            with self.compute_loss_context_manager():
                counts.add(
                    count_batch(
                        model,
                        prepared,
                        byte_lengths=self._byte_lengths,
                        stop_ids=stop_ids,
                        full_logits=self._compiled,
                    )
                )
            rows += len(batch["input_ids"])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        counts = counts.over_ranks()
        if not counts.total.num_tokens:
            raise NothingSupervisedError("no row of the evaluation data has a supervised token")
        total_rows = int(sum_over_ranks([rows])[0])
        # No predictions are kept; the parent's evaluate reads metrics and the number of rows alone.
        return EvalLoopOutput(None, None, counts.metrics(metric_key_prefix), total_rows)  # type: ignore[arg-type]

    @property
    def _compiled(self) -> bool:
        # Not args.torch_compile: accelerate's config asks for it as well.
        return self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO

    @property
    def _sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _in_step(self, dataloader: DataLoader) -> Iterator[Any]:
        """Batches of this rank; under a sharded model, as many forwards on every rank."""
        if not self._sharded or world_size() == 1:
            yield from dataloader
            return
        batches, last = iter(dataloader), None
        while True:
            batch = next(batches, None)
            if not any_rank(batch is not None):
                return
            if batch is None:
                if last is None:
                    raise ConfigError("fewer evaluation rows than processes; a sharded model needs one on each")
                with torch.no_grad():
                    count_batch(self._evaluation_model(), self._prepare_inputs(dict(last)))
            else:
                last = batch
            yield batch

    def _evaluation_model(self) -> nn.Module:
        """The model in evaluation mode. Data-parallel wrappers are left aside: their forward synchronises buffers, which
        ranks with different numbers of batches would wait for in vain."""
        if self._sharded:
            if len(self.accelerator._models) == 0:
                self.model_wrapped = self.accelerator.prepare(self.model)
                if self.is_fsdp_enabled:
                    self.model = self.model_wrapped
            model = self.model_wrapped
        else:
            model = self.model
            if not self.is_in_train and (self.args.bf16_full_eval or self.args.fp16_full_eval):
                model = model.to(torch.bfloat16 if self.args.bf16_full_eval else torch.float16)
        if not self._isolation_proved:
            self.prove_isolation(model)
        model.eval()
        return model

    def prove_isolation(self, model: nn.Module) -> None:
        """Once, where rows are packed: see `probe_isolation`.

        Raises:
            PackingLeakError: packed documents see each other.
        """
        self._isolation_proved = True
        packs = isinstance(self.data_collator, DataCollatorWithEosPacking) and self.data_collator.isolate_documents
        if packs and self.args.check_isolation:
            report = probe_isolation(model)
            logger.info("packed documents are isolated under %s: %.2g", report.attention, report.change)

    def _stop_ids(self) -> set[int]:
        stops = set(self.trained_stop_ids())
        for holder in (self.tokenizer, getattr(self.model, "generation_config", None)):
            ids = getattr(holder, "eos_token_id", None)
            stops.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        return stops


class _Companion(TrainerCallback):
    """What has to happen at the parent's moments: the isolation probe once the model is placed and wrapped, and the
    count of tokens that a resumed run goes on with."""

    def __init__(self, trainer: PerplexityTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = [log for log in state.log_history if "num_tokens_seen" in log]
        counted = (logs[-1]["num_supervised_tokens"], logs[-1]["num_tokens_seen"]) if logs else (0, 0)
        self._trainer._tally.start(*counted)
        if not self._trainer._isolation_proved:
            self._trainer.prove_isolation(self._trainer.model_wrapped)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The count is kept in the log, so a checkpoint needs a line of its own step.
        if control.should_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


class _EveryNth(IterableDataset):
    """Every rank's rows of a stream: the n-th of every world_size rows."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._rank, self._world = rows, rank(), world_size()

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        shares = self._world * (worker.num_workers if worker else 1)
        mine = self._rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        return (row for i, row in enumerate(self._rows) if i % shares == mine)
