"""Exact counts of batches, and the perplexity of texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from hf_objectives.errors import ConfigError, DataError, FormatError, NothingSupervisedError
from hf_objectives.evaluation.causality import probe_causality, refuse_other_models
from hf_objectives.evaluation.counts import EvaluationCounts, PerplexityResult, TokenCount
from hf_objectives.evaluation.head import unwrapped
from hf_objectives.evaluation.logits import split_extra_columns, target_nll
from hf_objectives.labels import token_byte_lengths
from hf_objectives.losses import shifted_columns
from hf_objectives.types import IGNORE_INDEX, check_max_length, ends_of_runs


@torch.no_grad()
def count_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    byte_lengths: NDArray[np.int64] | None = None,
    stop_ids: Iterable[int] = (),
    full_logits: bool = False,
) -> EvaluationCounts:
    """Count the nats, tokens and bytes of one batch.

    Args:
        model: a causal language model in evaluation mode.
        batch: `input_ids`, `labels` (int64 [batch, length], unshifted) or `shift_labels`, and the model's other inputs;
            `source_names` and `source_ids` name the source of each token.
        byte_lengths: int64 [vocabulary], bytes per token id; None counts no bytes.
        stop_ids: tokens that end a turn. Where a run of trained tokens ends with one, its probability is counted.
        full_logits: see `selected_logits`.

    Raises:
        DataError: a target that `byte_lengths` does not know.
    """
    inputs, extra = split_extra_columns(batch)
    columns = shifted_columns(batch)
    targets = columns["shift_labels"]
    positions = targets != IGNORE_INDEX
    nats = target_nll(model, inputs, targets, full=full_logits).cpu().numpy()
    ids = targets[positions].cpu().numpy()
    if byte_lengths is not None and (beyond := ids[ids >= len(byte_lengths)]).size:
        raise DataError(
            f"id {beyond[0]} is to be predicted, and the tokenizer has {len(byte_lengths)} tokens, so that bits per byte are "
            "not known; expected the tokenizer that made the rows, or none"
        )
    lengths = np.zeros(len(ids), np.int64) if byte_lengths is None else byte_lengths[ids]
    counts = EvaluationCounts(TokenCount(float(nats.sum()), len(ids), int(lengths.sum())))
    # A run ends where the next target is not trained. A stop token there is the end of a turn.
    stops = ends_of_runs(targets)[positions].cpu().numpy() & np.isin(ids, list(stop_ids))
    counts.stop_probability, counts.num_stops = float(np.exp(-nats[stops]).sum()), int(stops.sum())
    if "shift_sources" in columns:
        source_ids = columns["shift_sources"][positions].cpu().numpy()
        for i, name in enumerate(extra["source_names"]):
            own = source_ids == i
            if own.any():
                counts.sources[name] = TokenCount(float(nats[own].sum()), int(own.sum()), int(lengths[own].sum()))
    return counts


_READ = 1 << 20  # characters that are tokenised at a time
_BUFFERED = 1 << 20  # tokens of windows among which those of similar lengths are found


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of a document: its ids, int32, and the first position in it that is scored."""

    ids: NDArray[np.int32]
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
    """Compute the exact perplexity of texts: total nats over total tokens, whatever the batch size.

    The first token of a document is context only. A document longer than `max_length` is cut there. With a `stride`, a
    window moves over it instead: each token is scored once, with as much left context as the window holds.

    Texts are read as they are needed, so that memory does not grow with their number.

    Args:
        model: a causal language model; its device and dtype are kept, and its mode is restored.
        tokenizer: its tokenizer.
        texts_or_dataset: strings, or rows with a `text` column.
        max_length: tokens of a window; None for no limit.
        stride: tokens by which the window moves, less than `max_length`.
        batch_tokens: tokens of a batch with padding. Default: 512 on a CPU, where larger batches gain nothing, else 16,384.
        group_by: column that names the group of each row.

    Raises:
        ConfigError: `max_length` under 2; a stride without `max_length`, not below it, or not positive; a model that is no
            causal language model.
        FormatError: a row without `text` or without its group.
        NothingSupervisedError: no document has two tokens.
        TokenizerError: a tokenizer with tokens that the model has no embedding for.
    """
    check_max_length(max_length)
    if stride is not None and (max_length is None or not 0 < stride < max_length):
        raise ConfigError(f"stride is {stride}, max_length {max_length}; expected a stride of 1 to max_length - 1")
    refuse_other_models(unwrapped(model), tokenizer)
    probe_causality(model)
    device = next(model.parameters()).device
    lengths = token_byte_lengths(tokenizer)
    windows = (
        window
        for ids, group in _encoded(tokenizer, _documents(texts_or_dataset, group_by))
        for window in _windows(ids, group, max_length, stride)
    )
    budget = batch_tokens or (512 if device.type == "cpu" else 16_384)
    counts, was_training = EvaluationCounts(), model.training
    total = len(texts_or_dataset) if isinstance(texts_or_dataset, Sized) else None
    model.eval()
    try:
        # A bar after five seconds, on terminals alone.
        with tqdm(total=total, desc="Perplexity", unit="text", delay=5, disable=None) as bar:
            for batch in _batches(windows, budget):
                counts.add(count_batch(model, _tensors(batch, device), byte_lengths=lengths))
                bar.update(sum(window.scored == 1 for window in batch))
    finally:
        model.train(was_training)
    if not counts.total.num_tokens:
        raise NothingSupervisedError("no document has two tokens; there is nothing to predict")
    return PerplexityResult.of(counts.total, counts.sources)


