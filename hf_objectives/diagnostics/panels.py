"""What of one or several runs is drawn, panel by panel."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hf_objectives.diagnostics.curves import Curves, Series

SMOOTHED_FROM = 20  #: points of a curve that gets a trend over it
#: Of a finding on a light and on a dark page, each 4.5:1 or more against it.
FINDING_COLOURS = {
    "info": ("#0060a8", "#6cb8ff"),
    "warning": ("#8a5a00", "#f0b84a"),
    "error": ("#b3202a", "#ff7b7b"),
}
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")  # told apart by all
_SOURCES_AT_MOST = 8
_NAME_AT_MOST = 36  # characters of a legend
# What stands between "eval_" and "_loss" without being a set: parts of one loss.
_PARTS = frozenset(("aux", "balance", "entropy", "kl", "mtp", "nll", "policy", "router", "sft", "value", "vf", "z"))
_REFERENCE = frozenset(("reference_chosen", "reference_rejected"))  # of DPO, whose perplexity stays as it is
_SINGLE = (
    ("learning_rate", "Learning rate", False),
    ("grad_norm", "Gradient norm", None),
    ("tokens_per_second", "Tokens per second", False),
)
# What findings of preference and reinforcement learning speak of, each key a panel.
_ALIGNMENT = {
    "logps_change/chosen": "Change of the chosen answers' log-probability (nats a token)",
    "logps/chosen": "Log-probability of the chosen answers (nats)",
    "reward": "Reward",
    "objective/scores": "Reward (objective/scores)",
    "rewards/mean": "Reward (rewards/mean)",
    "kl": "KL to the reference",
    "objective/kl": "KL to the reference (objective/kl)",
    "kl_per_answer": "KL to the reference, an answer",
    "entropy": "Entropy",
    "policy/entropy_avg": "Entropy (policy/entropy_avg)",
    "completions/mean_length": "Tokens of an answer",
    "completion_length": "Tokens of an answer (completion_length)",
}
# Where a finding is shown: of each row the first panel that is there.
_SHOWN_IN: dict[str, tuple[tuple[str, ...], ...]] = {
    "gradient_explosion": (("grad_norm",),),
    "schedule_fault": (("learning_rate",),),
    "mixture_drift": (("share",),),
    "falling_chosen": (("logps_change/chosen", "logps/chosen"),),
    "reward_hacking": (("reward", "objective/scores", "rewards/mean"), ("kl", "objective/kl", "kl_per_answer")),
    "entropy_collapse": (("entropy", "policy/entropy_avg"),),
    "length_growth": (("completions/mean_length", "completion_length"),),
}


@dataclass(frozen=True)
class Line:
    """One curve of a panel.

    Attributes:
        series: its points.
        label: its name in a legend; "" for none.
        colour: as matplotlib and bokeh take it.
        held_out: of validation, never smoothed.
        smooth: its trend is drawn over it.
        dashes: lengths of dashes and gaps in turn; () for a whole line.
        made: it is exp(loss); the log has no such perplexity.
    """

    series: Series
    label: str
    colour: str
    held_out: bool = False
    smooth: bool = True
    dashes: tuple[float, ...] = ()
    made: bool = False


@dataclass
class Panel:
    """One part of the picture.

    Attributes:
        name: unlike all others.
        title: what it shows.
        lines: its curves.
        log: on a log scale; None where the values span decades.
        share: values are shares, from 0 to 1.
        least: no value of it can be less.
        legend: it has one of its own.
    """

    name: str
    title: str
    lines: list[Line] = field(default_factory=list)
    log: bool | None = False
    share: bool = False
    least: float | None = None
    legend: bool = True


@dataclass
class Completed(Curves):
    """Curves with perplexities that the log does not have.

    Attributes:
        made: the keys of these.
    """

    made: frozenset[str] = frozenset()


def panels_of(runs: list[Curves]) -> list[Panel]:
    """The panels that have something to show, the loss first where there is one."""
    several = len(runs) > 1
    completed = [with_perplexities(run) for run in runs]
    perplexity = Panel("perplexity", "Perplexity", log=True, least=1.0)
    found = [_both(runs, "loss", Panel("loss", "Loss", log=None)), _both(completed, "perplexity", perplexity)]
    for key, title, log in _SINGLE:
        panel = Panel(key, title, log=log)
        for i, run in enumerate(runs):
            smooth = key != "learning_rate"
            panel.lines.append(_line(run, key, i, run.name if several else title, smooth=smooth))
        if key == "learning_rate":
            panel.log = _far_apart(panel.lines)
        found.append(panel)
    found += [_both(runs, key, Panel(key, title)) for key, title in _ALIGNMENT.items()]
    found += _by_source(completed)
    for panel in found:
        by_source = panel.name.startswith(("source", "set"))
        if several and by_source and max(len(line.series.steps) for line in panel.lines) < 2:
            panel.lines = []  # lone points of runs side by side compare nothing
        panel.lines = [line for line in panel.lines if np.isfinite(line.series.values).any()]
        panel.legend = not several  # one for all panels, where colours stand for runs
        panel.title += _said_of_made(panel.lines)
    # A loss that is NaN throughout still has its place: there the findings say so.
    has_loss = any("loss" in run or "eval_loss" in run for run in runs)
    return [panel for panel in found if panel.lines or (panel.name == "loss" and has_loss)]


def shown_in(kind: str, panels: Collection[str]) -> list[str]:
    """The panels that show what a finding of this kind speaks of; the first one where none does.

    Args:
        kind: of the finding.
        panels: the names of those that are drawn, in order.
    """
    rows = _SHOWN_IN.get(kind, (("loss",),))
    places = [next((name for name in row if name in panels), None) for row in rows]
    return [name for name in places if name] or [*panels][:1]


def with_perplexities(run: Curves) -> Completed:
    """The run with exp(loss) wherever a loss of a language model has no perplexity, validation sets each by its name."""
    made = {}
    if not any(_of_preferences(key.removeprefix("eval_")) for key in run.series):
        for key, series in run.series.items():
            name = f"{key.removesuffix('loss')}perplexity"
            if (key in ("loss", "eval_loss") or _set_of(key)) and name not in run:
                with np.errstate(over="ignore"):
                    made[name] = Series(series.steps, np.exp(series.values))
    return Completed(run.name, {**run.series, **made}, run.notes, run.seams, frozenset(made))


def _of_preferences(key: str) -> bool:
    """Whether a loss beside that key is no mean over tokens, so that its exponential is no perplexity.

    An accuracy says nothing: it may be that of tokens, as `run_clm` logs it.
    """
    return key in ("reward", "kl", "kl_per_answer", "margin") or key.startswith(("rewards/", "completions/"))


def _set_of(key: str) -> str:
    """The validation set whose loss that is; "" where it is none's."""
    name = key.removeprefix("eval_").removesuffix("_loss")
    named = key.startswith("eval_") and key.endswith("_loss") and len(key) > len("eval__loss")
    return name if named and name not in _PARTS else ""


