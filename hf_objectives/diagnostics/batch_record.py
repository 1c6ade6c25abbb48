"""What is written about a batch: the loss of each document, its text with the trained tokens marked, and the tensors."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_objectives.errors import FileFormatError
from hf_objectives.evaluation import selected_logits, split_extra_columns
from hf_objectives.inspection import MASKS, marked_runs
from hf_objectives.losses import next_token_targets, token_nll
from hf_objectives.types import IGNORE_INDEX

EVENT, BATCHES, RANDOM = "event.json", "batches.pt", "random_state.pt"
_KEYS = {"step", "kind", "loss", "level", "grad_norm", "weights", "examples"}
_FIGURES = {"loss", "level", "limit", "deviations", "grad_norm"}
_UNKNOWN = object()
_TOKENS = 1024  # whose logits are brought to float32 at a time
_KEPT = 4_000  # characters of a document that are written
_ATTENTION = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # of packed rows, for flash attention


def with_labels(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The batch with `labels`, made from a mask of trained tokens where it has one instead; None where it has neither."""
    if "input_ids" not in batch or not isinstance(batch["input_ids"], Tensor) or batch["input_ids"].dim() != 2:
        return None
    if "labels" in batch:
        return dict(batch)
    for name in MASKS:
        if name in batch and batch[name].shape == batch["input_ids"].shape:
            rest = {key: value for key, value in batch.items() if key not in MASKS}
            return {**rest, "labels": batch["input_ids"].masked_fill(~batch[name].bool(), IGNORE_INDEX)}
    return None


def marked_text(tokenizer: Any, input_ids: Sequence[int], labels: Sequence[int]) -> str:
    """The text of a row with each run of trained tokens between ⟦ and ⟧."""
    if tokenizer is None:
        return ""
    runs = marked_runs(tokenizer, input_ids, labels)
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in runs)


