"""Draw training curves: one run or several over each other, with findings marked; reinforcement learning; reward models."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_objectives.diagnostics.curves import Curves, OneLog, read_curves, read_runs
from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.diagnostics.drawing import (
    check_ending,
    draw_keys,
    draw_panel,
    mark_findings,
    plain,
    same_steps,
    save,
)
from hf_objectives.diagnostics.panels import FINDING_COLOURS, Panel, colour_of, dashes_of, panels_of, shortened
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection import SEVERITIES, Finding, visible

if TYPE_CHECKING:
    from hf_objectives.evaluation import Reliability

_LISTED = 8  # findings
_TEXT, _LINE_HEIGHT, _PANEL_HEIGHT = "findings", 0.17, 3.1  # inches
_SHARES = {
    "completions/finished": "finished answers",
    "clip_fraction": "clipped tokens",
    "explained_variance": "variance explained by the critic",
}
_BANDS_UP_TO = 16  # runs; the bands of more would lie over all that is drawn


def plot_training_metrics(
    log: OneLog | Sequence[OneLog] | Mapping[str, OneLog],
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
        output: the picture, whose path is returned; its ending names the format (png, svg, pdf).
        findings: what to mark; by default what `diagnose` finds. An empty list marks nothing.

    Raises:
        FileFormatError: no log where `log` says, or a log with nothing that is drawn.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure

    check_ending(output)
    runs = read_runs(log) if log else []
    if not runs:
        raise FileFormatError("no log was given; nothing to draw")
    for run in runs:
        if not panels_of([run]):
            raise FileFormatError(
                f"{run.name} has neither a 'loss' nor an 'eval_loss', nor anything else that is drawn; it has "
                f"{', '.join(sorted(run.series)[:8])}"
            )
    panels = panels_of(runs)
    if findings is None:
        findings = diagnose(runs) if any(run.points > 1 for run in runs) else []
    marked = sorted(findings, key=lambda finding: (-SEVERITIES.index(finding.severity), finding.step))
    columns = 3 if len(panels) > 4 else min(2, len(panels))
    width = 4.9 * columns + (1.5 if columns == 1 else 0)
    listing = _listing(marked, several=len(runs) > 1, characters=int(width * 14.5))
    # A figure of its own, not pyplot's: no global state, no window, safe beside a user's own plots.
    figure = Figure(layout="constrained")
    title_height = _title(figure, runs, width, held_out=any(line.held_out for panel in panels for line in panel.lines))
    axes = _grid(figure, panels, columns, width, title_height, len(listing))
    drawn = {panel.name: axes[panel.name] for panel in panels}
    for panel in panels:  # one legend for all panels where colours stand for runs
        draw_panel(drawn[panel.name], panel, legend=len(runs) == 1)
    same_steps(drawn.values(), runs)
    for seam in (seam for run in runs for seam in run.seams):
        drawn[panels[0].name].axvline(seam, color="black", linewidth=0.7, linestyle=":", alpha=0.6)
    mark_findings(drawn, marked, bands=len(runs) <= _BANDS_UP_TO)
    for i, (line, colour) in enumerate(listing):
        height = 1 - (i + 0.5) / len(listing)
        axes[_TEXT].text(0, height, line, color=colour, fontsize=8, va="center", parse_math=False)
    return save(figure, output)


def _grid(
    figure: Any, panels: Sequence[Panel], columns: int, width: float, title_height: float, lines: int
) -> dict[str, Any]:
    """Axes by panel, and below them those of the findings, in a figure with room for title and text."""
    rows = -(-len(panels) // columns)
    # Cells that are left over widen the first panel, which is the loss.
    cells = [panels[0].name] * (rows * columns - len(panels)) + [panel.name for panel in panels]
    mosaic = [cells[i * columns : (i + 1) * columns] for i in range(rows)]
    heights = [_PANEL_HEIGHT] * rows
    if lines:
        mosaic.append([_TEXT] * columns)
        heights.append(_LINE_HEIGHT * lines)
    figure.set_size_inches(width, sum(heights) + title_height)
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    if lines:
        axes[_TEXT].axis("off")
    return dict(axes)


def _title(figure: Any, runs: Sequence[Curves], width: float, *, held_out: bool) -> float:
    """Write the name of one run; for several, a legend of their lines. Returns its height in inches."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        figure.suptitle(plain(runs[0].name), fontsize=11, x=0.01, ha="left")
        return 0.45
    names = shortened([run.name for run in runs])
    handles = []
    for i, name in enumerate(names):
        style: Any = (0, dashes_of(i)) if dashes_of(i) else "-"
        handles.append(Line2D([], [], color=colour_of(i), linewidth=2, linestyle=style, label=plain(name)))
    if held_out:
        style = (0, dashes_of(0, broken=True))
        handles.append(Line2D([], [], color="black", linestyle=style, marker="o", markersize=3, label="validation"))
    length = 4.0 if len(runs) > 8 else 2.0  # of a handle: dashes need room
    widest = max(len(name) for name in names) + 6 + length
    columns = max(1, min(len(handles), int(width * 13 / widest)))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=length
    )
    return 0.3 + 0.19 * -(-len(handles) // columns)


def _listing(findings: Sequence[Finding], *, several: bool, characters: int) -> list[tuple[str, str]]:
    """The findings in words, each line with its colour."""
    lines = []
    for number, finding in enumerate(findings[:_LISTED], 1):
        run = f"{finding.run}, " if several and finding.run else ""
        text = visible(f"{number}  {finding.kind} ({run}{finding.steps}): {finding.evidence}")
        for i, part in enumerate(textwrap.wrap(text, characters - 4, max_lines=2, placeholder=" ...")):
            lines.append((("    " if i else "") + part, FINDING_COLOURS[finding.severity][0]))
    if len(findings) > _LISTED:
        lines.append((f"and {len(findings) - _LISTED} more", "black"))
    return lines


# -- alignment ------------------------------------------------------------------------------------------------------


def plot_rewards(log: OneLog, output: str | Path = "rewards.png") -> Path:
    """Draw the reward, the KL to the reference, the lengths of answers, and how the steps go.

    Args:
        log: what `read_curves` takes.
        output: the picture, whose path is returned; its ending names the format (png, svg, pdf).

    Raises:
        FileFormatError: no log where `log` says, or a log without rewards.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure

    curves = read_curves(log)
    if "reward" not in curves:
        raise FileFormatError("the log has no 'reward'; nothing to draw")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    (reward, kl), (length, shares) = figure.subplots(2, 2, sharex=True)
    draw_keys(reward, curves, {"reward": "training", "eval_reward": "evaluation"}, "Reward (mean of an answer)")
    key, unit = ("kl_per_answer", "answer") if "kl_per_answer" in curves else ("kl", "token")
    draw_keys(kl, curves, {key: "KL to the reference"}, f"KL to the reference (nats per {unit})")
    draw_keys(length, curves, {"completions/mean_length": "mean length of an answer"}, "Tokens of an answer")
    draw_keys(shares, curves, _SHARES, "Shares")
    shares.set(ylim=(-0.05, 1.05))
    for axes in (reward, kl):
        axes.set(xlabel="")
    return save(figure, output)


def plot_reward_model(
    log: OneLog, reliabilities: Mapping[str, Reliability], output: str | Path = "reward_model.png"
) -> Path:
    """Draw loss and accuracy over steps, and a reliability diagram: how often choices of a confidence are right.

    Args:
        log: what `read_curves` takes; an empty `log_history` gives the diagram alone.
        reliabilities: what to draw in the diagram, by name; a dot's area is its bin's share of the pairs.
        output: the picture, whose path is returned; its ending names the format (png, svg, pdf).

    Raises:
        FileFormatError: no log where `log` says, or nothing in it can be read.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure

    curves = read_curves(log) if log else Curves("nothing was trained")
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, accuracy, diagram = figure.subplots(1, 3)
    draw_keys(loss, curves, {"loss": "training", "eval_loss": "held out"}, "Loss (nats per pair)")
    low, high = (curves.get(f"eval_accuracy_{end}") for end in ("low", "high"))
    if len(low.steps):
        accuracy.fill_between(*low, high.values, alpha=0.2, color=colour_of(1), label="95 % interval")
    draw_keys(accuracy, curves, {"accuracy": "training", "eval_accuracy": "held out"}, "Accuracy")
    diagram.plot([0.5, 1], [0.5, 1], "--", color="grey", label="calibrated")
    for name, found in reliabilities.items():
        full = found.counts > 0
        areas = 400 * found.counts[full] / found.counts.sum()
        label = f"{name}, ECE {found.expected_calibration_error:.3f}"
        diagram.scatter(found.confidence[full], found.accuracy[full], areas, alpha=0.7, label=label)
    diagram.set(title="Calibration (held out)", xlabel="confidence, sigmoid of the margin", ylabel="accuracy")
    diagram.grid(alpha=0.25)
    diagram.legend(frameon=False)
    return save(figure, output)
