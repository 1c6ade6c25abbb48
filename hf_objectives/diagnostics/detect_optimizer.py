"""Signatures of the step itself: values that are not finite, exploding gradients, faults of the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.detect_loss import finite
from hf_objectives.diagnostics.findings import Finding
from hf_objectives.diagnostics.robust import excursions, noise

_ZEROS = 3  # logged losses of exactly 0 in a row
_TENFOLD, _THIRTYFOLD = np.log(10), np.log(30)
_OFTEN = 2  # single steps that gradient clipping takes care of
_CORNER = 1.5  # a rate over the one before it, outside warmup


def non_finite(run: Curves) -> Iterator[Finding]:
    """non_finite: NaN or infinite losses or gradient norms, and the zero that a NaN becomes in the Trainer's log."""
    for key in ("loss", "eval_loss", "grad_norm"):
        steps, values = run.get(key)
        bad = np.flatnonzero(~np.isfinite(values))
        if not len(bad):
            continue
        lasting = bool(len(bad) == len(values) - bad[0])
        scaled = key == "grad_norm" and not lasting and len(bad) <= max(3, len(values) // 50)
        yield Finding(
            "non_finite",
            int(steps[bad[0]]),
            "info" if scaled else "error",
            f"{key} is {values[bad[0]]} at step {steps[bad[0]]:,}"
            + (" and at every one after it" if lasting and len(bad) > 1 else f", {len(bad)} times in all"),
            "A few skipped steps are how an fp16 loss scaler finds its scale."
            if scaled
            else "Go back to the checkpoint before. Under fp16 take bf16 or a lower loss scale; else a lower learning rate, "
            "and look at the batch (DiagnosticsCallback writes it): empty labels, damaged rows.",
            int(steps[bad[-1]]),
        )
    steps, values = run.get("loss")
    zero = values == 0
    if zero.sum() >= _ZEROS and zero[-1]:
        first = len(zero) - int(np.argmin(zero[::-1])) if not zero.all() else 0
        if len(zero) - first >= _ZEROS and first > 0 and values[first - 1] > 1e-3:
            yield Finding(
                "non_finite",
                int(steps[first]),
                "error",
                f"the loss is exactly 0 from step {steps[first]:,} on, {values[first - 1]:.4g} before",
                "That is what a NaN looks like in the Trainer's log: set logging_nan_inf_filter=False, and go back to the "
                "checkpoint before.",
                int(steps[-1]),
            )


def gradient_explosion(run: Curves) -> Iterator[Finding]:
    """gradient_explosion: the gradient norm leaves its noise by more than a factor of ten."""
    steps, values = finite(run.get("grad_norm"))
    positive = values > 0
    steps, logs = steps[positive], np.log(values[positive])
    found = [one for one in excursions(logs) if one.height > _TENFOLD]
    if not found:
        return
    lasting = [one for one in found if not one.back and one.end - one.start >= 5]
    worst = lasting[0] if lasting else max(found, key=lambda one: one.height)
    peak = float(np.exp(worst.level + worst.height))
    yield Finding(
        "gradient_explosion",
        int(steps[worst.start]),
        "error" if lasting else "warning" if worst.height > _THIRTYFOLD or len(found) > _OFTEN else "info",
        f"gradient norm {np.exp(worst.level):.3g} before step {steps[worst.start]:,}, up to {peak:.3g}"
        + (", and it stays" if lasting else f"; {len(found)} time{'s' if len(found) > 1 else ''} more than tenfold"),
        "Clip gradients (max_grad_norm=1.0), lower the learning rate or lengthen the warmup; where it is one step, look at "
        "its batch.",
        int(steps[worst.end - 1]),
    )


def schedule_fault(run: Curves) -> Iterator[Finding]:
    """schedule_fault: a rate of zero while training goes on, or one that leaps, and what the loss did there."""
    steps, rates = finite(run.get("learning_rate"))
    if len(rates) < 4:
        return
    if (rates <= 0).all():
        yield Finding(
            "schedule_fault", int(steps[0]), "error", "the learning rate is 0 at every step",
            "Nothing is trained. Look at learning_rate and at the schedule's number of steps.", int(steps[-1]),
        )  # fmt: skip
        return
    zero = rates <= 0
    zero[: int(np.argmax(rates > 0))] = False  # before the warmup's first step
    many = max(3, len(rates) // 50)
    if zero.sum() > many:
        first = int(np.flatnonzero(zero)[0])
        yield Finding(
            "schedule_fault",
            int(steps[first]),
            "error",
            f"the learning rate is 0 at {int(zero.sum())} of {len(rates)} logged steps, from step {steps[first]:,} on",
            "Steps at a rate of 0 train nothing: the schedule was made for fewer steps than the run has.",
            int(steps[np.flatnonzero(zero)[-1]]),
        )
    for i in _leaps(rates):
        moved = _loss_moved(run, int(steps[i - 1]), int(steps[i]))
        yield Finding(
            "schedule_fault",
            int(steps[i]),
            "warning" if moved else "info",
            f"the learning rate goes from {rates[i - 1]:.3g} to {rates[i]:.3g} at step {steps[i]:,}"
            + (f", and {moved}" if moved else "; the loss does not answer"),
            "If this is not meant: a resumed run with another schedule, a scheduler that is stepped twice, or one that was "
            "made for another number of steps. After a restart, warm up again.",
        )


def _leaps(rates: np.ndarray) -> list[int]:
    """Indices at which the rate rises by half or more, warmup aside: there the increments stay as they were."""
    before, after = rates[1:-1], rates[2:]
    rises = np.diff(rates)
    # Of a warmup in a straight line no increment is larger than the ones before it.
    usual = np.maximum.accumulate(np.maximum(rises, 0))[:-1]
    leaps = (before > 0) & (after > _CORNER * before) & ((rises[1:] > 3 * usual) | (rises[:-1] <= 0))
    return (np.flatnonzero(leaps)[:20] + 2).tolist()


def _loss_moved(run: Curves, before: int, at: int) -> str:
    """What the loss did after a corner, in words; empty where it stayed in its noise."""
    steps, values = finite(run.get("loss"))
    corner = int(np.searchsorted(steps, at))
    if corner < 5 or len(values) - corner < 5:
        return ""
    width = min(max(5, len(values) // 20), corner, len(values) - corner)
    old, new = float(np.median(values[corner - width : corner])), float(np.median(values[corner : corner + width]))
    leapt = [one for one in excursions(values) if corner - 2 <= one.start <= corner + width]
    if new - old > max(5 * noise(values) / width**0.5, 0.02 * abs(old)) or leapt:
        return f"the loss from {old:.4g} to {max([new, *(one.level + one.height for one in leapt)]):.4g}"
    return ""
