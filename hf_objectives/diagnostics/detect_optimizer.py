"""Signatures of the step itself: values that are not finite, exploding gradients, faults of the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.detect_loss import finite, of_policy
from hf_objectives.diagnostics.robust import Excursion, excursions, noise
from hf_objectives.inspection import Finding

_ZEROS = 3  # logged losses of exactly 0 in a row
_FIRST = ("loss", "eval_loss", "grad_norm")
_OTHERS = ("reward", "kl", "entropy", "rewards/chosen", "rewards/margins", "logps/chosen")
_TENFOLD, _THIRTYFOLD, _HUNDREDS = np.log(10), np.log(30), np.log(300)
_TOLD = 5  # leaps of a rate that are told one by one
_OFTEN = 2  # single steps that gradient clipping takes care of
_CORNER = 1.5  # a rate over the one before it, outside warmup


def _watched(run: Curves) -> list[str]:
    """The curves of a run that are numbers as long as nothing is wrong, the gravest first."""
    losses = [key for key in sorted(run.series) if key.endswith("loss") and key not in _FIRST]
    return [key for key in (*_FIRST, *losses, *_OTHERS) if key in run]


def non_finite(run: Curves) -> Iterator[Finding]:
    """non_finite: NaN or infinite losses, gradient norms, rewards; and the zero that a NaN becomes in the Trainer's log."""
    told: list[tuple[Finding, list[str]]] = []
    for key in _watched(run):
        steps, values = run.get(key)
        bad = np.flatnonzero(~np.isfinite(values))
        if not len(bad):
            continue
        first, last = int(steps[bad[0]]), int(steps[bad[-1]])
        # What is broken with or after something else, to the end as that, is told beside it.
        before = [also for one, also in told if one.step <= first and one.last_step >= last and one.severity == "error"]
        if before:
            before[0].append(key)
            continue
        lasting = bool(len(bad) == len(values) - bad[0])
        scaled = key == "grad_norm" and not lasting and len(bad) <= max(3, len(values) // 50)
        one = Finding(
            "non_finite",
            first,
            "info" if scaled else "error",
            f"{key} is {values[bad[0]]} at step {first:,}"
            + (" and at every one after it" if lasting and len(bad) > 1 else f", {len(bad)} times in all"),
            "A few skipped steps are how an fp16 loss scaler finds its scale."
            if scaled
            else "Go back to the checkpoint before. Under fp16 take bf16 or a lower loss scale; else a lower learning rate, "
            "and look at the batch (DiagnosticsCallback writes it): empty labels, damaged rows.",
            last,
        )
        told.append((one, []))
    for one, also in told:
        yield (
            replace(one, evidence=f"{one.evidence}; so {'are' if len(also) > 1 else 'is'} {', '.join(also)}")
            if also
            else one
        )
    yield from _zeros(run)


def _zeros(run: Curves) -> Iterator[Finding]:
    """A loss of exactly 0: from the beginning on no token is trained, later it is a NaN that was filtered."""
    steps, values = run.get("loss")
    zero = values == 0
    if of_policy(run) or zero.sum() < _ZEROS or not zero[-1]:
        return
    first = len(zero) - int(np.argmin(zero[::-1])) if not zero.all() else 0
    if len(zero) - first < _ZEROS:
        return
    step, norms = int(steps[first]), run.get("grad_norm")
    if first > 0:
        if values[first - 1] > 1e-3:
            yield Finding(
                "non_finite",
                step,
                "error",
                f"the loss is exactly 0 from step {step:,} on, {values[first - 1]:.4g} before",
                "That is what a NaN looks like in the Trainer's log: set logging_nan_inf_filter=False, and go back to the "
                "checkpoint before.",
                int(steps[-1]),
            )
        return
    if len(norms.values) and not np.isfinite(norms.values).all():
        return  # NaN from the beginning on, which the gradient norm says
    yield Finding(
        "few_supervised_tokens",
        step,
        "error",
        f"the loss is exactly 0 at all of {len(values)} logged steps"
        + (", and so is the gradient norm" if len(norms.values) and not norms.values.any() else ""),
        "No token is trained: every label is masked. Look at them (hf-objectives inspect): a template whose answers are not "
        "found, answers cut off by max_length. Without a gradient norm in the log it may also be a NaN that was filtered.",
        int(steps[-1]),
    )


def gradient_explosion(run: Curves) -> Iterator[Finding]:
    """gradient_explosion: the gradient norm leaves its noise by more than a factor of ten.

    A warning where it does so again and again, more than thirtyfold with the loss, or more than three hundredfold; an error
    where it stays.
    """
    steps, values = finite(run.get("grad_norm"))
    positive = values > 0
    steps, logs = steps[positive], np.log(values[positive])
    found = [one for one in excursions(logs) if one.height > _TENFOLD]
    if not found:
        return
    lasting = [one for one in found if not one.back and one.end - one.start >= 5]
    worst = lasting[0] if lasting else max(found, key=lambda one: one.height)
    peak = float(np.exp(worst.level + worst.height))
    first, last = int(steps[worst.start]), int(steps[worst.end - 1])
    grave = worst.height > _HUNDREDS or len(found) > _OFTEN or (worst.height > _THIRTYFOLD and _moved(run, first, last))
    yield Finding(
        "gradient_explosion",
        first,
        "error" if lasting else "warning" if grave else "info",
        f"gradient norm {np.exp(worst.level):.3g} before step {first:,}, up to {peak:.3g}"
        + (", and it stays" if lasting else f"; {len(found)} time{'s' if len(found) > 1 else ''} more than tenfold"),
        "Clip gradients (max_grad_norm=1.0), lower the learning rate or lengthen the warmup; where it is one step, look at "
        "its batch.",
        last,
    )


def _moved(run: Curves, first: int, last: int) -> bool:
    """Whether the loss leaves its noise about there; unknown, without a loss, counts as yes."""
    steps, values = finite(run.get("loss"))
    if not len(values):
        return True
    low, high = np.searchsorted(steps, [first, last])
    return any(low - 3 <= one.start <= high + 3 for one in excursions(values))


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
    leaps = _leaps(rates)
    if _restarts(rates, leaps):
        yield Finding(
            "schedule_fault",
            int(steps[leaps[0]]),
            "info",
            f"the learning rate starts anew {len(leaps)} times, at equal distances, the last time at step "
            f"{steps[leaps[-1]]:,}: a schedule with restarts",
            "If this is not meant, look at lr_scheduler_type. The loss rises after each restart, and comes back.",
            int(steps[leaps[-1]]),
        )
        return
    risen = excursions(finite(run.get("loss")).values) if leaps else []
    for i in leaps[:_TOLD]:
        moved = _loss_moved(run, int(steps[i]), risen)
        yield Finding(
            "schedule_fault",
            int(steps[i]),
            "warning" if moved else "info",
            f"the learning rate goes from {rates[i - 1]:.3g} to {rates[i]:.3g} at step {steps[i]:,}"
            + (f", and {moved}" if moved else "; the loss does not answer")
            + (f"; it leaps {len(leaps)} times in all" if len(leaps) > _TOLD and i == leaps[_TOLD - 1] else ""),
            "If this is not meant: a resumed run with another schedule, a scheduler that is stepped twice, or one that was "
            "made for another number of steps. After a restart, warm up again.",
        )


def _restarts(rates: np.ndarray, leaps: list[int]) -> bool:
    """Whether the rate leaps to a former height at equal distances, as cosine schedules with restarts do."""
    if len(leaps) < 2:
        return False
    apart = np.diff([0, *leaps])[1:]  # the first stretch has the warmup, too
    alike = apart.max() <= 1.05 * apart.min() + 2
    return bool(alike and (rates[leaps] <= 1.05 * rates[: leaps[0]].max()).all())


def _leaps(rates: np.ndarray) -> list[int]:
    """Indices at which the rate rises by half or more, warmup aside: there the increments stay as they were."""
    before, after = rates[1:-1], rates[2:]
    rises = np.diff(rates)
    # Of a warmup in a straight line no increment is larger than the ones before it.
    usual = np.maximum.accumulate(np.maximum(rises, 0))[:-1]
    leaps = (before > 0) & (after > _CORNER * before) & ((rises[1:] > 3 * usual) | (rises[:-1] <= 0))
    return (np.flatnonzero(leaps) + 2).tolist()


def _loss_moved(run: Curves, at: int, risen: list[Excursion]) -> str:
    """What the loss did after a corner, in words; empty where it stayed in its noise."""
    steps, values = finite(run.get("loss"))
    corner = int(np.searchsorted(steps, at))
    if corner < 5 or len(values) - corner < 5:
        return ""
    width = min(max(5, len(values) // 20), corner, len(values) - corner)
    old, new = float(np.median(values[corner - width : corner])), float(np.median(values[corner : corner + width]))
    leapt = [one for one in risen if corner - 2 <= one.start <= corner + width]
    if new - old > max(5 * noise(values) / width**0.5, 0.02 * abs(old)) or leapt:
        return f"the loss from {old:.4g} to {max([new, *(one.level + one.height for one in leapt)]):.4g}"
    return ""
