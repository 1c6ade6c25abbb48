"""What a mixture asked for and gave over a run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_objectives.diagnostics.plot import Log, read_log
from hf_objectives.errors import FileFormatError
from hf_objectives.mixture.report import MixtureReport, SourceReport

_NO_MIXTURE = "the log has no 'mixture/<source>/share'; it is not of a run on a mixture"
# By source and figure, points (x, value).
_Series = dict[str, dict[str, list[tuple[float, float]]]]


def plot_mixture(log: str | Path | Log | Sequence[MixtureReport], output: str | Path = "mixture.png") -> Path:
    """Draw the share of each source, asked for and realised, and its passes.

    Args:
        log: a Trainer's `log_history`, a `trainer_state.json`, the folder that holds one, or reports of a mixture.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.

    Raises:
        FileFormatError: no log where `log` says, or one without a mixture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    reports = not isinstance(log, (str, Path)) and bool(log) and isinstance(log[0], MixtureReport)
    series, unit = _of_reports(log) if reports else _of_log(read_log(log))  # type: ignore[arg-type]
    if not series:
        raise FileFormatError(_NO_MIXTURE)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    shares, passes = figure.subplots(1, 2)
    for source, figures in series.items():
        x, realised = zip(*figures["share"], strict=True)
        (line,) = shares.plot(x, realised, label=source, marker="." if len(x) < 30 else "")
        shares.plot(*zip(*figures["asked"], strict=True), "--", color=line.get_color(), alpha=0.6)
        passes.plot(*zip(*figures["epochs"], strict=True), label=source, marker="." if len(x) < 30 else "")
    shares.set(
        title=f"Share of what was drawn{unit}, dashed as asked", xlabel="row" if reports else "step", ylim=(0, None)
    )
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    passes.set(title="Passes of each source", xlabel="row" if reports else "step", ylim=(0, None))
    for axes in (shares, passes):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def report_of_log(log: Log) -> MixtureReport:
    """What a run's last training log says of its mixture; `row` is the step.

    Raises:
        FileFormatError: the run was not on a mixture.
    """
    last = next((entry for entry in reversed(log) if any(key.startswith("mixture/") for key in entry)), None)
    if last is None:
        raise FileFormatError(_NO_MIXTURE)
    figures: dict[str, dict[str, Any]] = {}
    for key, value in last.items():
        if key.startswith("mixture/"):
            source, name = key.removeprefix("mixture/").rsplit("/", 1)
            figures.setdefault(source, {})[name] = value
    return MixtureReport(
        last["step"], "the mixture's unit", [SourceReport(name, **values) for name, values in figures.items()], "steps"
    )


def _of_reports(reports: Sequence[MixtureReport]) -> tuple[_Series, str]:
    series: _Series = {}
    for report in reports:
        for source in report:
            of = series.setdefault(source.name, {"share": [], "asked": [], "epochs": []})
            for name, points in of.items():
                points.append((report.row, getattr(source, name)))
    return series, f" ({reports[0].unit})"


def _of_log(log: Log) -> tuple[_Series, str]:
    series: _Series = {}
    for entry in log:
        for key, value in entry.items():
            if key.startswith("mixture/") and "step" in entry:
                source, name = key.removeprefix("mixture/").rsplit("/", 1)
                of = series.setdefault(source, {"share": [], "asked": [], "epochs": []})
                if name in of:
                    of[name].append((entry["step"], float(value)))
    return series, ""