def _said_of_made(lines: Sequence[Line]) -> str:
    made = shortened([line.label for line in lines if line.made])
    if not made or len(made) == len(lines):
        return ", exp(loss)" if made else ""
    return f", exp(loss) for {' and '.join(made) if len(made) < 3 else f'{len(made)} of {len(lines)} lines'}"


def _line(run: Curves, key: str, i: int, label: str, *, held_out: bool = False, smooth: bool = True) -> Line:
    made = isinstance(run, Completed) and key in run.made
    return Line(run.get(key), label, colour_of(i), held_out, smooth, dashes_of(i, broken=held_out), made)


def _far_apart(lines: Sequence[Line]) -> bool:
    """Whether the greatest value of one curve lies so far below another's that it would look like zero."""
    peaks = [float(np.nanmax(line.series.values)) for line in lines if np.isfinite(line.series.values).any()]
    peaks = [peak for peak in peaks if 0 < peak < np.inf]
    return bool(peaks) and max(peaks) > 10 * min(peaks)


def _both(runs: Sequence[Curves], key: str, panel: Panel) -> Panel:
    """Training and validation of every run; one run tells them apart by colour, several by dashes."""
    several = len(runs) > 1
    for i, run in enumerate(runs):
        panel.lines.append(_line(run, key, i, run.name if several else "training"))
        label = f"{run.name}, validation" if several else "validation"
        panel.lines.append(_line(run, f"eval_{key}", i if several else 1, label, held_out=True))
    return panel


