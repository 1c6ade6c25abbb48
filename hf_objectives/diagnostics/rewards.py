"""A run of reinforcement learning as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from hf_objectives.diagnostics.plot import Log, draw, read_log, save, series
from hf_objectives.errors import FileFormatError


def plot_rewards(log: str | Path | Log, output: str | Path = "rewards.png") -> Path:
    """Draw reward, distance from the reference, lengths of answers, and how the steps go.

    Args:
        log: see `plot_training_metrics`.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.

    Raises:
        FileFormatError: no log where `log` says, or a log without rewards.
    """
    from matplotlib.figure import Figure

    history = read_log(log)
    if not series(history, "reward"):
        raise FileFormatError("the log has no 'reward'; nothing to draw")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    (reward, distance), (length, step) = figure.subplots(2, 2, sharex=True)
    draw(reward, series(history, "reward"), "training", mean=fmean)
    draw(reward, series(history, "eval_reward"), "evaluation", marker="o")
    reward.set(title="Reward (mean of an answer)")
    per_answer = series(history, "kl_per_answer")
    draw(distance, per_answer or series(history, "kl"), "KL to the reference", mean=fmean)
    distance.set(title=f"KL to the reference (nats per {'answer' if per_answer else 'token'})")
    draw(length, series(history, "completions/mean_length"), "mean length of an answer", mean=fmean)
    length.set(title="Tokens of an answer", xlabel="step")
    for key, label in (
        ("completions/finished", "finished answers"),
        ("clip_fraction", "clipped tokens"),
        ("explained_variance", "variance explained by the critic"),
    ):
        draw(step, series(history, key), label, mean=fmean)
    step.set(title="Shares", xlabel="step", ylim=(-0.05, 1.05))
    for axes in (reward, distance, length, step):
        axes.grid(alpha=0.25)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False)
    return save(figure, output)
