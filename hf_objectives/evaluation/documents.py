"""The loss of each document of a batch, packed or not, with the document's source and row."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_objectives.evaluation.head import unwrapped
from hf_objectives.evaluation.logits import split_extra_columns, target_nll
from hf_objectives.losses import shifted_columns
from hf_objectives.types import IGNORE_INDEX

_TOKENS = 1024  # of the rows of one forward pass
_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")  # inputs of packed rows


@dataclass(frozen=True, slots=True)
class DocumentLoss:
    """The loss of one document.

    Attributes:
        batch_row, begin, end: the row of the batch, and the half-open range of places in it.
        ids, labels: int64 [tokens], without padding.
        tokens, nats: the number of trained tokens, and their summed negative log-likelihood.
        source, row: name of the source and number of the row in it; None where the batch does not name them.
    """

    batch_row: int
    begin: int
    end: int
    ids: Tensor
    labels: Tensor
    tokens: int
    nats: float
    source: str | None
    row: int | None


@torch.no_grad()
def document_losses(model: nn.Module, batch: Mapping[str, Any], *, together: bool = False) -> list[DocumentLoss]:
    """Compute the loss of each document of a batch.

    Args:
        model: a causal language model, with or without a wrapper for data parallelism.
        batch: `input_ids` and `labels` (int64 [batch, length], unshifted), the model's other inputs, and `source_ids` and
            `row_ids` (int64 [batch, length] or one per row) with `source_names` where the collator gives them.
        together: run all rows in one forward pass, whatever memory that takes, as in training. Needed where dropout must
            draw the same numbers, or where each rank must run the same number of passes.
    """
    inputs, extra = split_extra_columns(batch)
    ids, labels = inputs["input_ids"], extra["labels"]
    # Sources may be one a row here, which cannot be shifted.
    targets = shifted_columns({name: extra[name] for name in ("labels", "shift_labels") if name in extra})[
        "shift_labels"
    ]
    trained = targets != IGNORE_INDEX
    nll = _nll(model, inputs, targets, together)
    mask = inputs.get("attention_mask")
    kept = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    return [
        DocumentLoss(
            i,
            begin,
            end,
            ids[i, begin:end][kept[i, begin:end]],
            labels[i, begin:end][kept[i, begin:end]],
            int(trained[i, begin:end].sum()),
            float(nll[i, begin:end].sum()),
            *_origin(extra, i, begin),
        )
        for i in range(ids.shape[0])
        for begin, end in itertools.pairwise([*_starts(inputs, i), ids.shape[1]])
        if bool(kept[i, begin:end].any())
    ]


def _nll(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, together: bool) -> Tensor:
    """Nats of each target, float64 [batch, length], 0 where nothing is trained."""
    ids = inputs["input_ids"]
    nll = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for rows, part in _parts(_accepted(model, inputs), ids, together):
        positions = targets[rows] != IGNORE_INDEX
        if together or bool(positions.any()):
            row_nll = nll[rows]
            row_nll[positions] = target_nll(model, part, targets[rows])
            nll[rows] = row_nll
    return nll


def _parts(inputs: Mapping[str, Any], ids: Tensor, together: bool) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """A few rows at a time: the logits of a training batch in float32 may need more memory than its step."""
    # Only what has the shape of rows can be cut into rows: not the places of documents in the batch, nor pictures.
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    together |= any(value.shape != ids.shape and value.shape != (1, ids.shape[1]) for value in tensors)
    size = ids.shape[0] if together else max(1, _TOKENS // ids.shape[1])
    for rows in torch.arange(ids.shape[0], device=ids.device).split(size):
        part = dict(inputs)
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1]:
                part[key] = value[rows]
        yield rows, part


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the model takes; collators add others for their trainers, such as reference log-probabilities."""
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    names = {*inspect.signature(inner.forward).parameters, *_ATTENTION}
    return {key: value for key, value in inputs.items() if key in names}


def _starts(inputs: Mapping[str, Any], i: int) -> list[int]:
    """Where the documents of row `i` begin: at its first place, and at each later position 0."""
    places, bounds = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
    if places is None and isinstance(bounds, Tensor):  # bounds count over all rows, end to end
        length = inputs["input_ids"].shape[1]
        return sorted({0, *(bound - i * length for bound in bounds.tolist() if 0 < bound - i * length < length)})
    if not isinstance(places, Tensor) or places.dim() != 2:
        return [0]  # position ids of three dimensions are places in pictures
    row = places[i if places.shape[0] > 1 else 0]
    return sorted({0, *row.eq(0).nonzero().flatten().tolist()})


def _origin(extra: Mapping[str, Any], i: int, begin: int) -> tuple[str | None, int | None]:
    """Source and row of the document that begins there. -1 is a document without one."""

    def number(name: str) -> int:
        if name not in extra:
            return -1
        values = extra[name]  # of each token, or of each row; the two answers of a pair share one
        return int(values[i, begin] if values.dim() == 2 else values[i % len(values)])

    source, row = number("source_ids"), number("row_ids")
    return None if source < 0 else extra["source_names"][source], None if row < 0 else row
