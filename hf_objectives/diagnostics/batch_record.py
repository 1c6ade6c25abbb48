"""What is written about a batch: the loss of each document, its text with the trained tokens marked, and the tensors."""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_objectives.errors import FileFormatError
from hf_objectives.evaluation import split_riders
from hf_objectives.losses import IGNORE, next_token_targets, token_nll
from hf_objectives.projection import selected_logits

EVENT, BATCHES, RANDOM = "event.json", "batches.pt", "random_state.pt"
_KEPT = 4_000  # characters of a document that are written
_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of packed rows, for flash attention
_MASKS = ("completion_mask", "assistant_masks", "loss_mask")


def with_labels(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The batch with `labels`, made from a mask of trained tokens where it has one instead; None where it has neither."""
    if "input_ids" not in batch or not isinstance(batch["input_ids"], Tensor) or batch["input_ids"].dim() != 2:
        return None
    if "labels" in batch:
        return dict(batch)
    for name in _MASKS:
        if name in batch and batch[name].shape == batch["input_ids"].shape:
            rest = {key: value for key, value in batch.items() if key not in _MASKS}
            return {**rest, "labels": batch["input_ids"].masked_fill(~batch[name].bool(), IGNORE)}
    return None


def marked_text(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """The text of a row with each run of trained tokens between ⟦ and ⟧."""
    if tokenizer is None:
        return ""
    pieces = []
    for trained, run in itertools.groupby(range(len(input_ids)), key=lambda i: labels[i] != IGNORE):
        text = tokenizer.decode([input_ids[i] for i in run])
        pieces.append(f"⟦{text}⟧" if trained else text)
    return "".join(pieces)


@torch.no_grad()
def describe_examples(model: nn.Module, batch: Mapping[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    """The documents of a batch, packed ones one by one.

    Args:
        batch: `input_ids` and `labels` (int64 [batch, length], unshifted), or a mask of trained tokens instead of labels;
            `source_ids`, `source_names` and `row_ids` where the collator gives them.

    Returns:
        A mapping for each: `batch_row`, `source` and `row` (None where unknown), `tokens` (trained ones), `loss` (mean nats
        per trained token), `text`. Empty where the batch tells neither labels nor a mask.
    """
    whole = with_labels(batch)
    if whole is None:
        return []
    inputs, riders = split_riders(whole)
    ids, labels = inputs["input_ids"], riders["labels"]
    targets = next_token_targets(labels)
    positions = targets != IGNORE
    nll = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    if bool(positions.any()):
        logits = selected_logits(model, _accepted(model, inputs), positions)
        nll[positions] = token_nll(logits, targets[positions]).double()
    described = []
    for i in range(ids.shape[0]):
        starts = inputs["position_ids"][i].eq(0).nonzero().flatten().tolist() if "position_ids" in inputs else []
        for begin, end in itertools.pairwise([*(starts or [0]), ids.shape[1]]):
            count = int(positions[i, begin:end].sum())
            if not count:
                continue
            kept = torch.ones(end - begin, dtype=torch.bool, device=ids.device)
            if "attention_mask" in inputs and inputs["attention_mask"].shape == ids.shape:
                kept = inputs["attention_mask"][i, begin:end].bool()
            text = marked_text(tokenizer, ids[i, begin:end][kept].tolist(), labels[i, begin:end][kept].tolist())
            described.append(
                {
                    "batch_row": i,
                    "source": _source(riders, i, begin),
                    "row": int(riders["row_ids"][i, begin]) if "row_ids" in riders else None,
                    "tokens": count,
                    "loss": float(nll[i, begin:end].sum()) / count,
                    "text": text[:_KEPT],
                }
            )
    return described


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model takes; collators add what only their trainer knows, such as a reference's figures."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = {*inspect.signature(inner.forward).parameters, *_ATTENTION}
    return {key: value for key, value in inputs.items() if key in names}


def _source(riders: Mapping[str, Any], i: int, begin: int) -> str | None:
    if "source_ids" not in riders or int(riders["source_ids"][i, begin]) < 0:
        return None
    return riders["source_names"][int(riders["source_ids"][i, begin])]


def random_state() -> dict[str, Any]:
    """The state of every random generator that a step may draw from."""
    name, keys, *rest = np.random.get_state()
    # As tensors and plain values, which torch reads without running code of the file.
    numpy_state = (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set what `random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_event(
    folder: Path, event: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> None:
    """Write an event: `event.json` for people, the tensors and random states for `replay`; `event.json` last, so that a
    folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = [
        {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}
        for batch in batches
    ]
    torch.save(on_cpu, folder / BATCHES)
    torch.save(dict(state), folder / RANDOM)
    (folder / EVENT).write_text(json.dumps(event, indent=1, ensure_ascii=False, default=str), encoding="utf-8")


def read_event(folder: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """What `write_event` wrote: the event, the micro-batches, the random states.

    Raises:
        FileFormatError: the folder holds no event, or not all of one.
    """
    folder = Path(folder)
    if not (folder / EVENT).is_file():
        raise FileFormatError(
            f"{folder} holds no {EVENT}; expected a folder that DiagnosticsCallback wrote (step_..._rank_...)"
        )
    try:
        event = json.loads((folder / EVENT).read_text(encoding="utf-8"))
        batches = torch.load(folder / BATCHES, weights_only=True)
        state = torch.load(folder / RANDOM, weights_only=True)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise FileFormatError(f"{folder} cannot be read ({error})") from error
    return event, batches, state
