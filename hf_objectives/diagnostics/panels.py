"""What of one or several runs is drawn, panel by panel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hf_objectives.diagnostics.curves import Curves, Series

SMOOTHED_FROM = 20  #: points of a curve that gets a trend over it
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")  # told apart by all
_SOURCES_AT_MOST = 8
# Logs whose loss is no mean over tokens, so that its exponential is no perplexity.
_NO_LIKELIHOOD = ("rewards/", "reward", "kl", "accuracy", "eval_accuracy", "eval_rewards/")


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Attributes:
        series: its points.
        label: its name in a legend; "" for none.
        colour: as matplotlib takes it.
        held_out: of validation, drawn dashed and never smoothed.
        smooth: its trend is drawn over it.
        style: the line's, as matplotlib takes it.
    """

    series: Series
    label: str
    colour: str
    held_out: bool = False
    smooth: bool = True
    style: str = "-"


@dataclass
class Panel:
    """One part of the picture.

    Attributes:
        name: unlike all others.
        title: what it shows.
        lines: its curves.
        log: on a log scale; None where the values span decades.
        share: values are shares, from 0 to 1.
        legend: it has one of its own.
    """

    name: str
    title: str
    lines: list[Line] = field(default_factory=list)
    log: bool | None = False
    share: bool = False
    legend: bool = True


def panels_of(runs: list[Curves]) -> list[Panel]:
    """The panels that have something to show, the loss first."""
    several = len(runs) > 1
    loss = _both(runs, "loss", Panel("loss", "Loss", log=None))
    given = [run for run in runs if "perplexity" in run or "eval_perplexity" in run]
    perplexity = Panel("perplexity", "Perplexity" if given else "Perplexity, exp(loss)", log=True)
    _both([run if run in given else _exponential(run) for run in runs], "perplexity", perplexity)
    found = [loss, perplexity]
    for key, title, log in (
        ("learning_rate", "Learning rate", False),
        ("grad_norm", "Gradient norm", None),
        ("tokens_per_second", "Tokens per second", False),
    ):
        panel = Panel(key, title, log=log)
        for i, run in enumerate(runs):
            panel.lines.append(Line(run.get(key), run.name if several else title, colour_of(i)))
        if key == "learning_rate":
            panel.log = _far_apart(panel.lines)
            panel.lines = [Line(line.series, line.label, line.colour, smooth=False) for line in panel.lines]
        found.append(panel)
    found += _by_source(runs)
    for panel in found:
        if several and panel.name.startswith("source") and max(len(line.series.steps) for line in panel.lines) < 2:
            panel.lines = []  # lone points of runs side by side compare nothing
        panel.lines = [line for line in panel.lines if np.isfinite(line.series.values).any()]
        panel.legend = not several  # one for all panels, where colours stand for runs
    # A loss that is NaN throughout still has its place: there the findings say so.
    return [panel for panel in found if panel.lines or panel.name == "loss"]


def _far_apart(lines: Sequence[Line]) -> bool:
    """Whether the greatest value of one curve lies so far below another's that it would look like zero."""
    peaks = [float(np.nanmax(line.series.values)) for line in lines if np.isfinite(line.series.values).any()]
    peaks = [peak for peak in peaks if 0 < peak < np.inf]
    return bool(peaks) and max(peaks) > 10 * min(peaks)


def _both(runs: Sequence[Curves], key: str, panel: Panel) -> Panel:
    """Training and validation of every run; one run tells them apart by colour, several by dashes."""
    for i, run in enumerate(runs):
        several = len(runs) > 1
        panel.lines.append(Line(run.get(key), run.name if several else "training", colour_of(i)))
        label = f"{run.name}, validation" if several else "validation"
        panel.lines.append(Line(run.get(f"eval_{key}"), label, colour_of(i if several else 1), held_out=True))
    return panel


def _exponential(run: Curves) -> Curves:
    if any(key.startswith(_NO_LIKELIHOOD) for key in run.series):
        return Curves(run.name)
    with np.errstate(over="ignore"):
        made = {
            key: Series(run.get(of).steps, np.exp(run.get(of).values))
            for key, of in (("perplexity", "loss"), ("eval_perplexity", "eval_loss"))
        }
    return Curves(run.name, made)


def _by_source(runs: list[Curves]) -> list[Panel]:
    """Perplexity and share of the sources: one panel for all of a run; one a source where runs are compared."""
    panels: list[Panel] = []
    for kind, names, held in (
        ("source", _names(runs, "eval_", "_perplexity"), True),
        ("share", _names(runs, "mixture/", "/share"), False),
    ):
        title = "Validation perplexity by source" if held else "Share of what was drawn, dashed as asked"
        panel = Panel(kind, title, log=held, share=not held)
        for n, source in enumerate(names[:_SOURCES_AT_MOST]):
            if len(runs) > 1:
                title = f"Perplexity, {source}" if held else f"Share, {source}"
                panel = Panel(kind if n == 0 else f"{kind} {source}", title, log=held, share=not held)
            for i, run in enumerate(runs):
                label, colour = (run.name, colour_of(i)) if len(runs) > 1 else (source, colour_of(n))
                if held:
                    panel.lines.append(Line(run.get(f"eval_{source}_perplexity"), label, colour, held_out=True))
                    continue
                panel.lines.append(Line(run.get(f"mixture/{source}/share"), label, colour, smooth=False))
                asked = run.get(f"mixture/{source}/asked")
                panel.lines.append(Line(asked, "", colour, smooth=False, style="--"))
            if len(runs) > 1:
                panels.append(panel)
        if len(names) > _SOURCES_AT_MOST:
            panel.title += f" (the first {_SOURCES_AT_MOST} of {len(names)})"
        if len(runs) == 1:
            panels.append(panel)
    return panels


def _names(runs: Iterable[Curves], start: str, end: str) -> list[str]:
    keys = {key for run in runs for key in run.series if key.startswith(start) and key.endswith(end)}
    names = sorted(key[len(start) : -len(end)] for key in keys if len(key) > len(start) + len(end))
    return [name for name in names if not name.startswith("reference_")]  # DPO's, which stays as it is


def colour_of(i: int) -> str:
    """The colour of the i-th run or source, again from the first after eight."""
    return _PALETTE[i % len(_PALETTE)]


def spans_decades(curves: Sequence[NDArray[np.float64]]) -> bool:
    """Whether curves, float64 [points] each, leap so far that a linear scale would show nothing else."""
    values = np.concatenate([*curves, np.zeros(0)])
    finite = values[np.isfinite(values)]
    # A loss of 0.0 is what the Trainer logs in place of NaN, so that a few zeros are no obstacle.
    positive = finite[finite > 0]
    return len(positive) > 0.5 * len(finite) and float(positive.max()) > 30 * float(np.median(positive))
