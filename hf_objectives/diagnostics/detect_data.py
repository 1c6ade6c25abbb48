"""Signatures of the data: order that repeats in every epoch, too few trained tokens, a mixture that drifts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from hf_objectives.diagnostics.curves import Curves
from hf_objectives.diagnostics.detect_loss import finite, of_policy
from hf_objectives.diagnostics.robust import noise
from hf_objectives.inspection import Finding

_BINS = 12  # of an epoch
_CHANCE = 1e-4  # of a profile as clear as that without one
_FEW_EPOCHS = 3
_ALIKE = 0.75  # correlation between the profiles of epochs
_FEW = 0.01  # of the tokens
_OFF = 0.02  # of the whole: a share that is off by less is rounding
_CORNERS = 500  # that are tried for the beginning of a drift
_LOSS_SHARE = 0.02  # of the loss


def sawtooth(run: Curves) -> Iterator[Finding]:
    """sawtooth: the loss repeats one profile in every epoch, which well shuffled data has not."""
    steps, values = finite(run.get("loss"))
    epochs = finite(run.get("epoch"))
    if of_policy(run) or len(epochs.steps) < 2 or not len(values):
        return
    at = np.interp(steps, epochs.steps, epochs.values)
    whole = int(np.floor(at.max() + 1e-6))
    per_epoch = len(values) / max(at.max(), 1e-9)
    bins = int(min(_BINS, per_epoch // 2))
    if whole < 2 or bins < 4:
        return
    table = np.full((whole, bins), np.nan)
    # A line is written at the end of the steps that it averages.
    cell = np.clip(((at - 1e-9) * bins).astype(int), 0, None)
    for k in range(whole * bins):
        if (here := cell == k).any():
            table[k // bins, k % bins] = np.median(values[here])
    if np.isnan(table).any():
        return
    # What a falling loss explains (or a rising one) is no profile: only what goes against it. The first epoch falls too
    # steeply to tell.
    flat = table.ravel()
    fits = [optimize.isotonic_regression(flat, increasing=up).x for up in (False, True)]
    fit = min(fits, key=lambda x: float(((flat - x) ** 2).sum())).reshape(table.shape)
    rest = (table - fit)[1:] if whole > 2 else table - fit
    profile = rest.mean(axis=0)
    amplitude = float(profile.max() - profile.min())
    left = rest - profile
    free = (len(rest) - 1) * (bins - 1)
    spread = max(float((left**2).sum()) / free, 1e-300)
    ratio = len(rest) * float((profile**2).sum()) / (bins - 1) / spread
    chance = float(stats.f.sf(ratio, bins - 1, free))
    # Two or three epochs say little by their variance; there the profile has to stand far out of the noise of a bin.
    of_bin = 1.25 * noise(values) / max(1.0, len(values) / table.size) ** 0.5
    alike = np.corrcoef(rest)[np.triu_indices(len(rest), 1)].mean() if (rest.std(axis=1) > 0).all() else 0.0
    clear = chance < _CHANCE or (whole <= _FEW_EPOCHS and alike > _ALIKE and amplitude > 8 * of_bin)
    if clear and amplitude > max(_LOSS_SHARE * abs(float(np.median(table))), 4 * of_bin):
        high = int(profile.argmax()) / bins
        yield Finding(
            "sawtooth",
            int(steps[0]),
            "warning",
            f"the loss repeats one profile in each of {whole} epochs, {amplitude:.3g} from low to high, highest "
            f"{high:.0%} into the epoch (F = {ratio:.1f}, p = {chance:.0e}; correlation between epochs {alike:.2f})",
            "The order of the data repeats: sorted by source or length, or shards read one after another. Shuffle over the "
            "whole dataset, not in a buffer, with another seed in every epoch; mix sources (build_mixture).",
            int(steps[-1]),
        )


def few_supervised_tokens(run: Curves) -> Iterator[Finding]:
    """few_supervised_tokens: less than 1 % of what the model reads is trained on."""
    steps, trained = finite(run.get("num_supervised_tokens"))
    _, seen = finite(run.get("num_tokens_seen"))
    if not len(trained) or not len(seen) or seen[-1] <= 0:
        return
    share = trained[-1] / seen[-1]
    if share < _FEW:
        yield Finding(
            "few_supervised_tokens",
            int(steps[0]),
            "warning",
            f"{trained[-1]:,.0f} of {seen[-1]:,.0f} tokens are trained ({share:.2%})",
            "Look at the labels (hf-objectives inspect): a template whose answers are not found, answers cut off by "
            "max_length, or very long prompts.",
            int(steps[-1]),
        )


def _departure(off: NDArray[np.float64]) -> int:
    """Index at which a curve leaves 0: the corner of the line from 0 that fits it best (least squares)."""
    at = np.arange(len(off))
    best, where = np.inf, 0
    for corner in np.unique(np.linspace(0, len(off) - 2, _CORNERS).astype(int)):
        risen = np.maximum(at - corner, 0)
        slope = float(risen @ off) / float(risen @ risen)
        error = float(((off - slope * risen) ** 2).sum())
        if error < best:
            best, where = error, int(corner)
    return where


def mixture_drift(run: Curves) -> Iterator[Finding]:
    """mixture_drift: a source's share of what was given is not what was asked for."""
    for key in sorted(run.series):
        if not (key.startswith("mixture/") and key.endswith("/share")):
            continue
        steps, shares = finite(run.get(key))
        asked = finite(run.get(key.removesuffix("share") + "asked"))
        if len(shares) < 4 or not len(asked.values):
            continue
        off = shares - np.interp(steps, asked.steps, asked.values)
        late = off[-max(2, len(off) // 4) :]
        worst = float(np.median(late))
        if abs(worst) > _OFF and np.all(np.sign(late) == np.sign(worst)):
            begin = _departure(off)
            yield Finding(
                "mixture_drift",
                int(steps[begin]),
                "warning",
                f"source {key.split('/', 1)[1].removesuffix('/share')!r}: {shares[-1]:.1%} given, "
                f"{asked.values[-1]:.1%} asked",
                "A source that is exhausted (max_epochs), rows of another length than the weights assume (unit='tokens'), or "
                "a resume that lost the mixture's state.",
                int(steps[-1]),
            )
