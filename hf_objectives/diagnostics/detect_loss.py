"""Signatures of the loss: spikes, a plateau, a loss that does not fall, overfitting, a loss too good to be true."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.findings import Finding
from hf_objectives.diagnostics.log_table import Series
from hf_objectives.diagnostics.robust import block_medians, excursions, noise, trend

_ENOUGH = 20  # points, below which a trend is not told from noise
_SHARE = 0.1  # of the level: a spike below that is worth knowing, no more
_FALL = 0.02  # of the loss that a run begins with: a smaller change is none
_LOW = 0.1  # nats per token: a perplexity of 1.1
_APART = 0.25  # of the evaluation loss
_FLAT = 0.06  # of the loss at the beginning: a change that a flat curve may still have within its bounds
_KNOWN = 1.5  # nats per token: a model that begins there has learned the language already
_GUESSING = 5.0  # nats per token: a perplexity of 148, which no trained model has on its own kind of text
_FIRST_PASS = 1.0  # epochs
_PREFERENCE = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "margin", "accuracy")
_POLICY = ("kl", "reward", "completions/mean_length", "policy_loss")


def finite(series: Series) -> Series:
    """The points whose value is a number."""
    whole = np.isfinite(series.values)
    return Series(series.steps[whole], series.values[whole])


def of_language_model(run: Curves) -> bool:
    """Whether `loss` is nats per token: not in preference and reinforcement learning."""
    return not any(key in run for key in (*_PREFERENCE, *_POLICY))


def of_policy(run: Curves) -> bool:
    """Whether `loss` is that of a policy gradient, whose value says nothing about how good the model is."""
    return any(key in run for key in _POLICY)


def spikes(run: Curves) -> Iterator[Finding]:
    """spike_recovered and spike_sustained: the loss leaps out of its noise, and comes back or does not."""
    if of_policy(run):
        return
    steps, values = finite(run.get("loss"))
    floor = max(_SHARE / 2, 1e-3)
    at_once = list(_rises_at_once(steps, values))
    yield from at_once
    for one in excursions(values):
        if any(other.step <= steps[one.start] <= other.last_step for other in at_once):
            continue
        relative = one.height / max(abs(one.level), 1e-9)
        if relative < floor:
            continue
        length = one.end - one.start
        first, last = int(steps[one.start]), int(steps[one.end - 1])
        measured = (
            f"loss {one.level:.4g} before step {first:,}, up to {one.level + one.height:.4g} "
            f"({one.deviations:.0f} standard deviations of the noise)"
        )
        near = _beside(run, steps, one.start)
        if one.back:
            # A single batch may be odd; what lasts, or stands further out, is more than that.
            grave = relative >= _SHARE and one.deviations >= (8 if length > 1 else 10)
            yield Finding(
                "spike_recovered",
                first,
                "warning" if grave else "info",
                f"{measured}, back after {length} logged steps{near}",
                "Look at the batch of this step for poorly formatted rows; DiagnosticsCallback names them. Clip gradients "
                "(max_grad_norm) or leave such steps out (on_spike='skip').",
                last,
            )
        elif length < 5 and length < len(values) // 20 + 3:
            yield Finding(
                "spike_recovered",
                first,
                "info",
                f"{measured}, at the end of the log: too near to say whether it recovers{near}",
                "Look again when more steps are logged.",
                last,
            )
        else:
            after = float(np.median(values[one.start : one.end]))
            yield Finding(
                "spike_sustained",
                first,
                "error" if after - one.level >= _SHARE * abs(one.level) else "warning",
                f"{measured}, and {after:.4g} since (median to step {last:,}){near}",
                "Go back to the checkpoint before. Look at the learning rate there and at the data from this step on: a "
                "schedule fault or a corrupted shard.",
                last,
            )


def _rises_at_once(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Iterator[Finding]:
    """A run that leaps above its first loss before it falls, where no level comes before that it could leap from."""
    if len(values) < _ENOUGH:
        return
    first = float(np.median(values[:3]))
    deviation = noise(values[len(values) // 3 :])  # of what came after
    early = values[: max(_ENOUGH // 2, len(values) // 10)]
    high = np.flatnonzero(early > first + max(4 * deviation, _SHARE * abs(first)))
    if len(high) < 2 or early.max() < first + max(2 * _SHARE * first, 5 * deviation):
        return
    top = int(early.argmax())
    after = np.flatnonzero(values[top:] <= first)
    if not len(after):
        return  # not_decreasing says it
    peak, back = float(early[top]), top + int(after[0])
    yield Finding(
        "spike_recovered",
        int(steps[high[0]]),
        "warning",
        f"loss {first:.4g} in the first steps, up to {peak:.4g} before it falls (back at step {steps[back]:,})",
        "The learning rate is too high for a start, or there is no warmup: what the model knew is lost in these steps. A "
        "lower rate, a longer warmup, clipped gradients.",
        int(steps[back]),
    )


def _beside(run: Curves, steps: NDArray[np.int64], start: int) -> str:
    """What else happened there: a resume, a corner of the schedule, a gradient that leapt."""
    low, high = steps[max(0, start - 2)], steps[min(len(steps) - 1, start + 1)]
    said = ""
    if any(low <= seam <= high for seam in run.seams):
        said += "; the run was resumed there"
    rate = finite(run.get("learning_rate"))
    here = (rate.steps >= low) & (rate.steps <= high)
    if here.sum() >= 2 and (rates := rate.values[here]).max() > 1.3 * max(rates[0], 1e-300) and rates[0] > 0:
        said += f"; the learning rate goes from {rates[0]:.3g} to {rates.max():.3g}"
    norm = finite(run.get("grad_norm"))
    here = (norm.steps >= low) & (norm.steps <= high)
    if here.any() and (usual := float(np.median(norm.values))) > 0 and norm.values[here].max() > 5 * usual:
        said += f"; gradient norm {norm.values[here].max():.3g}, usually {usual:.3g}"
    return said


def not_decreasing(run: Curves) -> Iterator[Finding]:
    """not_decreasing: the loss ends where it began, or above."""
    steps, values = finite(run.get("loss"))
    if len(values) < _ENOUGH or of_policy(run):
        return
    medians = block_medians(values, min(20, len(values) // 5))
    deviation = noise(values)
    first = max(4, min(len(values) // 50, 50))
    start = float(np.median(values[:first]))
    end, best = float(medians[-2:].mean()), float(medians.min())
    error = 1.25 * deviation * (1 / first + medians.size / (2 * len(values))) ** 0.5
    low_at = int(steps[min(int(medians.argmin() * len(values) / medians.size), len(steps) - 1)])
    where = f"loss {start:.4g} in the first {first} logged steps, {end:.4g} at the end, noise {deviation:.2g}"
    advice = (
        "Learning rate too high (look for a growing gradient norm) or far too low, weights that get no gradient (frozen, or "
        "left out of the optimizer), labels that do not belong to their inputs, or a bug in data loading; try to overfit "
        "one batch."
    )
    size = max(_FALL * abs(start), 4 * error)
    if end - best > max(4 * error, 0.05 * abs(best)) and end > best + max(start - best, 0) / 3:
        # Rises for good: the second half of what followed the low lies above it, too.
        later = medians[int(medians.argmin()) + 1 :]
        if (
            len(later) >= 3
            and np.median(later) > best + (end - best) / 4
            and trend(values[len(values) // 2 :]).change > 0
        ):
            yield Finding(
                "not_decreasing",
                low_at,
                "error",
                f"the loss rises: {best:.4g} at its lowest near step {low_at:,}, {where}",
                advice,
                int(steps[-1]),
            )
            return
    whole = trend(values)
    falls = whole.p_falls < 0.01 and whole.change < 0
    if end > start + size or (start - best < size and not falls):
        known = of_language_model(run) and start < _KNOWN and end <= start + size
        # That no fall was proved is not that there is none: the bounds have to say so.
        flat = whole.low > -_FLAT * abs(start) or (of_language_model(run) and end > _GUESSING)
        yield Finding(
            "not_decreasing",
            int(steps[0]),
            "error" if end > start + size else "info" if known or not flat else "warning",
            f"{where}; change over the run {whole.change:+.2g} ({whole.low:+.2g} to {whole.high:+.2g})"
            + ("; the model knew such text before" if known else ""),
            advice,
            int(steps[-1]),
        )
    elif of_language_model(run) and end > _GUESSING and start - end < _SHARE * start and len(values) >= 3 * _ENOUGH:
        yield Finding(
            "not_decreasing",
            int(steps[0]),
            "warning",
            f"{where}: a perplexity of {np.exp(end):,.0f} after the whole run is close to guessing",
            advice,
            int(steps[-1]),
        )


def plateau(run: Curves) -> Iterator[Finding]:
    """plateau: the loss falls early and then stays, for at least the last 60 % of the run."""
    steps, values = finite(run.get("loss"))
    if len(values) < 2 * _ENOUGH or of_policy(run):
        return
    first = max(3, min(len(values) // 50, 20))
    start = float(np.median(values[:first]))
    for share in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4):
        begin = max(first, int(share * len(values)))
        tail = values[begin:]
        level = float(np.median(tail))
        fall = start - level
        if fall < max(_FALL * abs(start), 3 * noise(values)):
            continue
        rest = trend(tail)
        if (
            rest.p_falls > 0.02
            and rest.low > -(0.1 if len(values) >= 5 * _ENOUGH else 0.05) * fall
            and rest.high < 0.15 * fall
        ):
            low = of_language_model(run) and level < max(_LOW, 0.05 * start)
            yield Finding(
                "plateau",
                int(steps[begin]),
                "info" if low else "warning",
                f"loss {start:.4g} to {level:.4g} by step {steps[begin]:,}, then {rest.change:+.2g} over the remaining "
                f"{len(tail)} logged steps ({rest.low:+.2g} to {rest.high:+.2g})"
                + (": nothing is left to learn" if low else ""),
                "More steps bring nothing. A higher learning rate or a longer warmup; then the data: too little, too "
                "repetitive, or labels that cannot be learned; then a larger model or more weights that train.",
                int(steps[-1]),
            )
            return


def overfitting(run: Curves) -> Iterator[Finding]:
    """overfitting: the evaluation loss rises again while the training loss falls on."""
    steps, values = finite(run.get("eval_loss"))
    train = finite(run.get("loss"))
    if len(values) < 4:
        return
    low = int(values.argmin())
    later = values[low + 1 :]
    yield from _gap(run, low)
    if len(later) < 2:
        return
    around = values[max(0, low - 2) :]  # the fall before it is no noise
    deviation = noise(around) if len(around) >= 5 else noise(values)
    rise = float(np.median(later[-max(2, len(later) // 3) :]) - values[low])
    if rise <= max(4 * deviation, _FALL * abs(values[low])) or np.mean(later > values[low]) < 0.9:
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
        if end > there + 2 * noise(train.values) / max(3, len(after) // 5) ** 0.5:
            return  # both rise: no gap, but a run that goes wrong as a whole
        falls = f", training loss {there:.4g} to {end:.4g} meanwhile"
    yield Finding(
        "overfitting",
        int(steps[low]),
        "error" if values[-1] > values[0] and low > 0 else "warning",
        f"evaluation loss {values[low]:.4g} at step {steps[low]:,}, {values[-1]:.4g} at step {steps[-1]:,}{falls}",
        f"Take the checkpoint of step {steps[low]:,} (load_best_model_at_end). More or more varied data, fewer epochs, a "
        "smaller learning rate, dropout or weight decay, a smaller model or LoRA.",
        int(steps[-1]),
    )


def _gap(run: Curves, low: int) -> Iterator[Finding]:
    """Learned by heart: over several epochs the training loss falls far below an evaluation loss that stands still."""
    steps, values = finite(run.get("eval_loss"))
    train, epochs = finite(run.get("loss")), finite(run.get("epoch"))
    third = max(2, len(values) // 3)
    if len(values) < 6 or not len(epochs.values) or epochs.values.max() < 2 or of_policy(run):
        return
    since = train.values[train.steps > steps[-third - 1]]
    rises = np.median(values[-third:]) > values[low] * (1 + _FALL)
    if len(since) < 6 or rises:  # what rises is told with its own figures
        return
    end = float(np.median(since[-max(3, len(since) // 3) :]))
    stands = values[:-third].min() - values[-third:].min() < _FALL * values[low]
    if stands and 0 < end < (1 - _APART) * values[-1]:  # a loss of exactly 0 is a NaN that was filtered
        yield Finding(
            "overfitting",
            int(steps[-third - 1]),
            "warning",
            f"evaluation loss {values[-third - 1]:.4g} to {values[-1]:.4g} in the last {third} evaluations, training loss "
            f"{end:.4g} after {epochs.values.max():.1f} epochs",
            f"Further epochs teach the training rows alone. More or more varied data, fewer epochs (stop near step "
            f"{steps[low]:,}), dropout or weight decay, a smaller model or LoRA.",
            int(steps[-1]),
        )


def too_good(run: Curves) -> Iterator[Finding]:
    """too_good: a perplexity near 1 in the first pass over the data, or on data that is not trained on."""
    if not of_language_model(run):
        return
    steps, values = finite(run.get("loss"))
    evaluation = finite(run.get("eval_loss"))
    if len(evaluation.values) and 0 < (low := evaluation.values.min()) < _LOW:
        at = int(evaluation.steps[int(evaluation.values.argmin())])
        where = f"evaluation loss {low:.3g} nats per token at step {at:,} (a perplexity of {np.exp(low):.3f})"
        yield _leak(at, where)
        return
    if len(values) < _ENOUGH:
        return
    width = max(3, len(values) // 50)
    below = np.concatenate([[0], np.cumsum((values < _LOW) & (values > 0))])
    low = np.flatnonzero(below[width:] - below[:-width] == width)
    if not len(low):
        return
    last = int(low[0]) + width - 1
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
