"""From batches to exact counts of nats, tokens and bytes, in all and per source, and the perplexity of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_objectives.distributed import gather_objects
from hf_objectives.errors import ConfigError, FormatError, NothingSupervisedError
from hf_objectives.evaluation.counts import PerplexityResult, TokenCount
from hf_objectives.evaluation.selected_logits import selected_logits
from hf_objectives.labels import token_byte_lengths
from hf_objectives.losses import next_token_targets, token_nll
from hf_objectives.types import IGNORE_INDEX

_CHUNK = 1024  # tokens whose logits are brought to float32 at a time
_RIDERS = ("labels", "loss_weights", "source_names", "source_ids", "row_ids")


@dataclass
class EvaluationCounts:
    """What evaluation adds up.

    Attributes:
        total: all predicted tokens.
        sources: the same per source, where batches carry one.
        stop_probability: sum of the probability of the stop token where a trained turn ends.
        num_stops: number of such places.
    """

    total: TokenCount = field(default_factory=TokenCount)
    sources: dict[str, TokenCount] = field(default_factory=dict)
    stop_probability: float = 0.0
    num_stops: int = 0

    def add(self, other: EvaluationCounts) -> None:
        """Add other counts to these."""
        self.total = self.total + other.total
        for name, count in other.sources.items():
            self.sources[name] = self.sources.get(name, TokenCount()) + count
        self.stop_probability += other.stop_probability
        self.num_stops += other.num_stops

    def over_ranks(self) -> EvaluationCounts:
        """The sum over all processes."""
        merged = EvaluationCounts()
        for counts in gather_objects(self):
            merged.add(counts)
        return merged

    def metrics(self, prefix: str) -> dict[str, float]:
        """Metrics under a Trainer's key prefix; sources are named only where there are several."""
        metrics = {
            f"{prefix}_loss": self.total.loss,
            f"{prefix}_perplexity": self.total.perplexity,
            f"{prefix}_bits_per_byte": self.total.bits_per_byte,
            f"{prefix}_num_tokens": self.total.num_tokens,
        }
        if self.num_stops:
            metrics[f"{prefix}_stop_probability"] = self.stop_probability / self.num_stops
        for name, count in sorted(self.sources.items()):
            metrics[f"{prefix}_{name}_loss"] = count.loss
            metrics[f"{prefix}_{name}_perplexity"] = count.perplexity
            metrics[f"{prefix}_{name}_bits_per_byte"] = count.bits_per_byte
            metrics[f"{prefix}_{name}_num_tokens"] = count.num_tokens
        return metrics


