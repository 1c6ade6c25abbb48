"""Draw panels with matplotlib: lines and their trend, axes, findings; and write the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.panels import FINDING_COLOURS, Line, Panel, colour_of, shown_in
from hf_objectives.errors import ConfigError
from hf_objectives.inspection import Finding, visible

FORMATS = ("png", "svg", "pdf")
BINS = 1200  # across a panel, about its pixels
_SMOOTHED_FROM = 20  # points of a curve that gets a trend over it
_MARKS = 12  # findings


# -- long and noisy curves -----------------------------------------------------------------------------------------


def envelope(
    steps: NDArray[np.int64], values: NDArray[np.float64], bins: int = BINS
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The least and the greatest value in each of `bins` equal spans of steps; the curve itself where it has no more.

    Infinities become NaN. A NaN stays, as a gap, where a span has nothing else. Shapes: [points], and [at most 2 * bins].
    """
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) <= 2 * bins:
        return steps, values
    spans = _spans(steps, bins)
    finite = pd.Series(values).dropna().groupby(spans[~np.isnan(values)])
    gaps = np.flatnonzero(np.append(True, np.diff(spans) > 0) & ~np.isin(spans, [*finite.groups]))
    kept = np.unique(np.concatenate([finite.idxmin(), finite.idxmax(), gaps])).astype(np.int64)
    return steps[kept], values[kept]


