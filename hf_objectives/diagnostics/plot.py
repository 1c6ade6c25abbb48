"""Training curves as a picture: one run or several over each other, with what is wrong marked where it is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_objectives.diagnostics.curves import Curves, read_curves, read_runs
from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.diagnostics.findings import SEVERITIES, Finding
from hf_objectives.diagnostics.panels import SMOOTHED_FROM, Line, Panel, colour_of, panels_of, spans_decades
from hf_objectives.diagnostics.reduction import reduce_points, smooth_points
from hf_objectives.errors import ConfigError, FileFormatError

Log = Sequence[Mapping[str, Any]]
One = str | Path | Log | Curves
FORMATS = ("png", "svg", "pdf")
_COLOURS = {"info": "#4878a8", "warning": "#e08a00", "error": "#c81e1e"}
_MARKS, _LISTED = 12, 8
_PANEL_OF = {"gradient_explosion": "grad_norm", "schedule_fault": "learning_rate", "mixture_drift": "share"}


def plot_training_metrics(
    log: One | Sequence[One] | Mapping[str, One],
    output: str | Path = "training_curves.png",
    *,
    findings: Sequence[Finding] | None = None,
) -> Path:
    """Draw what the log has of loss, perplexity, learning rate, gradient norm, tokens a second, and sources.

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
        FileFormatError: no log where `log` says, or a log without a single loss.
        ConfigError: another ending.
    """
    # A figure of its own, not pyplot's: no global state, no window, safe beside a user's own plots.
    from matplotlib.figure import Figure

    _check_ending(output)
    runs = _runs(log)
    for run in runs:
        if "loss" not in run and "eval_loss" not in run:
            raise FileFormatError(f"{run.name} has neither a 'loss' nor an 'eval_loss'; nothing to draw")
    panels = panels_of(runs)
    found = _diagnosed(runs) if findings is None else list(findings)
    found.sort(key=lambda one: (-SEVERITIES.index(one.severity), one.step))
    columns = 3 if len(panels) > 4 else min(2, len(panels))
    width, panel_height = 4.9 * columns + (1.5 if columns == 1 else 0), 3.1
    lines = _listing(found, several=len(runs) > 1, characters=int(width * 14.5))
    rows = -(-len(panels) // columns)
    text_height = 0.17 * len(lines)
    figure = Figure(figsize=(width, panel_height * rows + text_height + 0.45), layout="constrained")
    # Cells that are left over widen the first panel, which is the loss.
    spare = rows * columns - len(panels)
    cells = [panels[0].name] * (1 + spare) + [panel.name for panel in panels[1:]]
    mosaic = [cells[i * columns : (i + 1) * columns] for i in range(rows)]
    ratios = [panel_height] * rows
    if lines:
        mosaic.append(["findings"] * columns)
        ratios.append(text_height)
    axes = figure.subplot_mosaic(mosaic, height_ratios=ratios)  # type: ignore[arg-type]
    for panel in panels:
        _draw_panel(axes[panel.name], panel)
    _same_steps([axes[panel.name] for panel in panels], runs)
    for run in runs:
        for seam in run.seams:
            axes[panels[0].name].axvline(seam, color="black", linewidth=0.7, linestyle=":", alpha=0.6)
    _mark(axes, found)
    if lines:
        axes["findings"].axis("off")
        for i, (line, colour) in enumerate(lines):
            axes["findings"].text(
                0, 1 - (i + 0.5) / len(lines), line, color=colour, fontsize=8, va="center", parse_math=False
            )
    _title(figure, runs)
    return save(figure, output)


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
        (drawn,) = _draw_line(axes, line, geometric=panel.log is True)
        if line.label:
            handles.append((drawn, _plain(line.label)))
    values = np.concatenate([line.series.values for line in panel.lines] or [np.ones(1)])
    log = spans_decades([values]) if panel.log is None else panel.log
    if log and (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log")
        # Plain numbers instead of powers of ten, and between the decades only where the range is short.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.5)))
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


def _draw_line(axes: Any, line: Line, *, geometric: bool) -> Any:
    steps, values = line.series
    raw_steps, raw = reduce_points(steps, values)
    if line.held_out:
        few = "o" if len(steps) <= 40 else ""
        return axes.plot(raw_steps, raw, "--", marker=few, markersize=3, linewidth=1.3, color=line.colour, zorder=3)
    finite = int(np.isfinite(values).sum())
    if not line.smooth or finite < SMOOTHED_FROM:
        few = "o" if finite < 3 else ""
        return axes.plot(raw_steps, raw, line.style, marker=few, markersize=4, linewidth=1.3, color=line.colour)
    axes.plot(raw_steps, raw, color=line.colour, alpha=0.28, linewidth=0.8)
    return axes.plot(*smooth_points(steps, values, geometric=geometric), color=line.colour, linewidth=1.5, zorder=2.5)


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


def _mark(axes: Mapping[str, Any], found: Sequence[Finding]) -> None:
    """The gravest findings, each a band or a line with its number in the panel that shows it."""
    placed: dict[str, list[float]] = {}
    shaded = set()
    for number, one in enumerate(found[:_MARKS], 1):
        name = _PANEL_OF.get(one.kind, "loss")
        name = name if name in axes else "loss"
        panel, colour = axes[name], _COLOURS[one.severity]
        low, high = panel.get_xlim()
        at = min(max(one.step, low), high)
        band = (name, one.step, one.last_step)
        if one.last_step > one.step and band not in shaded:
            shaded.add(band)
            panel.axvspan(at, min(one.last_step, high), color=colour, alpha=0.1, linewidth=0, zorder=0)
        panel.axvline(at, color=colour, linewidth=1.1, alpha=0.8, zorder=1)
        near = [x for x in placed.setdefault(name, []) if abs(x - at) < 0.05 * (high - low)]
        placed[name].append(at)
        panel.text(
            at, 0.96 - 0.11 * (len(near) % 6), str(number), transform=panel.get_xaxis_transform(), fontsize=8,
            color="white", ha="center", va="center", zorder=5,
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": colour, "edgecolor": "none"},
        )  # fmt: skip


def _listing(found: Sequence[Finding], *, several: bool, characters: int) -> list[tuple[str, str]]:
    """The findings in words, each line with its colour."""
    lines = []
    for number, one in enumerate(found[:_LISTED], 1):
        who = f"{one.run}, " if several and one.run else ""
        text = f"{number}  {one.kind} ({who}{one.steps}): {one.evidence}"
        for i, part in enumerate(textwrap.wrap(text, characters - 4, max_lines=2, placeholder=" ...")):
            lines.append((("    " if i else "") + part, _COLOURS[one.severity]))
    if len(found) > _LISTED:
        lines.append((f"and {len(found) - _LISTED} more", "black"))
    return lines


def _title(figure: Any, runs: Sequence[Curves]) -> None:
    """The name of one run; for several, which colour is whose and what the dashes mean."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(_plain(runs[0].name), fontsize=11, x=0.01, ha="left")
        return
    handles = [Line2D([], [], color=colour_of(i), linewidth=2, label=_plain(run.name)) for i, run in enumerate(runs)]
    if any("eval_loss" in run for run in runs):
        handles.append(Line2D([], [], color="black", linestyle="--", marker="o", markersize=3, label="validation"))
    widest = max(len(run.name) for run in runs) + 8
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 13) // widest))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)


