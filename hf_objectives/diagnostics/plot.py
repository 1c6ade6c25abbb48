"""Training curves as a picture: one run or several over each other, with what is wrong marked where it is."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.diagnostics.curves import Curves, Log, read_curves, read_runs
from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.diagnostics.panels import (
    FINDING_COLOURS,
    SMOOTHED_FROM,
    Line,
    Panel,
    colour_of,
    dashes_of,
    panels_of,
    shortened,
    shown_in,
    spans_decades,
)
from hf_objectives.diagnostics.reduction import reduce_points, smooth_points
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.inspection import SEVERITIES, Finding, visible

One = str | Path | Log | Curves
FORMATS = ("png", "svg", "pdf")
_MARKS, _LISTED = 12, 8
_TEXT, _LINE_HEIGHT = "findings", 0.17  # inches
_BANDS_UP_TO = 16  # runs; the bands of more would lie over all that is drawn


def plot_training_metrics(
    log: One | Sequence[One] | Mapping[str, One],
    output: str | Path = "training_curves.png",
    *,
    findings: Sequence[Finding] | None = None,
) -> Path:
    """Draw what the log has of loss, perplexity, learning rate, gradient norm, tokens a second, rewards, and sources.

    Training is drawn pale as logged with its moving median over it, validation dashed. Perplexity is on a log scale; where
    a log of a language model has none it is exp(loss). Logs of a million lines are drawn by the extremes of each pixel.

    Args:
        log: what `read_curves` takes: a `trainer_state.json`, a run's folder, a Trainer's `log_history`, `Curves`, ...; or
            several, as a list or by name.
        output: the picture; its ending names the format (png, svg, pdf).
        findings: what to mark; by default what `diagnose` finds. An empty list marks nothing.

    Returns:
        The path of the picture.

    Raises:
        FileFormatError: no log where `log` says, or a log with nothing that is drawn.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure

    _check_ending(output)
    runs = _runs(log)
    for run in runs:
        if not panels_of([run]):
            raise FileFormatError(
                f"{run.name} has neither a 'loss' nor an 'eval_loss', nor anything else that is drawn; it has "
                f"{', '.join(sorted(run.series)[:8])}"
            )
    panels = panels_of(runs)
    found = _diagnosed(runs) if findings is None else list(findings)
    found.sort(key=lambda one: (-SEVERITIES.index(one.severity), one.step))
    columns = 3 if len(panels) > 4 else min(2, len(panels))
    width = 4.9 * columns + (1.5 if columns == 1 else 0)
    lines = _listing(found, several=len(runs) > 1, characters=int(width * 14.5))
    # A figure of its own, not pyplot's: no global state, no window, safe beside a user's own plots.
    figure = Figure(layout="constrained")
    held_out = any(line.held_out for panel in panels for line in panel.lines)
    title_height = _title(figure, runs, width, held_out=held_out)
    axes = _grid(figure, panels, columns, width, title_height, len(lines))
    for panel in panels:
        _draw_panel(axes[panel.name], panel)
    _same_steps([axes[panel.name] for panel in panels], runs)
    for run in runs:
        for seam in run.seams:
            axes[panels[0].name].axvline(seam, color="black", linewidth=0.7, linestyle=":", alpha=0.6)
    _mark({panel.name: axes[panel.name] for panel in panels}, found, bands=len(runs) <= _BANDS_UP_TO)
    for i, (line, colour) in enumerate(lines):
        at = 1 - (i + 0.5) / len(lines)
        axes[_TEXT].text(0, at, line, color=colour, fontsize=8, va="center", parse_math=False)
    return save(figure, output)


