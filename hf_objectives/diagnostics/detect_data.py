"""What the data show: an order that repeats in every epoch, too few trained tokens, a mixture that drifts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from hf_objectives.diagnostics.robust import Values
from hf_objectives.diagnostics.run_view import RunView, Sign

_BINS = 12  # of an epoch
_CHANCE = 1e-4  # of a profile as clear as that where there is none
_FEW_EPOCHS = 3
_ALIKE = 0.75  # correlation between the profiles of epochs
_LEAST = 0.02  # of the loss: a smaller profile is none
_FEW_TRAINED = 0.01  # of the tokens
_OFF = 0.02  # of the whole: a share that is off by less is rounding
_CORNERS = 500  # that are tried for the beginning of a drift


def sawtooth(run: RunView) -> Iterator[Sign]:
    """The loss repeats one profile in every epoch. That of shuffled data does not."""
    steps, values = run["loss"]
    table = _loss_by_epoch(run)
    if table is None:
        return
    epochs, bins = table.shape
    rest = _against_the_trend(table)
    profile = rest.mean(axis=0)
    amplitude = float(profile.max() - profile.min())
    # The F-test of an analysis of variance: the profile against what is left of the epochs without it.
    free = (len(rest) - 1) * (bins - 1)
    spread = max(float(((rest - profile) ** 2).sum()) / free, 1e-300)
    ratio = len(rest) * float((profile**2).sum()) / (bins - 1) / spread
    chance = float(stats.f.sf(ratio, bins - 1, free))
    # The variance of two or three epochs says little. There the profile must stand far out of the noise of a bin.
    deviation = 1.25 * run.noise / max(1.0, len(values) / table.size) ** 0.5
    alike = np.asarray(np.corrcoef(rest))[np.triu_indices(len(rest), 1)].mean() if (rest.std(axis=1) > 0).all() else 0.0
    clear = chance < _CHANCE or (epochs <= _FEW_EPOCHS and alike > _ALIKE and amplitude > 8 * deviation)
    if clear and amplitude > max(_LEAST * abs(float(np.median(table))), 4 * deviation):
        evidence = (
            f"the loss repeats one profile in each of {epochs} epochs, {amplitude:.3g} from low to high, highest "
            f"{int(profile.argmax()) / bins:.0%} into the epoch (F = {ratio:.1f}, p = {chance:.0e}; correlation between "
            f"epochs {alike:.2f})"
        )
        yield Sign("warning", int(steps[0]), int(steps[-1]), evidence)


def _loss_by_epoch(run: RunView) -> Values | None:
    """Median loss of each part of each whole epoch, float64 [epochs, parts]; None where the log has too little."""
    steps, values = run["loss"]
    epochs = run.epochs_at(steps)
    if run.is_policy or epochs is None or len(run["epoch"].steps) < 2 or not len(values):
        return None
    whole = int(np.floor(epochs.max() + 1e-6))
    bins = int(min(_BINS, len(values) / max(epochs.max(), 1e-9) // 2))
    if whole < 2 or bins < 4:
        return None
    # A line is written at the end of the steps that it averages.
    cell = np.clip(((epochs - 1e-9) * bins).astype(int), 0, None)
    parts = [values[cell == k] for k in range(whole * bins)]
    return np.array([np.median(part) for part in parts]).reshape(whole, bins) if all(map(len, parts)) else None


def _against_the_trend(table: Values) -> Values:
    """What goes against the loss's rise or fall, [epochs, parts]; what a trend in one direction explains is no profile.

    Without the first epoch, which falls too steeply, where there are others.
    """
    flat = table.ravel()
    left = [flat - np.asarray(optimize.isotonic_regression(flat, increasing=up).x) for up in (False, True)]
    rest = min(left, key=lambda values: float((values**2).sum())).reshape(table.shape)
    return rest[1:] if len(rest) > 2 else rest


def nothing_trained(run: RunView) -> Iterator[Sign]:
    """The loss is exactly 0 from the first step on."""
    steps, values = run.curves.get("loss")
    norms = run.curves.get("grad_norm").values
    if run.zero_from == 0 and np.isfinite(norms).all():  # else it is a NaN that was filtered
        evidence = f"the loss is exactly 0 at all of {len(values)} logged steps"
        evidence += ", and so is the gradient norm" if len(norms) and not norms.any() else ""
        yield Sign("error", int(steps[0]), int(steps[-1]), evidence)


def few_trained(run: RunView) -> Iterator[Sign]:
    """Less than 1 % of what the model reads is trained."""
    steps, trained = run["num_supervised_tokens"]
    seen = run["num_tokens_seen"].values
    if len(trained) and len(seen) and seen[-1] > 0 and (share := trained[-1] / seen[-1]) < _FEW_TRAINED:
        evidence = f"{trained[-1]:,.0f} of {seen[-1]:,.0f} tokens are trained ({share:.2%})"
        yield Sign("warning", int(steps[0]), int(steps[-1]), evidence)


def mixture_drift(run: RunView) -> Iterator[Sign]:
    """The share of a source that was given is not what was asked for."""
    for key in sorted(run.curves.series):
        source = key.removeprefix("mixture/").removesuffix("/share")
        if key != f"mixture/{source}/share":
            continue
        steps, shares = run[key]
        asked = run[f"mixture/{source}/asked"]
        if len(shares) < 4 or not len(asked.values):
            continue
        off = shares - np.interp(steps, *asked)
        late = off[-max(2, len(off) // 4) :]
        worst = float(np.median(late))
        if abs(worst) > _OFF and np.all(np.sign(late) == np.sign(worst)):
            evidence = f"source {source!r}: {shares[-1]:.1%} given, {asked.values[-1]:.1%} asked"
            yield Sign("warning", int(steps[_departure(off)]), int(steps[-1]), evidence)


def _departure(off: NDArray[np.float64]) -> int:
    """Index at which a curve leaves 0: the corner of the line from 0 that fits it best (least squares)."""
    index = np.arange(len(off))

    def error(corner: int) -> float:
        risen = np.maximum(index - corner, 0)
        slope = float(risen @ off) / float(risen @ risen)
        return float(((off - slope * risen) ** 2).sum())

    return int(min(np.unique(np.linspace(0, len(off) - 2, _CORNERS).astype(int)), key=error))
