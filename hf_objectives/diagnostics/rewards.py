"""A run of reinforcement learning as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_objectives.diagnostics.curves import Curves, Log, read_curves
from hf_objectives.diagnostics.panels import Line, colour_of
from hf_objectives.diagnostics.plot import draw_line, save
from hf_objectives.errors import FileFormatError


def plot_rewards(log: str | Path | Log | Curves, output: str | Path = "rewards.png") -> Path:
    """Draw reward, distance from the reference, lengths of answers, and how the steps go.

    Args:
        log: what `read_curves` takes.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.

    Raises:
        FileFormatError: no log where `log` says, or a log without rewards.
        ConfigError: another ending.
    """
    from matplotlib.figure import Figure

    curves = read_curves(log)
    if "reward" not in curves:
        raise FileFormatError("the log has no 'reward'; nothing to draw")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    (reward, distance), (length, step) = figure.subplots(2, 2, sharex=True)
    draw_keys(reward, curves, {"reward": "training", "eval_reward": "evaluation"})
    reward.set(title="Reward (mean of an answer)")
    per_answer = "kl_per_answer" in curves
    draw_keys(distance, curves, {"kl_per_answer" if per_answer else "kl": "KL to the reference"})
    distance.set(title=f"KL to the reference (nats per {'answer' if per_answer else 'token'})")
    draw_keys(length, curves, {"completions/mean_length": "mean length of an answer"})
    length.set(title="Tokens of an answer", xlabel="step")
    shares = {
        "completions/finished": "finished answers",
        "clip_fraction": "clipped tokens",
        "explained_variance": "variance explained by the critic",
    }
    draw_keys(step, curves, shares)
    step.set(title="Shares", xlabel="step", ylim=(-0.05, 1.05))
    return save(figure, output)


def draw_keys(axes: Any, curves: Curves, labels: dict[str, str]) -> None:
    """Draw curves of a log, by key, under their labels; those of `eval_` dashed, what the log lacks not at all.

    Args:
        axes: matplotlib's.
        curves: of one run.
        labels: label by key.
    """
    for i, (key, label) in enumerate(labels.items()):
        if key in curves:
            line = Line(curves.get(key), label, colour_of(i), held_out=key.startswith("eval_"))
            (drawn,) = draw_line(axes, line)
            drawn.set_label(label)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)
