"""Choose what is drawn of one or several runs: panels, their lines, and the look of each line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from hf_objectives.diagnostics.curves import Curves, Series
from hf_objectives.diagnostics.detect_alignment import CHOSEN, ENTROPY, KL, LENGTH, REWARD

#: Colours of a finding on a light and on a dark page; each has a contrast of 4.5:1 or more.
FINDING_COLOURS = {
    "info": ("#0060a8", "#6cb8ff"),
    "warning": ("#8a5a00", "#f0b84a"),
    "error": ("#b3202a", "#ff7b7b"),
}
#: Eight colours that people with any colour vision tell apart.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
_SOURCES_AT_MOST = 8
_NAME_AT_MOST = 36  # characters in a legend
# Between "eval_" and "_loss" these name parts of one loss, and no validation set.
_PARTS = frozenset(("aux", "balance", "entropy", "kl", "mtp", "nll", "policy", "router", "sft", "value", "vf", "z"))
_REFERENCE = frozenset(("reference_chosen", "reference_rejected"))  # of DPO, whose perplexity stays as it is
#: Title and scale of each key that has a panel: on a log scale; None where the values span decades.
_PANELS: dict[str, tuple[str, bool | None]] = {
    "loss": ("Loss", None),
    "perplexity": ("Perplexity", True),
    "learning_rate": ("Learning rate", False),
    "grad_norm": ("Gradient norm", None),
    "tokens_per_second": ("Tokens per second", False),
    "logps_change/chosen": ("Change of the chosen answers' log-probability (nats a token)", False),
    "logps/chosen": ("Log-probability of the chosen answers (nats)", False),
    "reward": ("Reward", False),
    "objective/scores": ("Reward (objective/scores)", False),
    "rewards/mean": ("Reward (rewards/mean)", False),
    "kl": ("KL to the reference", False),
    "objective/kl": ("KL to the reference (objective/kl)", False),
    "kl_per_answer": ("KL to the reference, an answer", False),
    "entropy": ("Entropy", False),
    "policy/entropy_avg": ("Entropy (policy/entropy_avg)", False),
    "completions/mean_length": ("Tokens of an answer", False),
    "completion_length": ("Tokens of an answer (completion_length)", False),
}
#: The panels that show a kind of finding: of each row the first that is drawn. Other kinds are shown in the loss.
_SHOWN_IN: dict[str, tuple[tuple[str, ...], ...]] = {
    "gradient_explosion": (("grad_norm",),),
    "schedule_fault": (("learning_rate",),),
    "mixture_drift": (("share",),),
    "falling_chosen": (CHOSEN,),
    "reward_hacking": (REWARD, KL),
    "entropy_collapse": (ENTROPY,),
    "length_growth": (LENGTH,),
}


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    series: Series
    label: str  # in a legend; "" for none
    colour: str
    held_out: bool = False  # of validation, and never smoothed
    smooth: bool = True  # with its trend over it
    dashes: tuple[float, ...] = ()  # lengths of dashes and gaps in turn; () for a solid line
    made: bool = False  # exp(loss), because the log has no such perplexity


@dataclass
class Panel:
    """One part of the picture."""

    name: str  # unlike all others
    title: str
    lines: list[Line] = field(default_factory=list)
    log: bool | None = False  # on a log scale; None where the values span decades
    share: bool = False  # values are shares, from 0 to 1
    least: float | None = None  # no value of it can be less


def panels_of(runs: Sequence[Curves]) -> list[Panel]:
    """The panels that have something to show, the loss first where there is one. Their names are `shortened`."""
    names = shortened([run.name for run in runs])
    completed = [replace(with_perplexities(run), name=name) for run, name in zip(runs, names, strict=True)]
    panels = [_panel_of(completed, key, title, log) for key, (title, log) in _PANELS.items()]
    panels += _panels_by_source(completed)
    for panel in panels:
        panel.lines = [line for line in panel.lines if np.isfinite(line.series.values).any()]
        panel.title += _made_note(panel.lines)
        if panel.name == "learning_rate":
            panel.log = _far_apart(panel.lines)
    # A loss that is NaN throughout still has its place, where the findings say so.
    has_loss = any("loss" in run or "eval_loss" in run for run in runs)
    return [panel for panel in panels if panel.lines or (panel.name == "loss" and has_loss)]


def shown_in(kind: str, panels: Collection[str]) -> list[str]:
    """Of the panels drawn, those that show what a kind of finding is about; the first one where none does."""
    rows = _SHOWN_IN.get(kind, (("loss",),))
    places = [next((name for name in row if name in panels), None) for row in rows]
    return [name for name in places if name] or [*panels][:1]


def with_perplexities(run: Curves) -> Curves:
    """The run, with exp(loss) where the loss of a language model or of a validation set has no perplexity beside it."""
    plain = {key.removeprefix("eval_") for key in run.series}
    # Beside these a loss is no mean over tokens. An accuracy says nothing: it may be that of tokens, as `run_clm` logs it.
    of_preferences = plain & {"reward", "kl", "kl_per_answer", "margin"} or any(
        key.startswith(("rewards/", "completions/")) for key in plain
    )
    made: dict[str, Series] = {}
    if of_preferences:
        return run
    for key, series in run.series.items():
        source = key.removeprefix("eval_").removesuffix("_loss")
        of_set = key == f"eval_{source}_loss" and source not in {"", *_PARTS}
        name = f"{key.removesuffix('loss')}perplexity"
        if (of_set or key in ("loss", "eval_loss")) and name not in run:
            with np.errstate(over="ignore"):
                made[name] = Series(series.steps, np.exp(series.values))
    return replace(run, series={**run.series, **made}, made=frozenset(made))


def sources_of(runs: Iterable[Curves], start: str, end: str) -> list[str]:
    """The names between `start` and `end` in the keys of the runs, in order; not those of DPO's reference."""
    keys = {key for run in runs for key in run.series if key.startswith(start) and key.endswith(end)}
    return sorted({key[len(start) : -len(end)] for key in keys if len(key) > len(start) + len(end)} - _REFERENCE)


