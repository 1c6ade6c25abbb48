"""Signatures of the training loss: spikes, a plateau, a loss that does not fall."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.log_table import Series
from hf_objectives.diagnostics.robust import block_medians, excursions, noise, trend
from hf_objectives.inspection import Finding

_FEW = 7  # points, of which five or more in order are no chance
ENOUGH = 20  #: points, below which a trend is not told from noise
_SHARE = 0.1  # of the level: a spike below that is worth knowing, no more
_FALL = 0.02  # of the loss that a run begins with: a smaller change is none
_LOW = 0.1  # nats per token: a perplexity of 1.1
_FLAT = 0.06  # of the loss at the beginning: a change that a flat curve may still have within its bounds
_FLOOD = 5  # spikes of a run that are told one by one
_GUESSING = 5.0  # nats per token: a perplexity of 148, which few trained models have on any text
_PREFERENCE = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "margin", "accuracy", "f1")
_POLICY = ("kl", "reward", "completions/mean_length", "policy_loss")


def finite(series: Series) -> Series:
    """The points whose value is a number."""
    whole = np.isfinite(series.values)
    return Series(series.steps[whole], series.values[whole])


def of_language_model(run: Curves) -> bool:
    """Whether `loss` is nats per token: not in preference and reinforcement learning, nor where classes are told apart."""
    return not any(key in run or f"eval_{key}" in run for key in (*_PREFERENCE, *_POLICY))


def of_policy(run: Curves) -> bool:
    """Whether `loss` is that of a policy gradient, whose value says nothing about how good the model is."""
    return any(key in run for key in _POLICY) and "rewards/chosen" not in run  # KTO logs a kl, too


def spikes(run: Curves) -> Iterator[Finding]:
    """spike_recovered and spike_sustained: the loss leaps out of its noise, and comes back or does not."""
    if of_policy(run):
        return
    found = list(_spikes(run))
    for severity in ("info", "warning"):
        alike = [one for one in found if (one.kind, one.severity) == ("spike_recovered", severity)]
        if len(alike) > _FLOOD:
            found = [one for one in found if one not in alike]
            found.append(
                replace(
                    alike[0],
                    last_step=alike[-1].last_step,
                    evidence=f"{len(alike)} spikes, the first: {alike[0].evidence}; the last at {alike[-1].steps}",
                )
            )
    yield from found


def _spikes(run: Curves) -> Iterator[Finding]:
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
    if len(values) < ENOUGH:
        return
    first = float(np.median(values[:3]))
    deviation = noise(values[len(values) // 3 :])  # of what came after
    early = values[: max(ENOUGH // 2, len(values) // 10)]
    high = np.flatnonzero(early > first + max(6 * deviation, 2 * _SHARE * abs(first)))
    if len(high) < 2 or early.max() < first + max(3 * _SHARE * first, 8 * deviation):
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
    """not_decreasing: the loss ends where it began, or above; or nothing has a gradient."""
    steps, values = finite(run.get("loss"))
    norms = finite(run.get("grad_norm"))
    if len(norms.values) >= _FEW and not norms.values.any() and values.any():
        yield Finding(
            "not_decreasing",
            int(norms.steps[0]),
            "error",
            f"the gradient norm is exactly 0 at all of {len(norms.values)} logged steps",
            "Nothing is trained: all weights are frozen, or the loss is cut off from them (no_grad, detach).",
            int(norms.steps[-1]),
        )
        return
    if of_policy(run):
        return
    if len(values) < ENOUGH:
        yield from _rises(steps, values)
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
        # A trained model begins low, and may have little to learn from such text.
        known = of_language_model(run) and start < _GUESSING and end <= start + size
        # That no fall was proved is not that there is none: the bounds have to say so.
        flat = whole.low > -_FLAT * abs(start) or (of_language_model(run) and end > _GUESSING)
        yield Finding(
            "not_decreasing",
            int(steps[0]),
            "error" if end > start + size else "info" if known or not flat else "warning",
            f"{where}; change over the run {whole.change:+.2g} ({whole.low:+.2g} to {whole.high:+.2g})"
            + ("; either the model knew such text before, or nothing is trained" if known else ""),
            advice,
            int(steps[-1]),
        )
    elif of_language_model(run) and end > _GUESSING and start - end < _SHARE * start and len(values) >= 3 * ENOUGH:
        yield Finding(
            "not_decreasing",
            int(steps[0]),
            "warning",
            f"{where}: a perplexity of {np.exp(end):,.0f} after the whole run is close to guessing",
            advice,
            int(steps[-1]),
        )


def _rises(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Iterator[Finding]:
    """A run of few logged points whose loss rises all the same, by Kendall's rank correlation."""
    if len(values) < _FEW or not values[0]:
        return
    edge = max(2, len(values) // 4)
    start, end = float(np.median(values[:edge])), float(np.median(values[-edge:]))
    p = float(stats.kendalltau(np.arange(len(values)), values, alternative="greater").pvalue)
    if p < 0.01 and end - start > 2 * _SHARE * abs(start):
        yield Finding(
            "not_decreasing",
            int(steps[0]),
            "error",
            f"loss {start:.4g} to {end:.4g} over {len(values)} logged steps; that it rises by chance has p = {p:.0e}",
            "Learning rate too high, or a corrupted shard: look at the gradient norm, and log more often (logging_steps).",
            int(steps[-1]),
        )


def plateau(run: Curves) -> Iterator[Finding]:
    """plateau: the loss falls early and then stays, for at least the last 60 % of the run."""
    steps, values = finite(run.get("loss"))
    if len(values) < 2 * ENOUGH or of_policy(run):
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
            and rest.low > -(0.1 if len(values) >= 5 * ENOUGH else 0.05) * fall
            and rest.low > -_SHARE * abs(level)  # within its bounds, no more may be won
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
