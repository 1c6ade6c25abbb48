"""Compute a batch again that the live monitor wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hf_objectives.diagnostics.batch_record import describe_examples, mean_loss, read_event, restored_random_state
from hf_objectives.errors import ConfigError, FileFormatError

WEIGHTS = "weights"


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
