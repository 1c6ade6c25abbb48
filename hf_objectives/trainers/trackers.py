"""Trackers that fail are left out, and the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def guard_trackers(trainer: Any) -> None:
    """Let a run outlast its trackers: one that raises, for want of a login or a network, is told and heard no more.

    Trackers are the callbacks of `transformers.integrations`, which `report_to` adds. Callbacks of others still raise.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            for event in _EVENTS:
                setattr(callback, event, _guarded(callback, getattr(callback, event)))


def log_samples(trainer: Any, name: str, samples: Sequence[Mapping[str, str]], step: int) -> None:
    """Log texts, by column, to the trackers that take texts: TensorBoard, trackio, Weights & Biases."""
    for callback in trainer.callback_handler.callbacks:
        _guarded(callback, _log)(callback, name, samples, step)


def _log(callback: Any, name: str, samples: Sequence[Mapping[str, str]], step: int) -> None:
    if (writer := getattr(callback, "tb_writer", None)) is not None:
        for i, sample in enumerate(samples):
            text = "\n\n".join(f"    {column}: {value}" for column, value in sample.items())
            writer.add_text(f"{name}_{i}", text, step)
    tracker = getattr(callback, "_trackio", None) or getattr(callback, "_wandb", None)
    if tracker is not None and callback._initialized:
        tracker.log({name: tracker.Table(dataframe=pd.DataFrame(samples)), "train/global_step": step})


def _guarded(callback: Any, heard: Callable[..., Any]) -> Callable[..., Any]:
    def listen(*args: Any, **kwargs: Any) -> Any:
        if getattr(callback, "_has_failed", False):
            return None
        try:
            return heard(*args, **kwargs)
        except Exception as error:
            callback._has_failed = True
            name = type(callback).__name__
            logger.warning("%s failed (%s: %s); the run goes on without it", name, type(error).__name__, error)
            return None

    return listen
