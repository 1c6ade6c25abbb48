"""A reward model's training and calibration as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hf_objectives.calibration import Reliability
from hf_objectives.diagnostics.plot import Log, draw, read_log, save, series


def plot_reward_model(
    log: str | Path | Log, reliabilities: Mapping[str, Reliability], output: str | Path = "reward_model.png"
) -> Path:
    """Draw loss and accuracy over steps, and a reliability diagram: how often choices of a confidence are right.

    Args:
        log: a Trainer's `log_history`, or where it is; see `read_log`.
        reliabilities: what to draw in the diagram, by name; a dot's area is its bin's share of the pairs.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.
    """
    from matplotlib.figure import Figure

    history = read_log(log)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    loss, accuracy, diagram = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (accuracy, "accuracy")):
        draw(axes, series(history, name), "training", mean=lambda values: sum(values) / len(values))
        draw(axes, series(history, f"eval_{name}"), "held out", marker="o")
    loss.set(title="Loss (nats per pair)", xlabel="step")
    accuracy.set(title="Accuracy", xlabel="step")
    low, high = (series(history, f"eval_accuracy_{end}") for end in ("low", "high"))
    if low:
        accuracy.fill_between(
            [step for step, _ in low], [y for _, y in low], [y for _, y in high], alpha=0.2, label="95 % interval"
        )
    diagram.plot([0.5, 1], [0.5, 1], "--", color="grey", label="calibrated")
    for name, found in reliabilities.items():
        full = found.counts > 0
        sizes = 400 * found.counts[full] / found.counts.sum()
        error = found.expected_calibration_error
        diagram.scatter(
            found.confidence[full], found.accuracy[full], sizes, alpha=0.7, label=f"{name}, ECE {error:.3f}"
        )
    diagram.set(title="Calibration (held out)", xlabel="confidence, sigmoid of the margin", ylabel="accuracy")
    for axes in (loss, accuracy, diagram):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return save(figure, output)
