"""Checks that trainers make unasked: losses that are not finite, and trained stop tokens that would not stop the model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_objectives.distributed import any_rank, rank, world_size
from hf_objectives.errors import ConfigError, NonFiniteError, StopTokenError
from hf_objectives.evaluation import document_losses
from hf_objectives.trainers.hf_compat import stop_ids

logger = logging.getLogger(__name__)
_TEXT_KEPT = 2_000  # characters of a row in the report


def stop_if_not_finite(
    losses: Sequence[Tensor],
    grad_norm: float | Tensor | None,
    batches: Sequence[Mapping[str, Any]],
    *,
    model: nn.Module,
    tokenizer: Any,
    step: int,
    folder: Path,
) -> None:
    """Raise on every rank if a loss or the gradient norm is not finite on any rank. Call it before the optimizer's step.

    Args:
        losses, batches: those of each micro-batch of the step on this rank.
        grad_norm: the norm of the step's gradient; None where an fp16 scaler handles overflow.
        model: finds the rows at fault; where it is sharded, the wrapped model.
        step: number of the step that is not taken.
        folder: gets the report of this rank, `non_finite_step_<step>_rank_<rank>.json`.

    Raises:
        NonFiniteError: names step, source, rows and the beginning of the text.
    """
    read = [*losses] if grad_norm is None else [*losses, torch.as_tensor(grad_norm)]
    whole = (value.full_tensor() if isinstance(value, DTensor) else value for value in read)
    # All at once: each reading of a device waits for it.
    values = torch.stack([value.detach().double().to(losses[0].device) for value in whole]).tolist()
    norm = None if grad_norm is None else values.pop()
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    norm_is_bad = norm is not None and not math.isfinite(norm)
    # The gradient is the mean over ranks, so a bad one is on every rank. A bad loss is on one rank only.
    if not any_rank(bool(bad) or norm_is_bad):
        return
    # A sharded model runs on all ranks or on none. Each rank has the same number of batches, and reads all of them.
    described = [_rows(model, batch, tokenizer) for batch in batches]
    rows = [row for i in (bad or range(len(batches))) for row in described[i]]
    rows = [row for row in rows if not math.isfinite(row["nats"])] or rows
    report = folder / f"non_finite_step_{step}_rank_{rank()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "rank": rank(), "losses": list(map(str, values)), "grad_norm": str(norm), "rows": rows}
    report.write_text(json.dumps(content, ensure_ascii=False, indent=1, default=str))
    named = "; ".join(f"source {row['source']!r}, row {row['row']}: {row['text'][:200]!r}" for row in rows[:3])
    raise NonFiniteError(
        f"step {step}: loss {', '.join(f'{value:.4g}' for value in values)}, gradient norm {norm}; stopped before the "
        f"weights changed. {'Rows' if bad else 'This rank, whose loss is finite, had rows'} {named}. Report: {report}"
    )


def _rows(model: nn.Module, batch: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """The trained documents of a batch, for the report."""
    return [
        {
            "source": document.source,
            "row": f"{document.batch_row} of the batch" if document.row is None else document.row,
            "nats": document.nats,
            "text": tokenizer.decode(document.ids.tolist())[:_TEXT_KEPT] if tokenizer is not None else "",
        }
        for document in document_losses(model, batch, together=True)
        if document.tokens
    ]


def check_stream(dataset: Any, workers: int, name: str) -> None:
    """Refuse a stream whose rows have no common numbers: read in parts, each part counts its rows from 0."""
    shards = getattr(dataset, "num_shards", 1) if isinstance(dataset, IterableDataset) else 1
    if shards > 1 and (workers > 1 or world_size() > 1):
        raise ConfigError(
            f"dataset {name!r} is a stream of {shards} shards for {world_size()} process(es) of {workers} loader worker(s), "
            "whose rows have no common numbers; use a mapped dataset, one shard, or one process without workers"
        )


def map_numbered(dataset: Any, encode: Callable[..., dict], name: str, args: Any, **options: Any) -> Any:
    """Map the rows of a dataset, each with its number, once a machine; `name` is "train" or that of an evaluation set."""
    if name != "train":
        check_stream(dataset, args.dataloader_num_workers, name)
    if isinstance(dataset, Dataset):  # a stream takes neither
        options |= {"num_proc": args.dataset_num_proc, "desc": f"Encoding {name} dataset"}
    with args.main_process_first(desc=f"encoding {name}"):
        return dataset.map(encode, with_indices=True, **options)


def ensure_stop_tokens(model: nn.Module, trained_stops: Sequence[int], tokenizer: Any) -> list[int]:
    """Put every trained stop token among the EOS ids of the model's generation config; returns those that were added."""
    if not trained_stops:
        return []
    config = getattr(model, "generation_config", None)
    names = [tokenizer.convert_ids_to_tokens(i) for i in trained_stops]
    if config is None:
        raise StopTokenError(
            f"turns were trained to end with {', '.join(map(repr, names))}, and the model has no generation config that "
            "could stop there; set model.generation_config"
        )
    listed = stop_ids(config)
    missing = [i for i in trained_stops if i not in listed]
    if missing:
        config.eos_token_id = listed + missing if listed or len(missing) > 1 else missing[0]
        added = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in missing)
        logger.warning("added %s to the generation config's EOS ids: turns were trained to end with it", added)
    return missing
