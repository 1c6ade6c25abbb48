"""What is wrong with a run, from its log: findings with evidence and advice.

The signatures of a language model's loss (a plateau, a spike that recovers or lasts, overfitting, a loss that does not
fall), of its gradients and schedule, of its data, and of preference and reinforcement learning. What is noise is measured in
each run, by medians; from which size on something matters (a tenth of the loss, a thirtyfold gradient, 0.1 nats) is the same
for all runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hf_objectives.diagnostics import detect_alignment, detect_data, detect_evaluation, detect_loss, detect_optimizer
from hf_objectives.diagnostics.curves import Curves, Log, read_runs
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection import SEVERITIES, Finding

logger = logging.getLogger(__name__)
Detector = Callable[[Curves], Iterable[Finding]]
#: What finds which kinds; each is a function of a run's curves.
DETECTORS: dict[str, Detector] = {
    "non_finite": detect_optimizer.non_finite,
    "spikes": detect_loss.spikes,
    "not_decreasing": detect_loss.not_decreasing,
    "plateau": detect_loss.plateau,
    "overfitting": detect_evaluation.overfitting,
    "too_good": detect_evaluation.too_good,
    "gradient_explosion": detect_optimizer.gradient_explosion,
    "schedule_fault": detect_optimizer.schedule_fault,
    "sawtooth": detect_data.sawtooth,
    "few_supervised_tokens": detect_data.few_supervised_tokens,
    "mixture_drift": detect_data.mixture_drift,
    "falling_chosen": detect_alignment.falling_chosen,
    "reward_hacking": detect_alignment.reward_hacking,
    "entropy_collapse": detect_alignment.entropy_collapse,
    "length_growth": detect_alignment.length_growth,
}


def diagnose(log: str | Path | Log | Curves | Sequence[str | Path]) -> list[Finding]:
    """Look at the log of one or several runs.

    Args:
        log: what `read_runs` takes: a path, a Trainer's `log_history`, or several paths.

    Returns:
        Findings, the gravest first and those of one severity by step; none for a healthy run. Severity "info" is worth
        knowing and no fault.

    Raises:
        FileFormatError: there is no log, nothing in it can be read, or no curve has two points.
        ConfigError: a package is missing that reads it.
    """
    runs = read_runs(log)
    found = []
    points = [max(len(series.steps) for series in run.series.values()) for run in runs]
    if max(points) < 2:
        raise FileFormatError(f"{runs[0].name}: one point is no curve; expected at least two logged steps")
    for run, longest in zip(runs, points, strict=True):
        if longest < 2:
            logger.warning("%s: one point is no curve; it was not judged", run.name)
            continue
        name = run.name if len(runs) > 1 else ""
        found += [replace(finding, run=name) for detector in DETECTORS.values() for finding in detector(run)]
    return sorted(_without_echoes(found), key=lambda one: (one.run, -SEVERITIES.index(one.severity), one.step))


def nothing_found(run: Curves) -> str:
    """What it means that `diagnose` found nothing in a run: that it is sound only where there was enough to judge."""
    points, needed = len(run.get("loss").steps), detect_loss.ENOUGH
    if not points:
        return "Nothing was found, but the log has no training loss to judge."
    if points < needed:
        return f"Nothing was found, but there are too few points to judge most things ({points}; {needed} are needed)."
    return "Nothing is wrong that a log can show."


def _without_echoes(found: list[Finding]) -> list[Finding]:
    """Less of what another finding says better: a run that is NaN, or that blew up, does not "plateau" after it."""
    kept = []
    for one in found:
        of_run = [other for other in found if other.run == one.run]
        broken = [
            other for other in of_run if other.kind in ("non_finite", "spike_sustained") and other.severity == "error"
        ]
        if one.kind in ("plateau", "not_decreasing", "sawtooth") and any(
            other.step <= one.last_step or other.kind == "non_finite" for other in broken
        ):
            continue
        if one.kind == "plateau" and any(other.kind == "not_decreasing" for other in of_run):
            continue
        if one.kind in ("plateau", "not_decreasing") and any(other.kind == "sawtooth" for other in of_run):
            continue
        if one.kind == "spike_recovered" and any(other.kind == "sawtooth" for other in of_run):
            one = replace(one, severity="info")  # the teeth
        kept.append(one)
    return kept