def excerpt(marked: str, characters: int) -> str:
    """A part of a marked text that shows where training begins, with a little of what stands before it."""
    before = min(characters // 4, 200)
    begin = max(0, marked.find("⟦") - before) if len(marked) > characters else 0
    return (
        ("…" if begin else "") + marked[begin : begin + characters] + ("…" if begin + characters < len(marked) else "")
    )


def describes(model: nn.Module) -> bool:
    """Whether the losses of single documents can be told: a causal language model whose tokens are those of the batch."""
    inner = _inner(model)
    config = getattr(model, "active_peft_config", None)
    return bool(
        hasattr(inner, "can_generate")
        and inner.can_generate()
        and not getattr(inner.config, "is_encoder_decoder", False)
        and not getattr(config, "is_prompt_learning", False)  # it puts tokens of its own before those of the batch
    )


@torch.no_grad()
def describe_examples(
    model: nn.Module, batch: Mapping[str, Any], tokenizer: Any, *, together: bool = False
) -> list[dict[str, Any]]:
    """The documents of a batch, packed ones one by one.

    Args:
        model: a causal language model (see `describes`).
        batch: `input_ids` and `labels` (int64 [batch, length], unshifted), or a mask of trained tokens instead of labels;
            `source_ids` and `row_ids` (int64 [batch, length], or one a row) with `source_names` where the collator gives
            them.
        together: all rows in one forward pass, as in training (dropout draws otherwise), whatever memory that takes.

    Returns:
        A mapping for each: `batch_row`, `source` and `row` (None where unknown), `tokens` (trained ones), `loss` (mean nats
        per trained token; None where no token is trained), `text`. Empty where the batch tells neither labels nor a mask, or
        the labels are not those of tokens.
    """
    whole = with_labels(batch)
    if whole is None or getattr(whole["labels"], "shape", None) != whole["input_ids"].shape:
        return []
    inputs, riders = split_extra_columns(whole)
    ids, labels = inputs["input_ids"], riders["labels"]
    positions = next_token_targets(labels) != IGNORE_INDEX
    nll = _losses(model, inputs, labels, together)
    described = []
    for i in range(ids.shape[0]):
        for begin, end in itertools.pairwise([*_starts(inputs, i), ids.shape[1]]):
            kept = torch.ones(end - begin, dtype=torch.bool, device=ids.device)
            if "attention_mask" in inputs and inputs["attention_mask"].shape == ids.shape:
                kept = inputs["attention_mask"][i, begin:end].bool()
            if not bool(kept.any()):
                continue
            count = int(positions[i, begin:end].sum())
            text = marked_text(tokenizer, ids[i, begin:end][kept].tolist(), labels[i, begin:end][kept].tolist())
            described.append(
                {
                    "batch_row": i,
                    "source": _source(riders, i, begin),
                    "row": _row(riders, i, begin),
                    "tokens": count,
                    "loss": float(nll[i, begin:end].sum()) / count if count else None,
                    "text": excerpt(text, _KEPT),
                }
            )
    return described


def _losses(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, together: bool) -> Tensor:
    """Nats of each target, float64 [batch, length], 0 where none is trained. A few rows at a time, as evaluation does it: all
    logits of a training batch in float32 may need more memory than its step."""
    ids = inputs["input_ids"]
    targets = next_token_targets(labels)
    nll = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    accepted = _accepted(model, inputs)
    # Packed rows for flash attention name their documents by places in the whole batch.
    # So do pictures, and places of three dimensions: only what has a row's shape can be cut into rows.
    tensors = [value for value in accepted.values() if isinstance(value, Tensor) and value.dim()]
    together |= any(value.shape != ids.shape and value.shape != (1, ids.shape[1]) for value in tensors)
    at_once = ids.shape[0] if together else max(1, _TOKENS // ids.shape[1])
    for rows in torch.arange(ids.shape[0], device=ids.device).split(at_once):
        positions = targets[rows] != IGNORE_INDEX
        if not bool(positions.any()):
            continue
        part = {
            key: value[rows] if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1] else value
            for key, value in accepted.items()
        }
        logits, chosen = selected_logits(model, part, positions), targets[rows][positions]
        losses = [token_nll(a, b) for a, b in zip(logits.split(_TOKENS), chosen.split(_TOKENS), strict=True)]
        of_rows = nll[rows]
        of_rows[positions] = torch.cat(losses).double()
        nll[rows] = of_rows
    return nll


def _starts(inputs: Mapping[str, Any], i: int) -> list[int]:
    """Where the documents of a row begin: at its first token, and at every position 0 after it."""
    places, bounds = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
    if places is None and isinstance(bounds, Tensor):  # of all rows, end to end
        length = inputs["input_ids"].shape[1]
        return sorted({0, *(at - i * length for at in bounds.tolist() if 0 < at - i * length < length)})
    if not isinstance(places, Tensor) or places.dim() != 2:
        return [0]  # three dimensions are places in pictures, which pack no documents
    row = places[i if places.shape[0] > 1 else 0]
    return sorted({0, *row.eq(0).nonzero().flatten().tolist()})


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model takes; collators add what only their trainer knows, such as a reference's figures."""
    names = {*inspect.signature(_inner(model).forward).parameters, *_ATTENTION, "seq_idx"}
    return {key: value for key, value in inputs.items() if key in names}


def _rider(values: Tensor, i: int, begin: int) -> int:
    """A number of a document: of its first token, or of its row; of a pair's, which the rows of its two answers share."""
    return int(values[i, begin] if values.dim() == 2 else values[i % len(values)])


def _row(riders: Mapping[str, Any], i: int, begin: int) -> int | None:
    number = _rider(riders["row_ids"], i, begin) if "row_ids" in riders else -1
    return number if number >= 0 else None  # -1: collators give it to rows without a number


def _source(riders: Mapping[str, Any], i: int, begin: int) -> str | None:
    if "source_ids" not in riders or (number := _rider(riders["source_ids"], i, begin)) < 0:
        return None
    return riders["source_names"][number]


def random_state() -> dict[str, Any]:
    """The state of every random generator that a step may draw from."""
    name, keys, *rest = np.random.get_state()
    # As tensors and plain values, which torch reads without running code of the file.
    numpy_state = (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


@contextlib.contextmanager
def restored_random_state(state: Mapping[str, Any]) -> Iterator[None]:
    """Within it the random generators go on from what `random_state` returned; after it they are as they were."""
    before = random_state()
    _set_random_state(state)
    try:
        yield
    finally:
        _set_random_state(before)


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def write_event(
    folder: Path, event: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], state: Mapping[str, Any]
) -> None:
    """Write an event: `event.json` for people, the tensors and random states for `replay`; `event.json` last, so that a
    folder with one is whole.

    What of a batch is neither a tensor nor made of numbers and texts is left out, and named under `left_out`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVENT).unlink(missing_ok=True)  # of a run before it in the same folder
    left_out: set[str] = set()
    kept = []
    for batch in batches:
        plain = {str(key): _plain(value) for key, value in batch.items()}
        left_out |= {key for key, value in plain.items() if value is _UNKNOWN}
        kept.append({key: value for key, value in plain.items() if value is not _UNKNOWN})
    torch.save(kept, folder / BATCHES)
    torch.save(dict(state), folder / RANDOM)
    whole = {**event, **({"left_out": sorted(left_out)} if left_out else {})}
    (folder / EVENT).write_text(to_json(whole, indent=1), encoding="utf-8")


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinities, which it has no number for, as the texts "nan" and "inf"."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """The value as torch reads it without running code of a file; `_UNKNOWN` where it is nothing of the kind."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would be saved with all that it is a part of
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, (list, tuple)):
        parts = [_plain(one) for one in value]
        return _UNKNOWN if any(one is _UNKNOWN for one in parts) else parts
    return value if value is None or type(value) in (str, int, float, bool) else _UNKNOWN


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
    except (OSError, EOFError, ValueError, RuntimeError, RecursionError) as error:
        raise FileFormatError(f"{folder} cannot be read ({error})") from error
    except pickle.UnpicklingError:  # its text explains how to run a file's code
        raise FileFormatError(
            f"{folder}: {BATCHES} or {RANDOM} is damaged, or was not written by write_event"
        ) from None
    missing = _KEYS - (event.keys() if isinstance(event, dict) else set())
    if missing:
        raise FileFormatError(f"{folder / EVENT} has no {', '.join(sorted(missing))}; it is no event, or damaged")
    for entry in (event, *event["examples"]):
        entry.update({key: float(entry[key]) for key in _FIGURES & entry.keys() if entry[key] is not None})
    return event, batches, state