def trend(
    steps: NDArray[np.int64], values: NDArray[np.float64], *, geometric: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The moving median of a curve over a tenth of it, and a short moving mean over that; float64 [at most points].

    A lone spike leaves no mark on a median, and a leap stays a leap. Windows are centred and narrower towards both ends, so
    that the trend does not lag behind. What is not finite is a gap. With `geometric` it is the trend of the logarithms, as
    perplexity needs. A long curve is first reduced to the means of its spans.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log(values) if geometric else np.asarray(values, float)
    points = pd.DataFrame({"step": steps.astype(float), "y": np.where(np.isfinite(y), y, np.nan)})
    if len(points) > 2 * BINS:
        points = points.groupby(_spans(steps, BINS)).mean()
    x, y = points["step"].to_numpy(), points["y"].to_numpy()
    half = max(1, len(y) // 20)
    smooth = _moving(np.mean, _moving(np.median, y, half), half // 4)
    with np.errstate(over="ignore"):
        return x, np.exp(smooth) if geometric else smooth


def _moving(statistic: Callable[..., Any], y: NDArray[np.float64], half_width: int) -> NDArray[np.float64]:
    result, good = np.full(len(y), np.nan), np.isfinite(y)
    for i in np.flatnonzero(good).tolist():
        half = min(half_width, i, len(y) - 1 - i)
        window = slice(i - half, i + half + 1)
        result[i] = statistic(y[window][good[window]])
    return result


def _spans(steps: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    length = max(1, int(steps[-1] - steps[0]))
    return np.minimum((steps - steps[0]) * bins // length, bins - 1)


# -- lines and panels ----------------------------------------------------------------------------------------------


def draw_line(axes: Any, line: Line, *, geometric: bool = False) -> Any:
    """Draw a curve; a long one pale as it was logged, with its trend over it. Returns the `Line2D` for a legend."""
    style: Any = (0, line.dashes) if line.dashes else "-"
    look: dict[str, Any] = {"color": line.colour, "linestyle": style, "linewidth": 1.3}
    points = int(np.isfinite(line.series.values).sum())
    if line.held_out:
        look |= {"marker": "o" if len(line.series.steps) <= 40 else "", "markersize": 3, "zorder": 3}
    elif line.smooth and points >= _SMOOTHED_FROM:
        axes.plot(*envelope(*line.series), color=line.colour, alpha=0.4, linewidth=0.8)
        return axes.plot(*trend(*line.series, geometric=geometric), **{**look, "linewidth": 1.5, "zorder": 2.5})[0]
    else:
        look |= {"marker": "o" if points < 3 else "", "markersize": 4}  # a line needs two points
    return axes.plot(*envelope(*line.series), **look)[0]


def draw_keys(axes: Any, curves: Curves, labels: Mapping[str, str], title: str) -> None:
    """Draw curves of a log by key under their labels; those of `eval_` dashed, those that the log lacks not at all."""
    for i, (key, label) in enumerate(labels.items()):
        if key in curves:
            held_out = key.startswith("eval_")
            draw_line(axes, Line(curves.get(key), label, colour_of(i), held_out)).set_label(label)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)


def draw_panel(axes: Any, panel: Panel, *, legend: bool = True) -> None:
    """Draw a panel with its scale, title and legend on matplotlib's axes."""
    from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter

    drawn = [(draw_line(axes, line, geometric=panel.log is True), line.label) for line in panel.lines]
    values = np.concatenate([line.series.values for line in panel.lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    log = bool(_spans_decades(values) if panel.log is None else panel.log) and bool((values > 0).any())
    if log:
        axes.set_yscale("log")
        # Plain numbers instead of powers of ten, and between the decades only where the range is short.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.5)))
    _widen(axes, log=log)
    if log and panel.least is not None and (values >= panel.least).all():
        axes.set_ylim(bottom=max(panel.least, axes.get_ylim()[0]))
    if panel.name == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0)
    if panel.name == "learning_rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        # On a log scale the last steps of a schedule, which ends at 0, would take all the room.
        axes.set_ylim(bottom=values.max() / 1e4 if log else min(0.0, axes.get_ylim()[0]))
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    axes.set_title(plain(panel.title + (" (log scale)" if log else "")), fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    handles = {plain(label): handle for handle, label in drawn if label}
    if len(handles) > 1 and legend:
        columns = 1 + (len(handles) > 5)
        box = axes.legend(handles.values(), handles, frameon=False, fontsize=8, ncols=columns)
        box.set_in_layout(False)  # wide names may lie over the curves, and take no room from them


def _spans_decades(values: NDArray[np.float64]) -> bool:
    """Whether finite values leap so far that a linear scale would show nothing else."""
    # A loss of 0.0 is what the Trainer logs in place of NaN, so that a few zeros are no obstacle.
    positive = values[values > 0]
    return len(positive) > 0.5 * len(values) and float(positive.max()) > 30 * float(np.median(positive))


def _widen(axes: Any, *, log: bool) -> None:
    """Give room to a curve that is constant but for rounding, whose axis would have one number at all of its ticks."""
    low, high = axes.get_ylim()
    if high - low < 1e-9 * max(abs(low), abs(high)):
        middle = (low + high) / 2
        margin = 0.05 * abs(middle)
        axes.set_ylim((middle / 1.1, middle * 1.1) if log else (middle - margin, middle + margin))


def same_steps(axes: Iterable[Any], runs: Sequence[Curves]) -> None:
    """Give all panels the same steps, so that what happens at once stands below each other."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    steps = [series.steps for run in runs for series in run.series.values()]
    low, high = min(int(s[0]) for s in steps), max(int(s[-1]) for s in steps)
    margin = max(0.5, 0.02 * (high - low))
    for panel in axes:
        panel.set_xlim(low - margin, high + margin)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlabel("step", fontsize=8)


def mark_findings(axes: Mapping[str, Any], findings: Sequence[Finding], *, bands: bool = True) -> None:
    """Mark the first findings by number in the panels that show them: a line at the step, a band over its steps.

    `axes` are by name of the panel, with the limits of their steps set.
    """
    placed: dict[str, list[tuple[float, int]]] = {name: [] for name in axes}  # step and row of the numbers
    shaded = set()
    for number, finding in enumerate(findings[:_MARKS], 1):
        colour = FINDING_COLOURS[finding.severity][0]
        for name in shown_in(finding.kind, axes):
            panel = axes[name]
            low, high = panel.get_xlim()
            x = min(max(finding.step, low), high)
            band = (name, finding.step, finding.last_step)
            if bands and finding.last_step > finding.step and band not in shaded:
                shaded.add(band)
                panel.axvspan(x, min(finding.last_step, high), color=colour, alpha=0.1, linewidth=0, zorder=0)
            panel.axvline(x, color=colour, linewidth=1.0, alpha=0.5, zorder=1)
            near = [row for other, row in placed[name] if abs(other - x) < 0.05 * (high - low)]
            row = next((row for row in range(8) if row not in near), len(near) % 8)
            placed[name].append((x, row))
            circle = {"boxstyle": "circle,pad=0.25", "facecolor": colour, "edgecolor": "none"}
            text = panel.text(x, 0.96 - 0.11 * row, str(number), transform=panel.get_xaxis_transform(), bbox=circle)
            text.set(fontsize=8, color="white", ha="center", va="center", zorder=5)


def plain(text: str) -> str:
    """A user's text as it stands: no mathematics between dollars, and no label that a legend would hide."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# -- the file ------------------------------------------------------------------------------------------------------


def check_ending(output: str | Path) -> None:
    """Refuse a path whose ending names no format of a picture (ConfigError)."""
    ending = Path(output).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise ConfigError(f"{output}: a picture ends in {', '.join(f'.{name}' for name in FORMATS)}; found {ending!r}")


def save(figure: Any, output: str | Path) -> Path:
    """Write a matplotlib figure, and make the folder for it; returns its path."""
    check_ending(output)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
