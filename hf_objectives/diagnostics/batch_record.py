"""Write about a batch the loss of each document, its text with the trained tokens marked, and the tensors; and replay it."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.evaluation import document_losses
from hf_objectives.inspection import MASKS, marked_runs
from hf_objectives.types import IGNORE_INDEX

WEIGHTS = "weights"
EVENT, BATCHES, RANDOM = "event.json", "batches.pt", "random_state.pt"
_KEYS = {"step", "kind", "loss", "level", "grad_norm", "weights", "examples"}
_FIGURES = {"loss", "level", "limit", "deviations", "grad_norm"}
_UNKNOWN = object()
_KEPT = 4_000  # characters of a document that are written


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
    inner: Any = getattr(model, "get_base_model", lambda: model)()
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
    """The documents of a batch, packed ones one by one; none where the batch tells no labels of tokens.

    Args:
        model: a causal language model (see `describes`).
        batch: `input_ids` and `labels` (int64 [batch, length], unshifted), or a mask of trained tokens instead of labels;
            `source_ids` and `row_ids` (the same shape, or one a row) with `source_names` where the collator gives them.
        together: all rows in one forward pass, as in training (dropout draws otherwise), whatever memory that takes.

    Returns:
        A mapping for each: `batch_row`, `source` and `row` (None where unknown), `tokens` (trained ones), `loss` (mean nats
        per trained token; None where no token is trained), `text`.
    """
    whole = with_labels(batch)
    if whole is None or getattr(whole["labels"], "shape", None) != whole["input_ids"].shape:
        return []
    return [
        {
            "batch_row": document.batch_row,
            "source": document.source,
            "row": document.row,
            "tokens": document.tokens,
            "loss": document.nats / document.tokens if document.tokens else None,
            "text": excerpt(marked_text(tokenizer, document.ids.tolist(), document.labels.tolist()), _KEPT),
        }
        for document in document_losses(model, whole, together=together)
    ]


def mean_loss(examples: Sequence[Mapping[str, Any]]) -> float:
    """Nats per trained token over all examples; NaN where no token is trained."""
    trained = [example for example in examples if example["tokens"]]
    tokens = sum(example["tokens"] for example in trained)
    return sum(example["loss"] * example["tokens"] for example in trained) / tokens if tokens else math.nan


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
    plain = [{str(key): _plain(value) for key, value in batch.items()} for batch in batches]
    kept = [{key: value for key, value in batch.items() if value is not _UNKNOWN} for batch in plain]
    left_out = {key for batch in plain for key, value in batch.items() if value is _UNKNOWN}
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
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """The value as torch reads it without running code of a file; `_UNKNOWN` where it is nothing of the kind."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would be saved with all that it is a part of
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else parts
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


# -- replay ---------------------------------------------------------------------------------------------------------


@dataclass
class Replay:
    """A batch that was computed again."""

    event: dict[str, Any]  #: what was written about it
    model: str  #: where the weights came from
    exact: bool  #: whether they are the weights of that very step
    #: Those that were written, each with `replayed`: its loss now in nats per trained token, without dropout, as the monitor
    #: computed it (None without trained tokens).
    examples: list[dict[str, Any]]
    #: Nats per trained token of the whole step, with dropout and the step's own random numbers. The trainer computed the same
    #: where its loss is the plain cross-entropy. (transformers' own Trainer divides by one token more a row, the first.)
    loss: float

    @property
    def largest_difference(self) -> float:
        """Between a replayed loss and the one written, in nats per token. Losses that are not finite count as equal."""
        pairs = [(example["loss"], example["replayed"]) for example in self.examples if example["tokens"]]
        return max((abs(a - b) for a, b in pairs if math.isfinite(a) and not math.isnan(b)), default=0.0)


def replay(folder: str | Path, model: str | Path | Any | None = None) -> Replay:
    """Compute the losses of a written batch again, in the precision of the run. No code of a file is run.

    Args:
        folder: `step_<n>_rank_<r>`, written by DiagnosticsCallback.
        model: a model, or the folder or Hub id of one. By default the weights written with the event, else the newest
            checkpoint of the run before that step, else the run's own model.

    Raises:
        FileFormatError: the folder holds no event, or a damaged one.
        ConfigError: no weights are known, or they cannot be read, or the event names no documents.
    """
    folder = Path(folder).resolve()  # its run is found above it
    event, batches, state = read_event(folder)
    if not event["examples"]:
        raise ConfigError(
            f"{folder} names no documents: its batch has neither labels nor a mask of trained tokens, or its model is no "
            "causal language model; nothing to compute"
        )
    where, exact = (model, False) if model is not None else _weights(folder, event)
    loaded: Any = _load(where, event) if isinstance(where, (str, Path)) else where
    training = loaded.training

    def described(together: bool) -> list[dict[str, Any]]:
        precision = getattr(torch, event["autocast"]) if event.get("autocast") else None
        with torch.autocast(loaded.device.type, precision, enabled=precision is not None):
            return [
                example
                for batch in batches
                for example in describe_examples(loaded, send_to_device(batch, loaded.device), None, together=together)
            ]

    try:
        loaded.eval()
        now = described(together=False)
        if len(now) != len(event["examples"]):
            raise FileFormatError(
                f"{folder} is damaged: {len(event['examples'])} documents are named, {len(now)} are there"
            )
        loaded.train()
        with restored_random_state(state):
            loss = mean_loss(described(together=True))
    finally:
        loaded.train(training)
    examples = [{**then, "replayed": again["loss"]} for then, again in zip(event["examples"], now, strict=True)]
    return Replay(event, str(where) if loaded is not where else type(loaded).__name__, exact, examples, loss)


def _load(where: str | Path, event: dict[str, Any]) -> Any:
    """The model with the run's dtype and attention, which move a loss by more than rounding."""
    options = {"dtype": event["dtype"]} if event.get("dtype") else {}
    if event.get("attn_implementation") in ("eager", "sdpa"):  # others may not be installed here
        options["attn_implementation"] = event["attn_implementation"]
    try:
        return AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the weights of {where} cannot be read ({error})") from error


def _weights(folder: Path, event: dict[str, Any]) -> tuple[Path, bool]:
    """Where weights are for an event, and whether they are those of its step."""
    if event["weights"]:
        return folder / WEIGHTS, True
    runs = [folder.parent.parent, *([Path(event["run"])] if event.get("run") else [])]
    for run in runs:
        steps = [path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*")]
        before = [int(step) for step in steps if step.isdigit() and int(step) < event["step"]]
        if before:
            return run / f"checkpoint-{max(before)}", max(before) == event["step"] - 1
        if (run / "config.json").exists() or (run / "adapter_config.json").exists():
            return run, False
    raise ConfigError(
        f"no weights for {folder}: none were written with it (save_weights=True does), {runs[-1]} has no checkpoint before "
        f"step {event['step']} and no model; name one with --model"
    )
