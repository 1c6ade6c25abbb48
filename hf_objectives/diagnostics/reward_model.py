"""Draw a reward model's training and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_objectives.diagnostics.curves import Curves, Log, read_curves
from hf_objectives.diagnostics.drawing import draw_keys, save
from hf_objectives.diagnostics.panels import colour_of

if TYPE_CHECKING:
    from hf_objectives.evaluation import Reliability


def plot_reward_model(
    log: str | Path | Log | Curves, reliabilities: Mapping[str, Reliability], output: str | Path = "reward_model.png"
) -> Path:
    """Draw loss and accuracy over steps, and a reliability diagram: how often choices of a confidence are right.

    Args:
        log: what `read_curves` takes; an empty `log_history` gives the diagram alone.
        reliabilities: what to draw in the diagram, by name; a dot's area is its bin's share of the pairs.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.

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
