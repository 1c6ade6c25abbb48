"""Training logs made by hand: curves with and without a fault."""

from __future__ import annotations

import numpy as np

from hf_objectives.diagnostics.detect import diagnose

N = 300
T = np.arange(N)


def noisy(values, deviation=0.02, seed=0):
    """Values with normal noise, as a share of each."""
    return np.asarray(values, dtype=float) * (1 + deviation * np.random.default_rng(seed).standard_normal(len(values)))


def healthy_loss(seed=0):
    """A loss that falls as in pretraining."""
    return noisy(2 + 4 * (1 + T / 5) ** -0.5, seed=seed)


def log(loss=None, *, epochs=1.0, eval_loss=None, **curves):
    """A log_history of curves; __ in a name stands for /."""
    lines = []
    loss = healthy_loss() if loss is None else loss
    for i, value in enumerate(loss):
        line = {"step": i + 1, "loss": float(value), "epoch": (i + 1) / len(loss) * epochs}
        lines.append(line | {key.replace("__", "/"): float(values[i]) for key, values in curves.items()})
    for k, value in enumerate([] if eval_loss is None else eval_loss):
        lines.append({"step": (k + 1) * len(loss) // len(eval_loss), "eval_loss": float(value)})
    return sorted(lines, key=lambda line: line["step"])


def kinds(history):
    """Findings by kind, without those that are only worth knowing."""
    return {one.kind: one for one in diagnose(history) if one.severity != "info"}


def policy(**changed):
    """The log of a policy that learns."""
    rise = 1 - np.exp(-T / 100)
    curves = {
        "reward": noisy(0.2 + rise),
        "kl": noisy(5 * rise + 0.1),
        "entropy": noisy(2 - rise),
        "completions__mean_length": noisy(100 + 20 * rise),
    }
    return log(0.01 * np.random.default_rng(4).standard_normal(N), **{**curves, **changed})
