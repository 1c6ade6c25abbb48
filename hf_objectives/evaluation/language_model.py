"""What alignment costs the language model: exact perplexity of texts and chats during a run, against its start."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback

from hf_objectives.collators import DataCollatorForAssistantOnlyLM
from hf_objectives.distributed import rank, world_size
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation.counts import EvaluationCounts
from hf_objectives.evaluation.perplexity import count_batch
from hf_objectives.labels import Ledger, token_byte_lengths
from hf_objectives.preparation import prepare_dataset

logger = logging.getLogger(__name__)
_START = "_perplexity_at_start"
Rows: TypeAlias = Dataset | Iterable[Mapping[str, Any]]


class LanguageModelEvaluation:
    """Named datasets, encoded once, and their perplexity under a model.

    Args:
        datasets: rows in any accepted format (texts, chats, prompts with completions), or a mapping of names to rows.
            Rows without a name get the name "lm".
        tokenizer: a fast transformers tokenizer.
        max_length: longer rows are cut there. A turn that the cut goes through is not counted.
        batch_size: rows of a batch, on each process.

    Raises:
        ConfigError: a stream, or a mapping without a dataset.
        DataError: a row that cannot be used; names the dataset and the row.
        NothingSupervisedError: a dataset without a token to predict.
    """

    def __init__(
        self, datasets: Rows | Mapping[str, Rows], tokenizer: Any, *, max_length: int | None, batch_size: int
    ) -> None:
        named = datasets if isinstance(datasets, Mapping) else {"lm": datasets}
        if not named:
            raise ConfigError("eval_lm_datasets has no dataset; expected a dataset, or a mapping of names to datasets")
        self._rows = {name: _encoded(rows, name, tokenizer, max_length) for name, rows in named.items()}
        self._collate = DataCollatorForAssistantOnlyLM(tokenizer, allow_empty=True, train_on="all")
        self._byte_lengths = token_byte_lengths(tokenizer)
        self._batch_size = batch_size
        #: Perplexity of each dataset under the model that training started from; set by the first measurement.
        self.start: dict[str, float] = {}

    @torch.no_grad()
    def measure(self, model: Any, *, prefix: str = "eval", sharded: bool = False) -> dict[str, float]:
        """Measure every dataset over all ranks, each row once.

        Args:
            model: the model; under FSDP or DeepSpeed the wrapped one.
            prefix: beginning of the keys.
            sharded: whether a forward pass needs all ranks (FSDP, DeepSpeed).

        Returns:
            `<prefix>_<name>_perplexity`, `_bits_per_byte`, `_num_tokens`, `_perplexity_at_start` and
            `_perplexity_increase` (0.05: five per cent over the start) of each dataset.
        """
        was_training = model.training
        model.eval()
        figures: dict[str, float] = {}
        try:
            for name, rows in self._rows.items():
                total = self._count(model, rows, sharded).over_ranks().total
                start = self.start.setdefault(name, total.perplexity)
                figures |= {
                    f"{prefix}_{name}_perplexity": total.perplexity,
                    f"{prefix}_{name}_bits_per_byte": total.bits_per_byte,
                    f"{prefix}_{name}_num_tokens": total.num_tokens,
                    f"{prefix}_{name}{_START}": start,
                    f"{prefix}_{name}_perplexity_increase": total.perplexity / start - 1,
                }
        finally:
            model.train(was_training)
        return figures

    def recall(self, log_history: Iterable[Mapping[str, Any]]) -> None:
        """Read the start of a resumed run from its log."""
        for entry in log_history:
            for key, value in entry.items():
                # One name may end with another: the longest is meant.
                names = [name for name in self._rows if key.endswith(f"_{name}{_START}")]
                if names:
                    self.start[max(names, key=len)] = value

    def worst(self, figures: Mapping[str, float], *, prefix: str = "eval") -> tuple[str, float]:
        """Find the dataset whose perplexity rose most in the result of `measure`. NaN counts as the largest increase."""
        increases = {name: figures[f"{prefix}_{name}_perplexity_increase"] for name in self._rows}
        name = max(increases, key=lambda name: math.inf if math.isnan(increases[name]) else increases[name])
        return name, increases[name]

    def _count(self, model: Any, rows: Dataset, sharded: bool) -> EvaluationCounts:
        counts = EvaluationCounts()
        device = next(model.parameters()).device
        size, world = self._batch_size, world_size()
        own = range(rank(), len(rows), world)
        for i in range(math.ceil(math.ceil(len(rows) / world) / size)):  # batches of the rank with most rows
            picked = own[i * size : (i + 1) * size]
            if not picked and not sharded:
                break
            batch = self._collate([rows[j] for j in picked or range(1)])
            batch = {key: value.to(device) for key, value in batch.items()}
            counted = count_batch(model, batch, byte_lengths=self._byte_lengths)
            if picked:
                counts.add(counted)
        return counts


def _encoded(rows: Rows, name: str, tokenizer: Any, max_length: int | None) -> Dataset:
    if isinstance(rows, IterableDataset):
        raise ConfigError(f"eval_lm_datasets: {name!r} is a stream; expected a dataset or a list of rows")
    ledger = Ledger()
    encoded = prepare_dataset(
        rows, tokenizer, max_length=max_length, packing=False, overlength="cut", source=name, ledger=ledger
    )
    for source, account in ledger.to_dict().items():
        logger.info("perplexity of %s is over source %s: %s", name, source, account)
    return encoded


class EvaluatesLanguageModels:
    """A mixin for Trainers: `evaluate` also measures `eval_lm_datasets`, and too large an increase stops training.

    It stands before the Trainer among the bases. `__init__` calls `watch_language_models` at its end.
    """

    lm_evaluation: LanguageModelEvaluation | None = None
    _max_increase: float | None = None
    _evaluating = False

    def watch_language_models(
        self,
        datasets: Rows | Mapping[str, Rows] | None,
        tokenizer: Any,
        *,
        max_length: int | None,
        max_increase: float | None,
    ) -> None:
        """Encode the datasets, if any, and measure them from now on; rows longer than `max_length` tokens are cut.

        Raises:
            ConfigError: a bound without datasets, or a bound that is not positive.
        """
        if max_increase is not None and datasets is None:
            raise ConfigError("max_perplexity_increase needs eval_lm_datasets, whose perplexity it bounds")
        if max_increase is not None and max_increase <= 0:
            raise ConfigError(f"max_perplexity_increase is {max_increase}; expected more than 0 (0.1: ten per cent)")
        if datasets is None:
            return
        trainer: Any = self
        self.lm_evaluation = LanguageModelEvaluation(
            datasets, tokenizer, max_length=max_length, batch_size=trainer.args.per_device_eval_batch_size
        )
        self._max_increase = max_increase
        trainer.add_callback(_Start(self))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the parent does, and measure the language-model datasets once."""
        # With several evaluation sets the parent calls this method again for each.
        outer, self._evaluating = not self._evaluating, True
        dataset = kwargs.get("eval_dataset", args[0] if args else None)
        has_rows = dataset is not None or self.eval_dataset is not None  # type: ignore[attr-defined]
        metrics: dict[str, float] = {}
        try:
            if has_rows or self.lm_evaluation is None:
                metrics = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._evaluating = not outer
        if outer and self.lm_evaluation is not None:
            prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
            metrics.update(self.measure_language_models(prefix))
        return metrics

    def measure_language_models(self, prefix: str = "eval") -> dict[str, float]:
        """Measure and log the datasets. Stop training if the increase is over its bound."""
        trainer: Any = self
        assert self.lm_evaluation is not None
        sharded = bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        model = trainer.model_wrapped if sharded else trainer.model
        with trainer.compute_loss_context_manager():
            figures = self.lm_evaluation.measure(model, prefix=prefix, sharded=sharded)
        Trainer.log(trainer, dict(figures))  # TRL's own `log` would also write and clear the step's metrics
        name, increase = self.lm_evaluation.worst(figures, prefix=prefix)
        if self._max_increase is not None and not increase <= self._max_increase and trainer.is_in_train:
            trainer.control.should_training_stop = True
            logger.warning(
                "stopping at step %d: perplexity of %s is %.4g, %.1f %% over its start (%.4g), more than "
                "max_perplexity_increase=%.4g allows",
                *(trainer.state.global_step, name, figures[f"{prefix}_{name}_perplexity"]),
                *(100 * increase, self.lm_evaluation.start[name], self._max_increase),
            )
        return figures


class _Start(TrainerCallback):
    """Measures the model that training starts from, unless the log of a resumed run has the figures."""

    def __init__(self, trainer: EvaluatesLanguageModels) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        evaluation = self._trainer.lm_evaluation
        assert evaluation is not None
        evaluation.recall(state.log_history)
        if not evaluation.start:
            self._trainer.measure_language_models()
        elif not state.global_step:  # measured before training: a run that resumes this one reads it from the log
            figures = {f"eval_{name}{_START}": value for name, value in evaluation.start.items()}
            Trainer.log(self._trainer, figures)  # type: ignore[arg-type]
