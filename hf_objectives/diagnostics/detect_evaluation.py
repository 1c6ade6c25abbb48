"""What rows that are not trained show: overfitting, and a loss that is too good to be true."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_objectives.diagnostics.robust import Values, noise, trend
from hf_objectives.diagnostics.run_view import ENOUGH, LOW, RunView, Sign

_NAMES = {"eval_loss": "evaluation loss"}
_RISE = 0.02  # of the lowest evaluation loss: a smaller rise is none
_CLEAR = 0.1  # of it: a larger rise without a break needs no estimate of noise
_APART = 0.25  # of the evaluation loss


def rises(run: RunView) -> Iterator[Sign]:
    """The evaluation loss rises again while the training loss falls on."""
    for key in run.evaluations:
        steps, values = run[key]
        low = int(values.argmin()) if len(values) else 0
        if len(values) < low + 3 or not _rises_again(values, low):
            continue
        falls = _training_loss_after(run, int(steps[low]))
        if falls is None:
            continue  # no gap opens: the run stands, or goes wrong as a whole
        first, last = int(steps[low]), int(steps[-1])
        evidence = (
            f"{_NAMES.get(key, key)} {values[low]:.4g} at step {first:,}, {values[-1]:.4g} at step {last:,}{falls}"
        )
        yield Sign("error" if values[-1] > values[0] and low > 0 else "warning", first, last, evidence)


def _rises_again(values: Values, low: int) -> bool:
    """Whether the loss rises after its lowest value, beyond its noise."""
    since, later = values[low:], values[low + 1 :]
    around = values[max(0, low - 2) :]  # the fall before that is no noise
    deviation = noise(around, bends=True) if len(around) >= 5 else noise(values)
    rise = float(np.median(later[-max(2, len(later) // 3) :]) - values[low])
    clear = (np.diff(since) > 0).all() and values[-1] - values[low] > _CLEAR * abs(values[low])
    beyond = rise > max(4 * deviation, _RISE * abs(values[low])) and np.mean(later > values[low]) >= 0.9
    whole = trend(later) if len(later) >= 8 else None
    falls_again = whole is not None and whole.change < 0 and whole.p_falls < 0.05
    return bool((clear or beyond) and not falls_again)


def _training_loss_after(run: RunView, step: int) -> str | None:
    """The fall of the training loss after a step, in words; "" where it is unknown, None where the loss does not fall."""
    steps, values = run["loss"]
    before, after = values[steps <= step], values[steps > step]
    if len(before) < 3 or len(after) < 3:
        return ""
    there = float(np.median(before[-max(3, len(before) // 10) :]))
    end = float(np.median(after[-max(3, len(after) // 5) :]))
    return f", training loss {there:.4g} to {end:.4g} meanwhile" if end < there else None


def learned_by_heart(run: RunView) -> Iterator[Sign]:
    """Over several epochs the training loss falls far below an evaluation loss that stands still."""
    train, epochs = run["loss"], run["epoch"].values
    if run.is_policy or not len(epochs) or epochs.max() < 2:
        return
    for key in run.evaluations:
        steps, values = run[key]
        third = max(2, len(values) // 3)
        if len(values) < 6:
            continue
        first = int(steps[-third - 1])
        since = train.values[train.steps > first]
        # A loss that rises is reported with figures of its own.
        if len(since) < 6 or np.median(values[-third:]) > values.min() * (1 + _RISE):
            continue
        end = float(np.median(since[-max(3, len(since) // 3) :]))
        stands = values[:-third].min() - values[-third:].min() < _RISE * values.min()
        if stands and 0 < end < (1 - _APART) * values[-1]:  # a loss of exactly 0 is a NaN that was filtered
            evidence = (
                f"{_NAMES.get(key, key)} {values[-third - 1]:.4g} to {values[-1]:.4g} in the last {third} evaluations, "
                f"training loss {end:.4g} after {epochs.max():.1f} epochs"
            )
            yield Sign("warning", first, int(steps[-1]), evidence)


def too_good(run: RunView) -> Iterator[Sign]:
    """The perplexity is near 1 in the first epoch, or on rows that are not trained."""
    if not run.is_language_model:
        return
    for key in run.evaluations:
        steps, losses = run[key]
        if len(losses) and 0 < (low := float(losses.min())) < LOW:
            step = int(steps[int(losses.argmin())])
            evidence = (
                f"{_NAMES.get(key, key)} {low:.3g} nats per token at step {step:,} (a perplexity of {np.exp(low):.3f})"
            )
            yield Sign("warning", step, step, evidence)
            return
    steps, values = run["loss"]
    width = max(3, len(values) // 50)
    if len(values) < ENOUGH:
        return
    low_so_far = np.concatenate([[0], np.cumsum((values < LOW) & (values > 0))])
    places = np.flatnonzero(low_so_far[width:] - low_so_far[:-width] == width)
    epochs = run.epochs_at(steps)
    if not len(places) or epochs is None:
        return
    first, last = int(places[0]), int(places[0]) + width - 1
    if epochs[last] <= 1:
        level, step = float(np.median(values[first : last + 1])), int(steps[last])
        evidence = (
            f"training loss {level:.3g} nats per token at step {step:,}, after {epochs[last]:.2f} of the first epoch"
        )
        yield Sign("warning", step, step, evidence)
