"""Computing a batch again that the live monitor wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_objectives.diagnostics.batch_record import describe_examples, read_event, restore_random_state
from hf_objectives.errors import ConfigError


@dataclass
class Replay:
    """A batch that was computed again.

    Attributes:
        event: what was written about it.
        model: where the weights came from.
        exact: they are the weights of that very step.
        examples: those written, each with `replayed`, its loss now (mean nats per trained token).
    """

    event: dict[str, Any]
    model: str
    exact: bool
    examples: list[dict[str, Any]]

    @property
    def largest_difference(self) -> float:
        """Of a replayed loss from the one written, in nats per token; losses that are not finite in both agree."""
        pairs = [(one["loss"], one["replayed"]) for one in self.examples]
        return max((abs(a - b) for a, b in pairs if a == a and b == b and abs(a) != float("inf")), default=0.0)


def replay(folder: str | Path, model: str | Path | Any | None = None) -> Replay:
    """Compute the losses of a written batch again.

    Args:
        folder: `step_<n>_rank_<r>`, written by DiagnosticsCallback.
        model: a model, or the folder or Hub id of one; by default the weights written with the event, else the newest
            checkpoint of the run before that step, else the run's own model.

    Raises:
        FileFormatError: the folder holds no event.
        ConfigError: no weights are known, or the batch holds no labels.
    """
    folder = Path(folder)
    event, batches, state = read_event(folder)
    if not event["examples"]:
        raise ConfigError(
            f"the batch of {folder} holds neither labels nor a mask of trained tokens; nothing to compute"
        )
    where, exact = (model, False) if model is not None else _weights(folder, event)
    loaded: Any = AutoModelForCausalLM.from_pretrained(where) if isinstance(where, (str, Path)) else where
    training = loaded.training
    loaded.eval()
    restore_random_state(state)
    now: list[dict[str, Any]] = []
    try:
        for batch in batches:
            placed = {k: v.to(loaded.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            now += describe_examples(loaded, placed, None)
    finally:
        loaded.train(training)
    examples = [{**then, "replayed": again["loss"]} for then, again in zip(event["examples"], now, strict=True)]
    return Replay(event, str(where) if isinstance(where, (str, Path)) else type(loaded).__name__, exact, examples)


def _weights(folder: Path, event: dict[str, Any]) -> tuple[Path, bool]:
    if event["weights"]:
        return folder / event["weights"], True
    run = folder.parent.parent
    numbered = [
        (int(number), path)
        for path in run.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit() and int(number) < event["step"]
    ]
    if numbered:
        step, path = max(numbered)
        return path, step == event["step"] - 1
    if (run / "config.json").exists():
        return run, False
    raise ConfigError(
        f"no weights for {folder}: none were written with it (save_weights=True does), {run} has no checkpoint before step "
        f"{event['step']} and no model; name one with --model"
    )