def _by_source(runs: list[Completed]) -> list[Panel]:
    """Perplexity, else loss, and share of the sources: a panel for all of a run; one a source where runs are compared."""
    panels: list[Panel] = []
    known = sources_of(runs, "eval_", "_perplexity")
    losses = [name for name in sources_of(runs, "eval_", "_loss") if name not in known and name not in _PARTS]
    for kind, end, names, title, each in (
        ("source", "perplexity", known, "Validation perplexity by source", "Perplexity, {}"),
        ("set", "loss", losses, "Validation loss by source", "Validation loss, {}"),
        (
            "share",
            "share",
            sources_of(runs, "mixture/", "/share"),
            "Share of what was drawn, dashed as asked",
            "Share, {}",
        ),
    ):
        log = {"source": True, "set": None, "share": False}[kind]
        panel = Panel(kind, title, log=log, share=kind == "share", least=1.0 if kind == "source" else None)
        made = []
        for n, source in enumerate(names[:_SOURCES_AT_MOST]):
            if len(runs) > 1 or n == 0:
                made.append(replace(panel, name=kind if n == 0 else f"{kind} {source}", lines=[]))
            if len(runs) > 1:
                made[-1].title = each.format(source)
            for i, run in enumerate(runs):
                label, at = (run.name, i) if len(runs) > 1 else (source, n)
                if kind != "share":
                    made[-1].lines.append(_line(run, f"eval_{source}_{end}", at, label, held_out=True))
                    continue
                made[-1].lines.append(_line(run, f"mixture/{source}/share", at, label, smooth=False))
                asked = _line(run, f"mixture/{source}/asked", at, "", smooth=False)
                made[-1].lines.append(replace(asked, dashes=dashes_of(at, broken=True)))
        if len(names) > _SOURCES_AT_MOST:
            made[-1].title += f" (the first {_SOURCES_AT_MOST} of {len(names)})"
        panels += made
    return panels


def sources_of(runs: Iterable[Curves], start: str, end: str) -> list[str]:
    """The names between `start` and `end` in the keys of the runs, in order; not those of DPO's reference."""
    keys = {key for run in runs for key in run.series if key.startswith(start) and key.endswith(end)}
    return sorted({key[len(start) : -len(end)] for key in keys if len(key) > len(start) + len(end)} - _REFERENCE)


def colour_of(i: int) -> str:
    """The colour of the i-th run or source, again from the first after eight."""
    return _PALETTE[i % len(_PALETTE)]


def dashes_of(i: int, *, broken: bool = False) -> tuple[float, ...]:
    """Dashes and gaps of the i-th run's line: a dot more in each round of the colours, () in the first.

    Args:
        i: of the run, from 0.
        broken: of validation, whose line is dashed in every round.
    """
    rounds = i // len(_PALETTE)
    first: tuple[float, ...] = (3.7, 1.6) if broken else (9.0, 1.6) if rounds else ()
    return first + (1.0, 1.6) * rounds


def shortened(names: Sequence[str]) -> list[str]:
    """Names as a legend has room for: long ones without their middle, and no two alike that were not.

    Args:
        names: whole ones; the same name twice has one short one.

    Returns:
        As many, at most 36 characters each but for the number of those that would be alike.
    """
    half = (_NAME_AT_MOST - 1) // 2
    short: dict[str, str] = {}
    for name in dict.fromkeys(names):
        base = name if len(name) <= _NAME_AT_MOST else f"{name[:half]}…{name[-half:]}"
        tried, count = base, 1
        while tried in short.values():
            count += 1
            tried = f"{base} ({count})"
        short[name] = tried
    return [short[name] for name in names]


def spans_decades(curves: Sequence[NDArray[np.float64]]) -> bool:
    """Whether curves, float64 [points] each, leap so far that a linear scale would show nothing else."""
    values = np.concatenate([*curves, np.zeros(0)])
    finite = values[np.isfinite(values)]
    # A loss of 0.0 is what the Trainer logs in place of NaN, so that a few zeros are no obstacle.
    positive = finite[finite > 0]
    return len(positive) > 0.5 * len(finite) and float(positive.max()) > 30 * float(np.median(positive))