def colour_of(i: int) -> str:
    """The colour of the i-th run or source; the ninth has that of the first."""
    return _PALETTE[i % len(_PALETTE)]


def dashes_of(i: int, *, broken: bool = False) -> tuple[float, ...]:
    """Dashes and gaps of the i-th run's line: one dot more in each round of the colours. A `broken` line is always dashed."""
    rounds = i // len(_PALETTE)
    first: tuple[float, ...] = (3.7, 1.6) if broken else (9.0, 1.6) if rounds else ()
    return first + (1.0, 1.6) * rounds


def shortened(names: Sequence[str]) -> list[str]:
    """Names of 36 characters at most: long ones lose their middle, and names that then look alike get a number."""
    half = (_NAME_AT_MOST - 1) // 2
    short: dict[str, str] = {}
    for name in dict.fromkeys(names):
        base = name if len(name) <= _NAME_AT_MOST else f"{name[:half]}…{name[-half:]}"
        count = 1
        while (candidate := f"{base} ({count})" if count > 1 else base) in short.values():
            count += 1
        short[name] = candidate
    return [short[name] for name in names]


# -- lines ---------------------------------------------------------------------------------------------------------


def _panel_of(runs: Sequence[Curves], key: str, title: str, log: bool | None) -> Panel:
    """Training and validation of every run; one run tells them apart by colour, several by dashes."""
    panel = Panel(key, title, log=log, least=1.0 if key == "perplexity" else None)
    several = len(runs) > 1
    for i, run in enumerate(runs):
        panel.lines.append(_line(run, key, i, run.name if several else "training", smooth=key != "learning_rate"))
        label = f"{run.name}, validation" if several else "validation"
        panel.lines.append(_line(run, f"eval_{key}", i if several else 1, label, held_out=True))
    return panel


def _panels_by_source(runs: Sequence[Curves]) -> Iterator[Panel]:
    """Perplexity, else loss, and share of the sources: one panel for all of a run, or one a source for several runs."""
    known = sources_of(runs, "eval_", "_perplexity")
    losses = [name for name in sources_of(runs, "eval_", "_loss") if name not in known and name not in _PARTS]
    shares = sources_of(runs, "mixture/", "/share")
    perplexity = Panel("source", "Validation perplexity by source", log=True, least=1.0)
    share = Panel("share", "Share of what was drawn, dashed as asked", share=True)
    for whole, title, sources, key in (
        (perplexity, "Perplexity, {}", known, "eval_{}_perplexity"),
        (Panel("set", "Validation loss by source", log=None), "Validation loss, {}", losses, "eval_{}_loss"),
        (share, "Share, {}", shares, "mixture/{}/share"),
    ):
        shown = sources[:_SOURCES_AT_MOST]
        if len(runs) == 1:
            panels = [whole]
            for i, (source, name) in enumerate(zip(shown, shortened(shown), strict=True)):
                whole.lines += _lines_of_source(runs[0], key.format(source), i, name)
        else:
            panels = []
            for source in shown:
                name = f"{whole.name} {source}" if source != shown[0] else whole.name
                lines = [_lines_of_source(run, key.format(source), i, run.name) for i, run in enumerate(runs)]
                # Lone points of runs side by side compare nothing.
                if max(len(line.series.steps) for line in chain(*lines)) > 1:
                    panels.append(replace(whole, name=name, title=title.format(source), lines=[*chain(*lines)]))
        if panels and len(sources) > len(shown):
            panels[-1].title += f" (the first {len(shown)} of {len(sources)})"
        yield from panels


def _lines_of_source(run: Curves, key: str, i: int, label: str) -> list[Line]:
    if key.startswith("eval_"):
        return [_line(run, key, i, label, held_out=True)]
    asked = _line(run, f"{key.removesuffix('share')}asked", i, "", smooth=False)
    return [_line(run, key, i, label, smooth=False), replace(asked, dashes=dashes_of(i, broken=True))]


def _line(run: Curves, key: str, i: int, label: str, *, held_out: bool = False, smooth: bool = True) -> Line:
    return Line(run.get(key), label, colour_of(i), held_out, smooth, dashes_of(i, broken=held_out), key in run.made)


def _far_apart(lines: Sequence[Line]) -> bool:
    """Whether one curve's greatest value lies so far below another's that it would look like zero."""
    peaks = [float(np.nanmax(line.series.values)) for line in lines]
    peaks = [peak for peak in peaks if 0 < peak < np.inf]
    return bool(peaks) and max(peaks) > 10 * min(peaks)


def _made_note(lines: Sequence[Line]) -> str:
    made = [line.label for line in lines if line.made]
    if not made or len(made) == len(lines):
        return ", exp(loss)" if made else ""
    return f", exp(loss) for {' and '.join(made) if len(made) < 3 else f'{len(made)} of {len(lines)} lines'}"
