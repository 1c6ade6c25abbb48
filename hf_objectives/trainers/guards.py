"""What a trainer checks unasked: losses that are not finite, and stop tokens that would not stop the saved model."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor, nn

from hf_objectives.distributed import any_rank, rank, world_size
from hf_objectives.errors import ConfigError, NonFiniteError, StopTokenError
from hf_objectives.evaluation import selected_logits, split_extra_columns
from hf_objectives.losses import next_token_targets, token_nll
from hf_objectives.types import IGNORE_INDEX

logger = logging.getLogger(__name__)
_TEXT_KEPT = 2_000  # characters of a row that the report quotes


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
    """Raise on every rank if a loss or gradient norm is not finite on any; call before the optimizer's step.

    Args:
        losses: the loss of each micro-batch of the step on this rank.
        grad_norm: the norm of the step's gradient, None where an fp16 scaler handles overflow.
        batches: the micro-batches, for the report.
        model: for finding the rows at fault; where it is sharded, the wrapped one.
        tokenizer: decodes their text; None leaves it out.
        step: number of the step that is not taken.
        folder: where this rank's report `non_finite_step_<step>_rank_<rank>.json` goes.

    Raises:
        NonFiniteError: names step, source, rows and the beginning of the text.
    """
    values = [float(loss) for loss in losses]
    norm = None if grad_norm is None else float(grad_norm)
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    norm_is_bad = norm is not None and not math.isfinite(norm)
    # Gradients are averaged over ranks, so that a bad one is everybody's; a bad loss is its own rank's until told.
    if not any_rank(bool(bad) or norm_is_bad):
        return
    # A sharded model runs on all ranks or on none: each looks at all its batches, whose number is the same everywhere.
    described = [_rows(model, batch, tokenizer) for batch in batches]
    rows = [row for i in (bad or range(len(batches))) for row in described[i]]
    rows = [row for row in rows if not math.isfinite(row["nats"])] or rows
    report = folder / f"non_finite_step_{step}_rank_{rank()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    report.write_text(
        json.dumps(
            {"step": step, "rank": rank(), "losses": list(map(str, values)), "grad_norm": str(norm), "rows": rows},
            ensure_ascii=False,
            indent=1,
            default=str,
        )
    )
    named = "; ".join(f"source {row['source']!r}, row {row['row']}: {row['text'][:200]!r}" for row in rows[:3])
    raise NonFiniteError(
        f"step {step}: loss {', '.join(f'{value:.4g}' for value in values)}, gradient norm {norm}; stopped before the "
        f"weights changed. {'Rows' if bad else 'This rank, whose loss is finite, had rows'} {named}. Report: {report}"
    )


@torch.no_grad()
def _rows(model: nn.Module, batch: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """The documents of a batch with their summed loss: source, row number, nats, text."""
    inputs, riders = split_extra_columns(batch)
    labels, ids = riders["labels"], inputs["input_ids"]
    targets = next_token_targets(labels)
    positions = targets != IGNORE_INDEX
    nll = torch.zeros(ids.shape, device=ids.device)
    nll[positions] = token_nll(selected_logits(model, inputs, positions), targets[positions])
    starts = inputs["position_ids"].eq(0) if "position_ids" in inputs else _first_column(ids)
    described = []
    for i in range(ids.shape[0]):
        bounds = [*starts[i].nonzero().flatten().tolist(), ids.shape[1]]
        for begin, end in itertools.pairwise(bounds):
            if not bool(positions[i, begin:end].any()):
                continue
            kept = ids[i, begin:end]
            if "attention_mask" in inputs:
                kept = kept[inputs["attention_mask"][i, begin:end].bool()]
            source = row = None
            if "source_ids" in riders and int(riders["source_ids"][i, begin]) >= 0:
                source = riders["source_names"][int(riders["source_ids"][i, begin])]
            if "row_ids" in riders:
                row = int(riders["row_ids"][i, begin])
            described.append(
                {
                    "source": source,
                    "row": row if row is not None else f"{i} of the batch",
                    "nats": float(nll[i, begin:end].sum()),
                    "text": tokenizer.decode(kept.tolist())[:_TEXT_KEPT] if tokenizer is not None else "",
                }
            )
    return described


def _first_column(ids: Tensor) -> Tensor:
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    return starts


def check_stream(dataset: Any, workers: int, name: str) -> None:
    """Refuse a stream whose rows cannot be told apart: read in parts, each part counts its rows from 0.

    Raises:
        ConfigError: a stream of several shards for several ranks or loader workers.
    """
    shards = getattr(dataset, "num_shards", 1) if isinstance(dataset, IterableDataset) else 1
    if shards > 1 and (workers > 1 or world_size() > 1):
        raise ConfigError(
            f"dataset {name!r} is a stream of {shards} shards for {world_size()} process(es) of {workers} loader worker(s), "
            "whose rows have no common numbers; use a mapped dataset, one shard, or one process without workers"
        )


def ends_of_runs(labels: Tensor) -> Tensor:
    """Ids of the last token of each run of trained tokens; int64 [batch, length] labels to int64 [runs]."""
    trained = labels != IGNORE_INDEX
    following = torch.nn.functional.pad(trained[:, 1:], (0, 1))
    return labels[trained & ~following]


def ensure_stop_tokens(model: nn.Module, trained_stops: Sequence[int], tokenizer: Any) -> list[int]:
    """Put every stop token that was trained among the EOS ids of the model's generation config.

    Returns:
        The ids that were added.

    Raises:
        StopTokenError: the model has no generation config to put them in.
    """
    if not trained_stops:
        return []
    config = getattr(model, "generation_config", None)
    names = [tokenizer.convert_ids_to_tokens(i) for i in trained_stops]
    if config is None:
        raise StopTokenError(
            f"turns were trained to end with {', '.join(map(repr, names))}, and the model has no generation config that "
            "could stop there; set model.generation_config"
        )
    known = config.eos_token_id
    listed = [] if known is None else [known] if isinstance(known, int) else list(known)
    missing = [i for i in trained_stops if i not in listed]
    if missing:
        config.eos_token_id = listed + missing if listed or len(missing) > 1 else missing[0]
        added = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in missing)
        logger.warning("added %s to the generation config's EOS ids: turns were trained to end with it", added)
    return missing
