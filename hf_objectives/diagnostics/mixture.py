"""Draw what a mixture asked for and gave over a run, and read its last report from the log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_objectives.diagnostics.curves import Curves, Log, Series, read_curves
from hf_objectives.diagnostics.drawing import save
from hf_objectives.errors import FileFormatError
from hf_objectives.mixture import MixtureReport, SourceReport

_FIGURES = {"asked": float, "share": float, "tokens": int, "examples": int, "epochs": float}


def plot_mixture(log: str | Path | Log | Curves | Sequence[MixtureReport], output: str | Path = "mixture.png") -> Path:
    """Draw the share of each source, asked for and realised, and its epochs.

    Args:
        log: what `read_curves` takes, or reports of a mixture.
        output: the picture, whose path is returned; its ending names the format (png, svg, pdf).

    Raises:
        FileFormatError: no log where `log` says, or one without a mixture.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    unit, over = "", "step"
    if isinstance(log, Sequence) and not isinstance(log, str) and log and isinstance(log[0], MixtureReport):
        unit, over = f" ({log[0].unit})", "row"
        log = [{"step": report.row, **report.metrics()} for report in log]  # type: ignore[union-attr]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shares, epochs = figure.subplots(1, 2)
    for source, series in _sources_of(log).items():  # type: ignore[arg-type]
        marker = "." if len(series["share"].steps) < 30 else ""
        (line,) = shares.plot(*series["share"], label=source, marker=marker)
        if "asked" in series:
            shares.plot(*series["asked"], "--", color=line.get_color(), alpha=0.6)
        if "epochs" in series:
            epochs.plot(*series["epochs"], color=line.get_color(), label=source, marker=marker)
    shares.set(title=f"Share of what was drawn{unit}, dashed as asked")
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    epochs.set(title="Epochs of each source")
    for axes in (shares, epochs):
        axes.set(xlabel=over, ylim=(0, None))
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
    for name, series in _sources_of(log).items():
        if missing := [figure for figure in _FIGURES if figure not in series]:
            raise FileFormatError(f"the log has no 'mixture/{name}/{missing[0]}'; expected {', '.join(_FIGURES)}")
        values: dict[str, Any] = {figure: number(series[figure].values[-1]) for figure, number in _FIGURES.items()}
        sources.append(SourceReport(name, **values))
        last = max(last, int(series["share"].steps[-1]))
    return MixtureReport(last, "the mixture's unit", sources, "steps")


def _sources_of(log: str | Path | Log | Curves) -> dict[str, dict[str, Series]]:
    """The curves of a mixture by source and figure, from the keys `mixture/<source>/<figure>`."""
    sources: dict[str, dict[str, Series]] = {}
    for key, series in read_curves(log).series.items():
        source, _, figure = key.removeprefix("mixture/").rpartition("/")
        if key.startswith("mixture/") and source:
            sources.setdefault(source, {})[figure] = series
    sources = {source: series for source, series in sources.items() if "share" in series}
    if not sources:
        raise FileFormatError("the log has no 'mixture/<source>/share'; it is not of a run on a mixture")
    return sources
