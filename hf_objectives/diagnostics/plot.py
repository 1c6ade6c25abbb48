"""Training curves as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from hf_objectives.errors import FileFormatError

Log = Sequence[Mapping[str, Any]]


def plot_training_metrics(log: str | Path | Log, output: str | Path = "training_curves.png") -> Path:
    """Draw loss, perplexity, learning rate and gradient norm over steps.

    Args:
        log: a Trainer's `log_history`, a `trainer_state.json`, or the checkpoint or output folder that holds one.
        output: the picture; its ending names the format (png, svg, pdf).

    Returns:
        The path of the picture.

    Raises:
        FileFormatError: no log where `log` says, or a log without a single loss.
    """
    # A figure of its own, not pyplot's: no global state, no window, safe beside a user's own plots.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    history = read_log(log)
    train = series(history, "loss")
    evaluation = series(history, "eval_loss")
    if not train and not evaluation:
        raise FileFormatError("the log has neither a 'loss' nor an 'eval_loss'; nothing to draw")
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    (loss, perplexity), (rate, norm) = figure.subplots(2, 2, sharex=True)
    draw(loss, train, "training", mean=fmean)
    draw(loss, evaluation, "evaluation", marker="o")
    loss.set(title="Loss (nats per token)")
    draw(perplexity, series(history, "perplexity"), "training", mean=geometric_mean)
    draw(perplexity, series(history, "eval_perplexity"), "evaluation", marker="o")
    for source in _sources(history):
        draw(perplexity, series(history, f"eval_{source}_perplexity"), source, marker=".", style="--")
    perplexity.set(title="Perplexity (log scale)", yscale="log")
    # Plain numbers instead of powers of ten, and between the decades only where the range is short.
    perplexity.yaxis.set_major_formatter(LogFormatter())
    perplexity.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.5)))
    draw(rate, series(history, "learning_rate"), "learning rate")
    rate.set(title="Learning rate", xlabel="step")
    draw(norm, series(history, "grad_norm"), "gradient norm", mean=fmean)
    norm.set(title="Gradient norm", xlabel="step")
    for axes in (loss, perplexity, rate, norm):
        axes.grid(alpha=0.25)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False)
    return save(figure, output)


def save(figure: Any, output: str | Path) -> Path:
    """Write a matplotlib figure, in a folder that is made for it; returns its path."""
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


def _sources(history: Log) -> list[str]:
    keys = {key for entry in history for key in entry}
    ending = "_perplexity"
    return sorted(
        key[len("eval_") : -len(ending)]
        for key in keys
        if key.startswith("eval_") and key.endswith(ending) and key != "eval_perplexity"
    )


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