def _plain(text: str) -> str:
    """Text of the user's as it stands: no mathematics between dollars, and no label that a legend would hide."""
    text = text.replace("$", r"\$")
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


def read_log(log: str | Path | Log) -> Log:
    """A Trainer's log history from where it is.

    Raises:
        FileFormatError: no `trainer_state.json` there, or one that is not JSON.
    """
    if not isinstance(log, (str, Path)):
        return log
    path = Path(log)
    if path.is_dir():
        found = sorted(path.glob("**/trainer_state.json"), key=lambda state: (len(state.parts), state.stat().st_mtime))
        own = [state for state in found if state.parent == path]
        if not found:
            raise FileFormatError(f"no trainer_state.json under {path}")
        path = own[0] if own else found[-1]
    try:
        return json.loads(path.read_text())["log_history"]
    except FileNotFoundError as error:
        raise FileFormatError(f"no log at {path}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} is not a trainer_state.json with a log_history ({error!r})") from error


def series(history: Log, key: str) -> list[tuple[float, float]]:
    """Steps and values of a key, where a log line has it."""
    return [(entry["step"], float(entry[key])) for entry in history if entry.get(key) is not None and "step" in entry]


def draw(
    axes: Any,
    points: list[tuple[float, float]],
    label: str,
    *,
    mean: Callable[[Sequence[float]], float] | None = None,
    marker: str = "",
    style: str = "-",
) -> None:
    """One curve; a long one, where it has a `mean`, as the values in pale and their moving mean over them."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if mean is None or len(points) < 20:
        axes.plot(steps, values, style, marker=marker, label=label)
        return
    (line,) = axes.plot(steps, values, alpha=0.3)
    # A tenth of the curve, centred: enough to see a trend, without the lag that a trailing mean has where it is steep.
    half = max(1, len(values) // 20)
    means = [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    axes.plot(steps, means, color=line.get_color(), label=label)