def _documents(texts: Iterable[Any], group_by: str | None) -> Iterator[tuple[str, str | None]]:
    if isinstance(texts, str):
        raise FormatError("found a single string; expected a list of texts or rows with a text column")
    for i, item in enumerate(texts):
        row = {"text": item} if isinstance(item, str) else item
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise FormatError(f"found {item!r:.80}; expected a string or a row with a text column", row=i)
        if group_by is not None and row.get(group_by) is None:
            raise FormatError(f"no column {group_by!r} to group by; columns {', '.join(row)}", row=i)
        yield row["text"], None if group_by is None else str(row[group_by])


def _encoded(
    tokenizer: Any, documents: Iterable[tuple[str, str | None]]
) -> Iterator[tuple[NDArray[np.int32], str | None]]:
    """The ids of each document and its group; many documents are tokenised together."""
    documents = iter(documents)
    while True:
        texts, groups, size = list[str](), [], 0
        for text, group in documents:
            texts.append(text)
            groups.append(group)
            size += len(text)
            if size >= _READ:
                break
        if not texts:
            return
        for ids, group in zip(tokenizer(texts)["input_ids"], groups, strict=True):
            yield np.asarray(ids, np.int32), group


def _windows(
    ids: NDArray[np.int32], group: str | None, max_length: int | None, stride: int | None
) -> Iterator[_Window]:
    size = len(ids) if max_length is None else max_length
    if len(ids) < 2:
        return
    yield _Window(ids[:size], 1, group)
    end = size
    while stride is not None and end < len(ids):
        begin = min(end + stride, len(ids)) - size
        yield _Window(ids[begin : begin + size], end - begin, group)
        end = begin + size


def _batches(windows: Iterable[_Window], budget: int) -> Iterator[list[_Window]]:
    """Batch windows of similar lengths together, so that there is little padding; of those that are in memory together."""
    for together in _buffered(windows):
        batch: list[_Window] = []
        for window in sorted(together, key=lambda window: -len(window.ids)):
            if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
                yield batch
                batch = []
            batch.append(window)
        yield batch


def _buffered(windows: Iterable[_Window]) -> Iterator[list[_Window]]:
    together, size = list[_Window](), 0
    for window in windows:
        together.append(window)
        size += len(window.ids)
        if size >= _BUFFERED:
            yield together
            together, size = [], 0
    if together:
        yield together


def _tensors(batch: list[_Window], device: torch.device) -> dict[str, Any]:
    """Windows, the longest first, as a batch for `count_batch`; their groups are its sources."""
    ids = torch.zeros(len(batch), len(batch[0].ids), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for i, window in enumerate(batch):
        ids[i, : len(window.ids)] = torch.from_numpy(window.ids)
        mask[i, : len(window.ids)] = 1
        labels[i, window.scored : len(window.ids)] = ids[i, window.scored : len(window.ids)]
    tensors = {"input_ids": ids, "labels": labels}
    if not mask.all():
        tensors["attention_mask"] = mask
    names = sorted({window.group for window in batch if window.group is not None})
    if names:
        numbers = torch.tensor([names.index(window.group or "") for window in batch])
        tensors["source_ids"] = numbers[:, None].expand_as(ids)
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "source_names": names}
