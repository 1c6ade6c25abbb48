"""Draw a run of reinforcement learning."""

from __future__ import annotations

from pathlib import Path

from hf_objectives.diagnostics.curves import Curves, Log, read_curves
from hf_objectives.diagnostics.drawing import draw_keys, save
from hf_objectives.errors import FileFormatError

_SHARES = {
    "completions/finished": "finished answers",
    "clip_fraction": "clipped tokens",
    "explained_variance": "variance explained by the critic",
}


def plot_rewards(log: str | Path | Log | Curves, output: str | Path = "rewards.png") -> Path:
    """Draw the reward, the KL to the reference, the lengths of answers, and how the steps go.

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
