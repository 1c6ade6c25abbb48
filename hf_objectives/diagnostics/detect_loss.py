"""What the training loss shows: spikes, a plateau, a loss that does not fall."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import stats

from hf_objectives.diagnostics.robust import MAD, Values, block_medians, noise, trend
from hf_objectives.diagnostics.run_view import ENOUGH, LOW, SIZABLE, RunView, Sign
from hf_objectives.inspection import SEVERITIES, Severity

_FALL = 0.02  # of the loss at the beginning: a smaller change is none
_FLAT = 0.06  # of the loss at the beginning: a change that a flat curve may still have within its bounds
_GUESSING = 5.0  # nats per token, a perplexity of 148; few trained models have that on any text
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)  # of the run, after which a plateau may begin


def early_rise(run: RunView) -> Iterator[Sign]:
    """The loss rises above its first values before it falls. No level comes before that it could leave."""
    steps, values = run["loss"]
    if len(values) < ENOUGH or run.is_policy:
        return
    first = float(np.median(values[:3]))
    deviation = noise(values[len(values) // 3 :])
    early = values[: max(ENOUGH // 2, len(values) // 10)]
    high = np.flatnonzero(early > first + max(6 * deviation, 2 * SIZABLE * abs(first)))
    if len(high) < 2 or early.max() < first + max(3 * SIZABLE * first, 8 * deviation):
        return
    top = int(early.argmax())
    after = np.flatnonzero(values[top:] <= first)
    if len(after):  # else it never falls, which has a rule of its own
        back = int(steps[top + int(after[0])])
        evidence = (
            f"loss {first:.4g} in the first steps, up to {early[top]:.4g} before it falls (back at step {back:,})"
        )
        yield Sign("warning", int(steps[high[0]]), back, evidence)


def recovered_spikes(run: RunView) -> Iterator[Sign]:
    """The loss leaves its noise and comes back, or the log ends too early to say."""
    return (sign for lasts, sign in _spikes(run) if not lasts)


def sustained_spikes(run: RunView) -> Iterator[Sign]:
    """The loss leaves its noise and stays above it."""
    return (sign for lasts, sign in _spikes(run) if lasts)


def _spikes(run: RunView) -> Iterator[tuple[bool, Sign]]:
    """Excursions of some height, each with whether the loss stays above its level."""
    steps, values = run["loss"]
    early = list(early_rise(run))
    for spike in () if run.is_policy else run.rises:
        level, length = max(abs(spike.level), 1e-9), spike.end - spike.start
        first, last = int(steps[spike.start]), int(steps[spike.end - 1])
        if spike.height < SIZABLE / 2 * level or any(sign.step <= first <= sign.last_step for sign in early):
            continue
        lasts, severe = not spike.back and length >= min(5, len(values) // 20 + 3), False
        if spike.back:
            # One batch may be odd. A spike is a warning where it lasts or is higher than that.
            severe = spike.deviations >= (8 if length > 1 else 10) and spike.height >= SIZABLE * level
            outcome = f"back after {length} logged steps"
        elif lasts:
            after = float(np.median(values[spike.start : spike.end]))
            severe = after - spike.level >= SIZABLE * abs(spike.level)
            outcome = f"and {after:.4g} since (median to step {last:,})"
        else:
            outcome = "at the end of the log: too near to say whether it recovers"
        evidence = (
            f"loss {spike.level:.4g} before step {first:,}, up to {spike.peak:.4g} ({spike.deviations:.0f} standard "
            f"deviations of the noise), {outcome}{_beside(run, spike.start)}"
        )
        yield lasts, Sign(SEVERITIES[lasts + severe], first, last, evidence)


def _beside(run: RunView, start: int) -> str:
    """What else happened where the loss rose: a resume, a leap of the learning rate or of the gradient."""
    steps = run["loss"].steps
    low, high = steps[max(0, start - 2)], steps[min(len(steps) - 1, start + 1)]
    rates, norms = (
        values[(where >= low) & (where <= high)] for where, values in (run["learning_rate"], run["grad_norm"])
    )
    words = ""
    if any(low <= seam <= high for seam in run.curves.seams):
        words += "; the run was resumed there"
    if len(rates) >= 2 and rates.max() > 1.3 * max(rates[0], 1e-300) and rates[0] > 0:
        words += f"; the learning rate goes from {rates[0]:.3g} to {rates.max():.3g}"
    if len(norms) and (usual := float(np.median(run["grad_norm"].values))) > 0 and norms.max() > 5 * usual:
        words += f"; gradient norm {norms.max():.3g}, usually {usual:.3g}"
    return words


def no_gradient(run: RunView) -> Iterator[Sign]:
    """Every gradient norm is 0."""
    steps, norms = run["grad_norm"]
    if run.no_gradient:
        evidence = f"the gradient norm is exactly 0 at all of {len(norms)} logged steps"
        yield Sign("error", int(steps[0]), int(steps[-1]), evidence)


def rises_in_few_points(run: RunView) -> Iterator[Sign]:
    """A log of few points whose loss rises, by Kendall's rank correlation."""
    steps, values = run["loss"]
    if run.no_gradient or run.is_policy or not 7 <= len(values) < ENOUGH or not values[0]:
        return
    edge = max(2, len(values) // 4)
    start, end = float(np.median(values[:edge])), float(np.median(values[-edge:]))
    p = float(stats.kendalltau(np.arange(len(values)), values, alternative="greater").pvalue)
    if p < 0.01 and end - start > 2 * SIZABLE * abs(start):
        evidence = (
            f"loss {start:.4g} to {end:.4g} over {len(values)} logged steps; that it rises by chance has p = {p:.0e}"
        )
        yield Sign("error", int(steps[0]), int(steps[-1]), evidence)


def never_falls(run: RunView) -> Iterator[Sign]:
    """The loss rises for good, ends where it began or above, or stays near guessing."""
    steps, values = run["loss"]
    if run.no_gradient or run.is_policy or len(values) < ENOUGH:
        return
    medians = block_medians(values, min(20, len(values) // 5))
    count = max(4, min(len(values) // 50, 50))
    start, end, lowest = float(np.median(values[:count])), float(medians[-2:].mean()), int(medians.argmin())
    error = 1.25 * run.noise * (1 / count + medians.size / (2 * len(values))) ** 0.5
    figures = f"loss {start:.4g} in the first {count} logged steps, {end:.4g} at the end, noise {run.noise:.2g}"
    first, last = int(steps[0]), int(steps[-1])
    if _rises_for_good(run, medians, start, error):
        step = int(steps[min(int(lowest * len(values) / medians.size), len(steps) - 1)])
        evidence = f"the loss rises: {medians[lowest]:.4g} at its lowest near step {step:,}, {figures}"
        yield Sign("error", step, last, evidence)
        return
    whole, size = trend(values), max(_FALL * abs(start), 4 * error)
    falls = whole.p_falls < 0.01 and whole.change < 0
    above = end > start + size
    if above or (start - medians[lowest] < size and not falls):
        # A trained model begins low and may have little to learn from such text.
        known = run.is_language_model and start < _GUESSING and not above
        # "No fall was shown" is less than "there is none": the bounds have to say that.
        flat = whole.low > -_FLAT * abs(start) or (run.is_language_model and end > _GUESSING)
        severity: Severity = "error" if above else "info" if known or not flat else "warning"
        evidence = f"{figures}; change over the run {whole.change:+.2g} ({whole.low:+.2g} to {whole.high:+.2g})"
        evidence += "; either the model knew such text before, or nothing is trained" if known else ""
        yield Sign(severity, first, last, evidence)
    elif run.is_language_model and end > _GUESSING and start - end < SIZABLE * start and len(values) >= 3 * ENOUGH:
        evidence = f"{figures}: a perplexity of {np.exp(end):,.0f} after the whole run is close to guessing"
        yield Sign("warning", first, last, evidence)


def _rises_for_good(run: RunView, medians: Values, start: float, error: float) -> bool:
    """Whether the loss ends clearly above its lowest block, and half of what follows that block does.

    `error` holds for independent noise. Where neighbours are correlated, the block medians of a loss that stands wander
    further than that. So without a spike the end must also lie four times as high as the blocks scatter around their trend.
    """
    values, lowest = run["loss"].values, int(medians.argmin())
    best, end, later = float(medians[lowest]), float(medians[-2:].mean()), medians[lowest + 1 :]
    if end - best <= max(4 * error, 0.05 * abs(best), (start - best) / 3):
        return False
    if len(later) < 3 or np.median(later) <= best + (end - best) / 4 or trend(values[len(values) // 2 :]).change <= 0:
        return False
    line = stats.theilslopes(later)
    scatter = MAD * np.median(np.abs(later - line.intercept - line.slope * np.arange(len(later))))
    return bool(run.rises or end - best > 4 * scatter)


def plateau(run: RunView) -> Iterator[Sign]:
    """The loss falls early and then stands, for at least the last 60 % of the run."""
    steps, values = run["loss"]
    if len(values) < 2 * ENOUGH or run.is_policy:
        return
    first = max(3, min(len(values) // 50, 20))
    start = float(np.median(values[:first]))
    for share in _SHARES:
        begin = max(first, int(share * len(values)))
        tail = values[begin:]
        level, rest = float(np.median(tail)), trend(tail)
        fall = start - level
        # Even at the bounds of the trend little is won: less than a tenth of the early fall, and of the level.
        least = min((0.1 if len(values) >= 5 * ENOUGH else 0.05) * fall, SIZABLE * abs(level))
        no_rise = rest.high < 0.15 * fall or rest.low < 0
        stands = rest.p_falls > 0.02 and rest.low > -least and no_rise
        if stands and fall >= max(_FALL * abs(start), 3 * run.noise):
            step = int(steps[begin])
            low = run.is_language_model and level < max(LOW, 0.05 * start)
            evidence = (
                f"loss {start:.4g} to {level:.4g} by step {step:,}, then {rest.change:+.2g} over the remaining {len(tail)} "
                f"logged steps ({rest.low:+.2g} to {rest.high:+.2g}){': nothing is left to learn' if low else ''}"
            )
            yield Sign("info" if low else "warning", step, int(steps[-1]), evidence)
            return
