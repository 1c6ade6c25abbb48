"""Computing a batch again that the live monitor wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hf_objectives.diagnostics.batch_record import describe_examples, read_event, restored_random_state
from hf_objectives.errors import ConfigError, FileFormatError

WEIGHTS = "weights"


@dataclass
class Replay:
    """A batch that was computed again.

    Attributes:
        event: what was written about it.
        model: where the weights came from.
        exact: they are the weights of that very step.
        examples: those written, each with `replayed`, its loss now (mean nats per trained token; None without any), dropout
            off, as the monitor computed it.
        loss: mean nats per trained token of the whole step with dropout on and the step's own random numbers: what the
            trainer computed, where its loss is the plain cross-entropy (transformers' own Trainer divides by a token more a
            row, the first, which nothing predicts).
    """

    event: dict[str, Any]
    model: str
    exact: bool
    examples: list[dict[str, Any]]
    loss: float

    @property
    def largest_difference(self) -> float:
        """Of a replayed loss from the one written, in nats per token; losses that are not finite in both agree."""
        pairs = [(one["loss"], one["replayed"]) for one in self.examples if one["tokens"]]
        return max((abs(a - b) for a, b in pairs if a == a and b == b and abs(a) != math.inf), default=0.0)


def replay(folder: str | Path, model: str | Path | Any | None = None) -> Replay:
    """Compute the losses of a written batch again, in the precision of the run.

    Args:
        folder: `step_<n>_rank_<r>`, written by DiagnosticsCallback.
        model: a model, or the folder or Hub id of one; by default the weights written with the event, else the newest
            checkpoint of the run before that step, else the run's own model.

    Raises:
        FileFormatError: the folder holds no event, or a damaged one.
        ConfigError: no weights are known, or they cannot be read; or the monitor could tell no documents in the batch.
    """
    folder = Path(folder).resolve()  # its run is found above it
    event, batches, state = read_event(folder)
    if not event["examples"]:
        raise ConfigError(
            f"the monitor told no documents in the batch of {folder}: it has neither labels nor a mask of trained tokens, or "
            "its model is no causal language model; nothing to compute"
        )
    where, exact = (model, False) if model is not None else _weights(folder, event)
    loaded = _load(where, event) if isinstance(where, (str, Path)) else where
    training = loaded.training
    placed = [
        {key: value.to(loaded.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        for batch in batches
    ]
    try:
        loaded.eval()
        with _precision(event, loaded):
            now = [one for batch in placed for one in describe_examples(loaded, batch, None)]
        if len(now) != len(event["examples"]):
            raise FileFormatError(
                f"{folder} is damaged: {len(event['examples'])} documents are named, {len(now)} are there"
            )
        loaded.train()
        with restored_random_state(state), _precision(event, loaded):
            loss = _mean([one for batch in placed for one in describe_examples(loaded, batch, None, together=True)])
    finally:
        loaded.train(training)
    examples = [{**then, "replayed": again["loss"]} for then, again in zip(event["examples"], now, strict=True)]
    return Replay(event, str(where) if isinstance(where, (str, Path)) else type(loaded).__name__, exact, examples, loss)


def _mean(examples: Sequence[dict[str, Any]]) -> float:
    tokens = sum(one["tokens"] for one in examples)
    return sum(one["loss"] * one["tokens"] for one in examples if one["tokens"]) / tokens if tokens else math.nan


def _load(where: str | Path, event: dict[str, Any]) -> Any:
    """The model as the run had it: its dtype and its attention, which move a loss by more than rounding."""
    options = {"dtype": event["dtype"]} if event.get("dtype") else {}
    if event.get("attn_implementation") in ("eager", "sdpa"):  # others may not be at hand here
        options["attn_implementation"] = event["attn_implementation"]
    try:
        return AutoModelForCausalLM.from_pretrained(where, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the weights of {where} cannot be read ({error})") from error


def _precision(event: dict[str, Any], model: Any) -> AbstractContextManager[Any]:
    autocast = event.get("autocast")
    return torch.autocast(model.device.type, getattr(torch, autocast)) if autocast else nullcontext()


def _weights(folder: Path, event: dict[str, Any]) -> tuple[Path, bool]:
    if event["weights"]:
        return folder / WEIGHTS, True
    runs = [folder.parent.parent, *([Path(event["run"])] if event.get("run") else [])]
    for run in runs:
        numbered = [
            (int(number), path)
            for path in run.glob("checkpoint-*")
            if (number := path.name.removeprefix("checkpoint-")).isdigit() and int(number) < event["step"]
        ]
        if numbered:
            step, path = max(numbered)
            return path, step == event["step"] - 1
        if (run / "config.json").exists() or (run / "adapter_config.json").exists():
            return run, False
    raise ConfigError(
        f"no weights for {folder}: none were written with it (save_weights=True does), {runs[-1]} has no checkpoint before "
        f"step {event['step']} and no model; name one with --model"
    )
