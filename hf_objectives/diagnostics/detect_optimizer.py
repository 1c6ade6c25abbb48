"""What the optimizer's steps show: values that are not finite, exploding gradients, faults of the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hf_objectives.diagnostics.robust import excursions
from hf_objectives.diagnostics.run_view import RunView, Sign

_FIRST = ("loss", "eval_loss", "grad_norm")
_OTHERS = ("reward", "kl", "entropy", "rewards/chosen", "rewards/margins", "logps/chosen")
_TENFOLD, _THIRTYFOLD, _HUNDREDS = np.log(10), np.log(30), np.log(300)
_TOLD = 5  # leaps of the rate that are reported one by one
_OFTEN = 2  # single steps that gradient clipping takes care of
_LEAP = 1.5  # a rate over the one before it, outside warmup


def non_finite(run: RunView) -> Iterator[Sign]:
    """A loss, a gradient norm or a reward is NaN or infinite. Curves that broke together are reported together."""
    losses = [key for key in sorted(run.curves.series) if key.endswith("loss") and key not in _FIRST]
    found: dict[Sign, list[str]] = {}
    for key in (*_FIRST, *losses, *_OTHERS):
        steps, values = run.curves.get(key)
        bad = np.flatnonzero(~np.isfinite(values))
        if not len(bad):
            continue
        first, last = int(steps[bad[0]]), int(steps[bad[-1]])
        before = [sign for sign in found if sign.severity == "error" and sign.step <= first and sign.last_step >= last]
        if before:
            found[before[0]].append(key)
            continue
        lasting = len(bad) == len(values) - bad[0]
        often = " and at every one after it" if lasting and len(bad) > 1 else f", {len(bad)} times in all"
        # An fp16 loss scaler skips a few steps while it looks for its scale.
        scaled = key == "grad_norm" and not lasting and len(bad) <= max(3, len(values) // 50)
        evidence = f"{key} is {values[bad[0]]} at step {first:,}{often}"
        found[Sign("info" if scaled else "error", first, last, evidence)] = []
    for sign, also in found.items():
        words = f"; so {'are' if len(also) > 1 else 'is'} {', '.join(also)}" if also else ""
        yield sign._replace(evidence=sign.evidence + words)


def filtered_nan(run: RunView) -> Iterator[Sign]:
    """The loss becomes exactly 0: the Trainer logs 0 where it filters a NaN."""
    steps, values = run.curves.get("loss")
    first = run.zero_from
    if first and values[first - 1] > 1e-3:
        step = int(steps[first])
        evidence = f"the loss is exactly 0 from step {step:,} on, {values[first - 1]:.4g} before"
        yield Sign("error", step, int(steps[-1]), evidence)


def gradient_explosion(run: RunView) -> Iterator[Sign]:
    """The gradient norm leaves its noise by more than a factor of ten.

    A warning where it does so often, more than thirtyfold together with the loss, or more than three hundredfold. An error
    where it stays.
    """
    steps, values = run["grad_norm"]
    steps, logs = steps[values > 0], np.log(values[values > 0])
    found = [leap for leap in excursions(logs) if leap.height > _TENFOLD]
    if not found:
        return
    lasting = [leap for leap in found if not leap.back and leap.end - leap.start >= 5]
    worst = lasting[0] if lasting else max(found, key=lambda leap: leap.height)
    first, last = int(steps[worst.start]), int(steps[worst.end - 1])
    # Without a loss it is unknown whether it leaves its noise there as well, and counts as yes.
    low, high = np.searchsorted(run["loss"].steps, [first, last])
    loss_rises = not len(run["loss"].steps) or any(low - 3 <= rise.start <= high + 3 for rise in run.rises)
    severe = worst.height > _HUNDREDS or len(found) > _OFTEN or (worst.height > _THIRTYFOLD and loss_rises)
    times = f"; {len(found)} time{'s' if len(found) > 1 else ''} more than tenfold"
    evidence = f"gradient norm {np.exp(worst.level):.3g} before step {first:,}, up to {np.exp(worst.peak):.3g}"
    evidence += ", and it stays" if lasting else times
    yield Sign("error" if lasting else "warning" if severe else "info", first, last, evidence)


def zero_rate(run: RunView) -> Iterator[Sign]:
    """The learning rate is 0 while training goes on."""
    steps, rates = run["learning_rate"]
    if len(rates) < 4:
        return
    zero = np.flatnonzero(rates <= 0)
    if len(zero) == len(rates):
        yield Sign("error", int(steps[0]), int(steps[-1]), "the learning rate is 0 at every step")
        return
    zero = zero[zero > np.argmax(rates > 0)]  # the first step of a warmup may have a rate of 0
    if len(zero) > max(3, len(rates) // 50):
        first = int(steps[zero[0]])
        evidence = f"the learning rate is 0 at {len(zero)} of {len(rates)} logged steps, from step {first:,} on"
        yield Sign("error", first, int(steps[zero[-1]]), evidence)


def rate_leaps(run: RunView) -> Iterator[Sign]:
    """The learning rate rises by half or more from one line to the next; at equal distances it is a schedule's restart."""
    (steps, rates), leaps = run["learning_rate"], _leaps(run)
    apart = np.diff(leaps)  # the stretch before the first leap has the warmup as well
    regular = len(apart) > 0 and apart.max() <= 1.05 * apart.min() + 2
    if regular and (rates[leaps] <= 1.05 * rates[: leaps[0]].max()).all():  # to a former height, as after a cosine
        last = int(steps[leaps[-1]])
        evidence = (
            f"the learning rate starts anew {len(leaps)} times, at equal distances, the last time at step {last:,}"
        )
        yield Sign("info", int(steps[leaps[0]]), last, f"{evidence}: a schedule with restarts")
        return
    for i in leaps[:_TOLD]:
        step = int(steps[i])
        moved = _loss_after(run, step)
        evidence = f"the learning rate goes from {rates[i - 1]:.3g} to {rates[i]:.3g} at step {step:,}"
        evidence += f", and {moved}" if moved else "; the loss does not answer"
        if len(leaps) > _TOLD and i == leaps[_TOLD - 1]:
            evidence += f"; it leaps {len(leaps)} times in all"
        yield Sign("warning" if moved else "info", step, step, evidence)


def _leaps(run: RunView) -> list[int]:
    """Indices at which the rate leaps. A warmup in a straight line does not: its increments stay as they were."""
    rates = run["learning_rate"].values
    if len(rates) < 4 or not (rates > 0).any():
        return []
    rises = np.diff(rates)
    usual = np.maximum.accumulate(np.maximum(rises, 0))[:-1]
    before, after = rates[1:-1], rates[2:]
    leaps = (before > 0) & (after > _LEAP * before) & ((rises[1:] > 3 * usual) | (rises[:-1] <= 0))
    return (np.flatnonzero(leaps) + 2).tolist()


def _loss_after(run: RunView, step: int) -> str:
    """How far the loss rises after a step, in words; "" where it stays in its noise."""
    steps, values = run["loss"]
    corner = int(np.searchsorted(steps, step))
    if corner < 5 or len(values) - corner < 5:
        return ""
    width = min(max(5, len(values) // 20), corner, len(values) - corner)
    old, new = float(np.median(values[corner - width : corner])), float(np.median(values[corner : corner + width]))
    rises = [rise.peak for rise in run.rises if corner - 2 <= rise.start <= corner + width]
    if rises or new - old > max(5 * run.noise / width**0.5, 0.02 * abs(old)):
        return f"the loss from {old:.4g} to {max([new, *rises]):.4g}"
    return ""
