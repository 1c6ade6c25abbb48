"""What a mixture asked for and gave over a run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.diagnostics.curves import Curves, Log, Series, read_curves
from hf_objectives.diagnostics.plot import save
from hf_objectives.errors import FileFormatError
from hf_objectives.mixture import MixtureReport, SourceReport

_NO_MIXTURE = "the log has no 'mixture/<source>/share'; it is not of a run on a mixture"
_FIGURES = {"asked": float, "share": float, "tokens": int, "examples": int, "epochs": float}
_EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))
# By source and figure.
_Sources = dict[str, dict[str, Series]]


def plot_mixture(log: str | Path | Log | Curves | Sequence[MixtureReport], output: str | Path = "mixture.png") -> Path:
    """Draw the share of each source, asked for and realised, and its passes.

    Args:
        log: what `read_curves` takes, or reports of a mixture.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.

    Raises:
        FileFormatError: no log where `log` says, or one without a mixture.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    if isinstance(log, Sequence) and not isinstance(log, str) and log and isinstance(log[0], MixtureReport):
        sources, unit, over = _of_reports(log), f" ({log[0].unit})", "row"  # type: ignore[arg-type]
    else:
        sources, unit, over = _of_log(log), "", "step"  # type: ignore[arg-type]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shares, passes = figure.subplots(1, 2)
    for source, figures in sources.items():
        share = figures["share"]
        dots = "." if len(share.steps) < 30 else ""
        (line,) = shares.plot(*share, label=source, marker=dots)
        shares.plot(*figures.get("asked", _EMPTY), "--", color=line.get_color(), alpha=0.6)
        passes.plot(*figures.get("epochs", _EMPTY), label=source, marker=dots)
    shares.set(title=f"Share of what was drawn{unit}, dashed as asked", xlabel=over, ylim=(0, None))
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    passes.set(title="Passes of each source", xlabel=over, ylim=(0, None))
    for axes in (shares, passes):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return save(figure, output)


def report_of_log(log: str | Path | Log | Curves) -> MixtureReport:
    """What a run's log last says of its mixture; `row` is the step.

    Args:
        log: what `read_curves` takes.

    Raises:
        FileFormatError: no log where `log` says, the run was not on a mixture, or a figure of a source is missing.
    """
    sources, last = [], 0
    for name, figures in _of_log(log).items():
        if missing := [one for one in _FIGURES if one not in figures]:
            raise FileFormatError(f"the log has no 'mixture/{name}/{missing[0]}'; expected {', '.join(_FIGURES)}")
        values: dict[str, Any] = {one: number(figures[one].values[-1]) for one, number in _FIGURES.items()}
        sources.append(SourceReport(name, **values))
        last = max(last, int(figures["share"].steps[-1]))
    return MixtureReport(last, "the mixture's unit", sources, "steps")


def _of_reports(reports: Sequence[MixtureReport]) -> _Sources:
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for report in reports:
        for source in report:
            of = points.setdefault(source.name, {name: [] for name in ("share", "asked", "epochs")})
            for name, given in of.items():
                given.append((report.row, getattr(source, name)))
    return {
        source: {name: Series(np.array([x for x, _ in of]), np.array([y for _, y in of])) for name, of in named.items()}
        for source, named in points.items()
    }


def _of_log(log: str | Path | Log | Curves) -> _Sources:
    sources: _Sources = {}
    for key, series in read_curves(log).series.items():
        source, _, name = key.removeprefix("mixture/").rpartition("/")
        if key.startswith("mixture/") and source:
            sources.setdefault(source, {})[name] = series
    sources = {source: figures for source, figures in sources.items() if "share" in figures}
    if not sources:
        raise FileFormatError(_NO_MIXTURE)
    return sources