def _grid(
    figure: Any, panels: Sequence[Panel], columns: int, width: float, title_height: float, lines: int
) -> dict[str, Any]:
    """Axes by panel, and below them those of the findings, in a figure that is high enough for title and text, too."""
    rows, height = -(-len(panels) // columns), 3.1
    # Cells that are left over widen the first panel, which is the loss.
    spare = rows * columns - len(panels)
    cells = [panels[0].name] * (1 + spare) + [panel.name for panel in panels[1:]]
    mosaic = [cells[i * columns : (i + 1) * columns] for i in range(rows)]
    ratios = [height] * rows
    if lines:
        mosaic.append([_TEXT] * columns)
        ratios.append(_LINE_HEIGHT * lines)
    figure.set_size_inches(width, sum(ratios) + title_height)
    axes = figure.subplot_mosaic(mosaic, height_ratios=ratios)
    if lines:
        axes[_TEXT].axis("off")
    return dict(axes)


# -- what is drawn -----------------------------------------------------------------------------------------------


def _runs(log: Any) -> list[Curves]:
    if isinstance(log, Mapping):
        return [_renamed(_one(one), str(name)) for name, one in log.items()] or _none()
    if isinstance(log, (str, Path, Curves)):
        return read_runs(log)
    if not log:
        return _none()
    if not isinstance(log, Sequence) or any(isinstance(one, Mapping) for one in log):
        return [_one(log)]
    if all(isinstance(one, (str, Path)) for one in log):
        return read_runs(log)
    named = (str, Path, Curves)  # by themselves
    return [_one(one) if isinstance(one, named) else _renamed(_one(one), f"run {i}") for i, one in enumerate(log, 1)]


def _one(log: Any) -> Curves:
    if not isinstance(log, (str, Path, Curves, Sequence)):
        raise FileFormatError(f"{log!r:.60} is no log; expected a path, a Trainer's log_history, or several of them")
    return read_curves(log)


def _none() -> list[Curves]:
    raise FileFormatError("no log was given; nothing to draw")


def _renamed(run: Curves, name: str) -> Curves:
    return Curves(name, run.series, run.notes, run.seams)


def _diagnosed(runs: list[Curves]) -> list[Finding]:
    found: list[Finding] = []
    for run in runs:
        # One point can be drawn, and has no course that could be wrong.
        if max(len(one.steps) for one in run.series.values()) > 1:
            found += [replace(one, run=run.name) for one in diagnose(run)]
    return found


# -- drawing -----------------------------------------------------------------------------------------------------


def _draw_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter

    handles = []
    for line in panel.lines:
        (drawn,) = draw_line(axes, line, geometric=panel.log is True)
        if line.label:
            handles.append((drawn, _plain(line.label)))
    values = np.concatenate([line.series.values for line in panel.lines] or [np.ones(1)])
    log = spans_decades([values]) if panel.log is None else panel.log
    if log and (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")
        # Plain numbers instead of powers of ten, and between the decades only where the range is short.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.5)))
    _widen(axes, log=axes.get_yscale() == "log")
    if log and panel.least is not None and (values[np.isfinite(values)] >= panel.least).all():
        axes.set_ylim(bottom=max(panel.least, axes.get_ylim()[0]))
    if panel.name == "tokens_per_second":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.name == "learning_rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        # On a log scale the last steps of a schedule, which ends at 0, would take all the room.
        axes.set_ylim(bottom=values[np.isfinite(values)].max() / 1e4 if log else min(0.0, axes.get_ylim()[0]))
    if panel.share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    if panel.name == "tokens_per_second":
        axes.set_ylim(bottom=0)
    axes.set_title(_plain(panel.title + (" (log scale)" if log else "")), fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(handles) > 1 and panel.legend:
        axes.legend(*zip(*handles, strict=True), frameon=False, fontsize=8, ncols=1 + (len(handles) > 5))


def _widen(axes: Any, *, log: bool) -> None:
    """Room about a curve that is constant but for rounding, whose axis would have one number at all of its ticks."""
    low, high = axes.get_ylim()
    if high - low < 1e-9 * max(abs(low), abs(high)):
        middle = (low + high) / 2
        axes.set_ylim(
            (middle / 1.1, middle * 1.1) if log else (middle - 0.05 * abs(middle), middle + 0.05 * abs(middle))
        )


def draw_line(axes: Any, line: Line, *, geometric: bool = False) -> Any:
    """Draw a curve, a long one pale as it was logged with its trend over it.

    Args:
        axes: matplotlib's.
        line: what to draw.
        geometric: the trend is that of the logarithms.

    Returns:
        What stands for the curve in a legend: a list of one `Line2D`.
    """
    steps, values = line.series
    style: Any = (0, line.dashes) if line.dashes else "-"
    shared = {"color": line.colour, "linestyle": style}
    reduced, finite = reduce_points(steps, values), int(np.isfinite(values).sum())
    if line.held_out:
        return axes.plot(
            *reduced, **shared, marker="o" if len(steps) <= 40 else "", markersize=3, linewidth=1.3, zorder=3
        )
    if not line.smooth or finite < SMOOTHED_FROM:
        return axes.plot(*reduced, **shared, marker="o" if finite < 3 else "", markersize=4, linewidth=1.3)
    axes.plot(*reduced, color=line.colour, alpha=0.28, linewidth=0.8)
    return axes.plot(*smooth_points(steps, values, geometric=geometric), **shared, linewidth=1.5, zorder=2.5)


def _same_steps(axes: list[Any], runs: list[Curves]) -> None:
    """All panels over the same steps, so that what happens at once stands below each other."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    series = [one.steps for run in runs for one in run.series.values()]
    low, high = min(int(s[0]) for s in series), max(int(s[-1]) for s in series)
    margin = max(0.5, 0.02 * (high - low))
    for one in axes:
        one.set_xlim(low - margin, high + margin)
        one.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        one.xaxis.set_major_formatter(EngFormatter(sep=""))
        one.set_xlabel("step", fontsize=8)


# -- findings ----------------------------------------------------------------------------------------------------


def _mark(axes: Mapping[str, Any], found: Sequence[Finding], *, bands: bool = True) -> None:
    """The gravest findings, each a band or a line with its number in the panels that show it."""
    placed: dict[str, list[tuple[float, int]]] = {}
    shaded = set()
    for number, one in enumerate(found[:_MARKS], 1):
        colour = FINDING_COLOURS[one.severity][0]
        for name in shown_in(one.kind, axes):
            panel = axes[name]
            low, high = panel.get_xlim()
            at = min(max(one.step, low), high)
            band = (name, one.step, one.last_step)
            if bands and one.last_step > one.step and band not in shaded:
                shaded.add(band)
                panel.axvspan(at, min(one.last_step, high), color=colour, alpha=0.1, linewidth=0, zorder=0)
            panel.axvline(at, color=colour, linewidth=1.1, alpha=0.8, zorder=1)
            near = [height for x, height in placed.setdefault(name, []) if abs(x - at) < 0.05 * (high - low)]
            free = next((height for height in range(8) if height not in near), len(near) % 8)
            placed[name].append((at, free))
            panel.text(
                at, 0.96 - 0.11 * free, str(number), transform=panel.get_xaxis_transform(), fontsize=8,
                color="white", ha="center", va="center", zorder=5,
                bbox={"boxstyle": "circle,pad=0.25", "facecolor": colour, "edgecolor": "none"},
            )  # fmt: skip


def _listing(found: Sequence[Finding], *, several: bool, characters: int) -> list[tuple[str, str]]:
    """The findings in words, each line with its colour."""
    lines = []
    for number, one in enumerate(found[:_LISTED], 1):
        who = f"{one.run}, " if several and one.run else ""
        text = visible(f"{number}  {one.kind} ({who}{one.steps}): {one.evidence}")
        for i, part in enumerate(textwrap.wrap(text, characters - 4, max_lines=2, placeholder=" ...")):
            lines.append((("    " if i else "") + part, FINDING_COLOURS[one.severity][0]))
    if len(found) > _LISTED:
        lines.append((f"and {len(found) - _LISTED} more", "black"))
    return lines


def _title(figure: Any, runs: Sequence[Curves], width: float, *, held_out: bool) -> float:
    """The name of one run; for several, which line is whose and what the dashes mean. Returns its height in inches."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(_plain(runs[0].name), fontsize=11, x=0.01, ha="left")
        return 0.45
    names = shortened([run.name for run in runs])
    handles = []
    for i, name in enumerate(names):
        style: Any = (0, dashes_of(i)) if dashes_of(i) else "-"
        handles.append(Line2D([], [], color=colour_of(i), linewidth=2, linestyle=style, label=_plain(name)))
    if held_out:
        style = (0, dashes_of(0, broken=True))
        handles.append(Line2D([], [], color="black", linestyle=style, marker="o", markersize=3, label="validation"))
    handle_length = 2.0 + 2.0 * (len(runs) > 8)
    widest = max(len(name) for name in names) + 6 + handle_length
    columns = max(1, min(len(handles), int(width * 13 / widest)))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=handle_length
    )
    return 0.3 + 0.19 * -(-len(handles) // columns)


def _plain(text: str) -> str:
    """Text of the user's as it stands: no mathematics between dollars, and no label that a legend would hide."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# -- what the other pictures share -------------------------------------------------------------------------------


def _check_ending(output: str | Path) -> None:
    ending = Path(output).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise ConfigError(f"{output}: a picture ends in {', '.join(f'.{one}' for one in FORMATS)}; found {ending!r}")


def save(figure: Any, output: str | Path) -> Path:
    """Write a matplotlib figure, in a folder that is made for it; returns its path.

    Raises:
        ConfigError: the ending is none of png, svg and pdf.
    """
    _check_ending(output)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