def split_extra_columns(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch as what the model takes, and what rides along for loss and evaluation."""
    return (
        {key: value for key, value in batch.items() if key not in _RIDERS},
        {key: value for key, value in batch.items() if key in _RIDERS},
    )


@torch.no_grad()
def count_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    byte_lengths: NDArray[np.int64] | None = None,
    stop_ids: Iterable[int] = (),
    full_logits: bool = False,
) -> EvaluationCounts:
    """Counts of one batch.

    Args:
        model: a causal language model in evaluation mode.
        batch: `input_ids`, `labels` (int64 [batch, length], unshifted) and what else the model takes; `source_names` and
            `source_ids` name the source of each token.
        byte_lengths: int64 [vocabulary], bytes per token id; None counts no bytes.
        stop_ids: tokens that end a turn; where a run of trained tokens ends with one, its probability is counted.
        full_logits: see `selected_logits`.
    """
    inputs, riders = split_extra_columns(batch)
    targets = next_token_targets(riders["labels"])
    positions = targets != IGNORE_INDEX
    logits = selected_logits(model, inputs, positions, full=full_logits)
    chosen = targets[positions]
    nll = torch.cat([token_nll(a, b) for a, b in zip(logits.split(_CHUNK), chosen.split(_CHUNK), strict=True)])
    nats = nll.double().cpu().numpy()
    ids = chosen.cpu().numpy()
    lengths = np.zeros(len(ids), np.int64) if byte_lengths is None else byte_lengths[ids]
    counts = EvaluationCounts(TokenCount(float(nats.sum()), len(ids), int(lengths.sum())))
    # A run ends where the next target is not trained; it is the end of a turn if a stop token is there.
    run_ends = positions & ~torch.nn.functional.pad(positions[:, 1:], (0, 1))
    stops = run_ends[positions].cpu().numpy() & np.isin(ids, list(stop_ids))
    counts.stop_probability, counts.num_stops = float(np.exp(-nats[stops]).sum()), int(stops.sum())
    if "source_ids" in riders:
        of = next_token_targets(riders["source_ids"])[positions].cpu().numpy()
        for i, name in enumerate(riders["source_names"]):
            mine = of == i
            if mine.any():
                counts.sources[name] = TokenCount(float(nats[mine].sum()), int(mine.sum()), int(lengths[mine].sum()))
    return counts


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of a document: its ids, and the first position in it that is scored."""

    ids: list[int]
    scored: int
    group: str | None


@torch.no_grad()
def compute_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts_or_dataset: Iterable[str] | Iterable[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int | None = None,
    group_by: str | None = None,
) -> PerplexityResult:
    """Exact perplexity: total nats over total tokens, whatever the batching.

    A document's tokens are those that the tokenizer gives it; the first is context only. Documents longer than
    `max_length` are cut there, or, with a `stride`, read through a window that moves by `stride`: each token is scored
    once, with as much context to its left as the window holds.

    Args:
        model: a causal language model; evaluated as it is (mode, device and dtype), in evaluation mode.
        tokenizer: its tokenizer.
        texts_or_dataset: strings, or rows with a `text` column.
        max_length: tokens of a window; None for no limit.
        stride: tokens that the window moves by, under `max_length`.
        batch_tokens: tokens of a batch, padding included; by default 512 on a CPU, where larger batches gain nothing,
            and 16,384 elsewhere.
        group_by: column of the rows that names their group.

    Raises:
        ConfigError: `max_length` under 2, or a stride without `max_length`, not under it, or not positive.
        FormatError: a row without `text`, or without the group's column.
        NothingSupervisedError: no document has two tokens.
    """
    _check_window(max_length, stride)
    device = next(model.parameters()).device
    budget = batch_tokens or (512 if device.type == "cpu" else 16_384)
    lengths = token_byte_lengths(tokenizer)
    documents = _documents(texts_or_dataset, group_by)
    windows = [
        window
        for text, group in documents
        for window in _windows(tokenizer(text)["input_ids"], group, max_length, stride)
    ]
    if not windows:
        raise NothingSupervisedError("no document has two tokens; there is nothing to predict")
    total = TokenCount()
    groups: dict[str, TokenCount] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(windows, budget):
            for window, count in zip(batch, _score(model, batch, lengths, device), strict=True):
                total = total + count
                if window.group is not None:
                    groups[window.group] = groups.get(window.group, TokenCount()) + count
    finally:
        model.train(was_training)
    return PerplexityResult.of(total, groups)


def _check_window(max_length: int | None, stride: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}; expected at least 2, a token and the one that it predicts")
    if stride is not None and (max_length is None or not 0 < stride < max_length):
        raise ConfigError(f"stride is {stride}, max_length {max_length}; expected a stride of 1 to max_length - 1")


def _documents(texts: Iterable[Any], group_by: str | None) -> Iterator[tuple[str, str | None]]:
    if isinstance(texts, str):
        raise FormatError("a single string; expected a list of texts or rows with a text column")
    for row, item in enumerate(texts):
        if isinstance(item, str):
            if group_by is not None:
                raise FormatError(f"group_by={group_by!r} needs rows with that column, found a string", row=row)
            yield item, None
        elif isinstance(item, Mapping) and isinstance(item.get("text"), str):
            if group_by is not None and item.get(group_by) is None:
                raise FormatError(f"no column {group_by!r} to group by; columns {', '.join(item)}", row=row)
            yield item["text"], None if group_by is None else str(item[group_by])
        else:
            raise FormatError(f"{item!r:.80}; expected a string or a row with a text column", row=row)


def _windows(ids: Sequence[int], group: str | None, max_length: int | None, stride: int | None) -> Iterator[_Window]:
    size = len(ids) if max_length is None else max_length
    if len(ids) < 2:
        return
    yield _Window(list(ids[:size]), 1, group)
    if stride is None:
        return
    end = size
    while end < len(ids):
        begin = min(end + stride, len(ids)) - size
        yield _Window(list(ids[begin : begin + size]), end - begin, group)
        end = begin + size


def _batches(windows: list[_Window], budget: int) -> Iterator[list[_Window]]:
    """Windows of similar lengths together, so that hardly anything is padding."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _score(
    model: nn.Module, batch: list[_Window], lengths: NDArray[np.int64], device: torch.device
) -> list[TokenCount]:
    width = len(batch[0].ids)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for i, window in enumerate(batch):
        ids[i, : len(window.ids)] = torch.tensor(window.ids)
        mask[i, : len(window.ids)] = 1
        labels[i, window.scored : len(window.ids)] = ids[i, window.scored : len(window.ids)]
    targets = next_token_targets(labels)
    positions = targets != IGNORE_INDEX
    inputs: dict[str, Tensor] = {"input_ids": ids.to(device)}
    if not mask.all():
        inputs["attention_mask"] = mask.to(device)
    logits = selected_logits(model, inputs, positions.to(device))
    chosen = targets[positions]
    parts = zip(logits.split(_CHUNK), chosen.to(device).split(_CHUNK), strict=True)
    nats = torch.cat([token_nll(a, b) for a, b in parts]).double().cpu().numpy()
    tokens = chosen.numpy()
    ends = np.cumsum([len(window.ids) - window.scored for window in batch])
    return [
        TokenCount(float(part.sum()), len(part), int(lengths[spelled].sum()))
        for part, spelled in zip(np.split(nats, ends[:-1]), np.split(tokens, ends[:-1]), strict=True)
    ]
