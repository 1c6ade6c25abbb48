"""Signatures of what the model makes of rows it was not trained on: overfitting, and a loss too good to be true."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.detect_loss import ENOUGH, finite, of_language_model, of_policy
from hf_objectives.diagnostics.robust import noise, trend
from hf_objectives.inspection import Finding

_RISE = 0.02  # of the lowest evaluation loss: a smaller rise is none
_CLEAR = 0.1  # of it: a rise without a break that is larger needs no estimate of noise
_APART = 0.25  # of the evaluation loss
_LOW = 0.1  # nats per token: a perplexity of 1.1
_FIRST_PASS = 1.0  # epochs


def evaluation_losses(run: Curves) -> list[str]:
    """Names of the evaluation losses: eval_loss, and one for each evaluation set where there are several."""
    return [key for key in sorted(run.series) if key.startswith("eval_") and key.endswith("loss")]


def overfitting(run: Curves) -> Iterator[Finding]:
    """overfitting: the evaluation loss rises again while the training loss falls on."""
    for key in evaluation_losses(run):
        yield from _overfitting(run, key)


def _overfitting(run: Curves, key: str) -> Iterator[Finding]:
    steps, values = finite(run.get(key))
    train = finite(run.get("loss"))
    if len(values) < 3:
        return
    low = int(values.argmin())
    later = values[low + 1 :]
    yield from _gap(run, key, low)
    if len(later) < 2:
        return
    around = values[max(0, low - 2) :]  # the fall before it is no noise
    deviation = noise(around, bends=True) if len(around) >= 5 else noise(values)
    rise = float(np.median(later[-max(2, len(later) // 3) :]) - values[low])
    clear = (np.diff(values[low:]) > 0).all() and values[-1] - values[low] > _CLEAR * abs(values[low])
    if not clear and (rise <= max(4 * deviation, _RISE * abs(values[low])) or np.mean(later > values[low]) < 0.9):
        return
    whole = trend(later) if len(later) >= 8 else None
    if whole is not None and whole.change < 0 and whole.p_falls < 0.05:
        return  # one low value, and a fall from above it since
    before, after = (train.values[train.steps <= steps[low]], train.values[train.steps > steps[low]])
    falls = ""
    if len(before) >= 3 and len(after) >= 3:
        there, end = (
            float(np.median(before[-max(3, len(before) // 10) :])),
            float(np.median(after[-max(3, len(after) // 5) :])),
        )
        if end >= there:
            return  # no gap opens: the run stands, or goes wrong as a whole
        falls = f", training loss {there:.4g} to {end:.4g} meanwhile"
    yield Finding(
        "overfitting",
        int(steps[low]),
        "error" if values[-1] > values[0] and low > 0 else "warning",
        f"{_named(key)} {values[low]:.4g} at step {steps[low]:,}, {values[-1]:.4g} at step {steps[-1]:,}{falls}",
        f"Take the checkpoint of step {steps[low]:,} (load_best_model_at_end). More or more varied data, fewer epochs, a "
        "smaller learning rate, dropout or weight decay, a smaller model or LoRA.",
        int(steps[-1]),
    )


def _named(key: str) -> str:
    return "evaluation loss" if key == "eval_loss" else key


def _gap(run: Curves, key: str, low: int) -> Iterator[Finding]:
    """Learned by heart: over several epochs the training loss falls far below an evaluation loss that stands still."""
    steps, values = finite(run.get(key))
    train, epochs = finite(run.get("loss")), finite(run.get("epoch"))
    third = max(2, len(values) // 3)
    if len(values) < 6 or not len(epochs.values) or epochs.values.max() < 2 or of_policy(run):
        return
    since = train.values[train.steps > steps[-third - 1]]
    rises = np.median(values[-third:]) > values[low] * (1 + _RISE)
    if len(since) < 6 or rises:  # what rises is told with its own figures
        return
    end = float(np.median(since[-max(3, len(since) // 3) :]))
    stands = values[:-third].min() - values[-third:].min() < _RISE * values[low]
    if stands and 0 < end < (1 - _APART) * values[-1]:  # a loss of exactly 0 is a NaN that was filtered
        yield Finding(
            "overfitting",
            int(steps[-third - 1]),
            "warning",
            f"{_named(key)} {values[-third - 1]:.4g} to {values[-1]:.4g} in the last {third} evaluations, training loss "
            f"{end:.4g} after {epochs.values.max():.1f} epochs",
            f"Further epochs teach the training rows alone. More or more varied data, fewer epochs (stop near step "
            f"{steps[low]:,}), dropout or weight decay, a smaller model or LoRA.",
            int(steps[-1]),
        )


def too_good(run: Curves) -> Iterator[Finding]:
    """too_good: a perplexity near 1 in the first pass over the data, or on data that is not trained on."""
    if not of_language_model(run):
        return
    for key in evaluation_losses(run):
        evaluated, losses = finite(run.get(key))
        if len(losses) and 0 < (low := float(losses.min())) < _LOW:
            step = int(evaluated[int(losses.argmin())])
            yield _leak(
                step, f"{_named(key)} {low:.3g} nats per token at step {step:,} (a perplexity of {np.exp(low):.3f})"
            )
            return
    steps, values = finite(run.get("loss"))
    if len(values) < ENOUGH:
        return
    width = max(3, len(values) // 50)
    below = np.concatenate([[0], np.cumsum((values < _LOW) & (values > 0))])
    places = np.flatnonzero(below[width:] - below[:-width] == width)
    if not len(places):
        return
    last = int(places[0]) + width - 1
    at, level = int(steps[last]), float(np.median(values[last - width + 1 : last + 1]))
    epochs = finite(run.get("epoch"))
    passed = float(np.interp(at, epochs.steps, epochs.values)) if len(epochs.steps) else None
    if passed is not None and passed <= _FIRST_PASS:
        yield _leak(
            at, f"training loss {level:.3g} nats per token at step {at:,}, after {passed:.2f} of the first epoch"
        )


def _leak(step: int, evidence: str) -> Finding:
    return Finding(
        "too_good",
        step,
        "warning",
        evidence,
        "No natural text is that predictable. Look whether the model sees its labels (not shifted, no causal mask, the "
        "answer in the prompt), whether evaluation rows are trained on, and which tokens are (hf-objectives inspect).",
    )
