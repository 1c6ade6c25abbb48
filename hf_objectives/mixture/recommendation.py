"""The best weights under fitted laws, with their errors, and the summary of a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.laws import FORMS, MEAN, FittedLaw, Floats, Predictor
from hf_objectives.mixture.schedule import normalised
from hf_objectives.types import check_one_of

COMBINED = "combined"  # the combination of all losses; no name of a loss
_POOL, _ROUNDS, _REFINED = 4096, 10, 512  # mixtures that are compared: at first, and in each round around the best


@dataclass(frozen=True)
class Recommendation:
    """Weights that minimise a combination of losses, as far as the trials show.

    Attributes:
        weights: float64 [sources].
        weight_errors: float64 [sources], how far each weight moves when the trials are drawn again (bootstrap).
        predicted, prior: by name of the loss, and "combined", what the laws give for these weights and for the prior: the
            loss and its standard error.
        gain: how much lower the combined loss is than the prior's, and the standard error of that.
        notes: what a user should know beside the numbers.
    """

    weights: Floats
    weight_errors: Floats
    predicted: dict[str, tuple[float, float]]
    prior: dict[str, tuple[float, float]]
    gain: tuple[float, float]
    notes: list[str]


def recommend(
    laws: Mapping[str, FittedLaw],
    combination: Mapping[str, float],
    prior: ArrayLike,
    *,
    sources: Sequence[str] | None = None,
    bootstrap: int = 100,
    seed: int = 0,
) -> Recommendation:
    """Find the weights with the lowest combination of losses, among the mixtures that the trials enclose.

    Only convex combinations of the trials' weights, and the prior, are compared. Beyond what was tried a law is a guess,
    and a minimum of guesses is where they are most wrong. If the best mixture is on that border, `notes` say so; draw
    candidates around it to go on. If the losses show nothing (all laws are the mean), the result is the prior.

    Errors are standard deviations over the bootstrap: trials are drawn with replacement, and laws of the same form fitted
    again. They say how well the trials determine the law, not how well the form fits; that is `FittedLaw.cv_rmse`.

    Args:
        laws: the law of each evaluation loss, by name, fitted to the same trials.
        combination: what to minimise: the sum of these weights times the losses of these names.
        prior: the weights to compare with, [sources]; normalised.
        sources: names of the sources, for notes.
        bootstrap: how often trials are drawn again.
        seed: seed of the mixtures that are compared and of the bootstrap.

    Raises:
        ConfigError: a name is unknown, a weight is negative, or none is above 0.
    """
    check_combination(combination, laws)
    start, trials = normalised(prior), next(iter(laws.values())).weights
    factors = {name: float(combination.get(name, 0)) for name in laws}
    matter = any(laws[name].matters for name, factor in factors.items() if factor)
    points = np.vstack((start, trials))  # the corners of the mixtures that are compared
    predictors = {name: law.predict for name, law in laws.items()}
    best = _lowest(predictors, factors, points, seed) if matter else start
    both = np.vstack((start, best))
    values = _losses(predictors, factors, both)
    rng = np.random.default_rng(seed)
    again, moved = [], []
    for _ in range(bootstrap if matter else 0):
        drawn = rng.integers(len(trials), size=len(trials))
        refitted = {name: FORMS[law.form](trials[drawn], law.losses[drawn], seed) for name, law in laws.items()}
        again.append(_losses(refitted, factors, both))
        moved.append(_lowest(refitted, factors, points, seed))
    errors = _spread(again, values)
    before, after = (
        {name: (float(v), float(e)) for name, v, e in zip((*laws, COMBINED), values[:, i], errors[:, i], strict=True)}
        for i in (0, 1)
    )
    gain = before[COMBINED][0] - after[COMBINED][0]
    gain_error = float(_spread([losses[-1, 0] - losses[-1, 1] for losses in again], np.zeros(())))
    counted = {name: laws[name] for name, factor in factors.items() if factor}
    notes = _notes(counted, sources, best, start)
    return Recommendation(best, _spread(moved, best), after, before, (gain, gain_error), notes)


def _spread(values: Sequence[Any], shape: Floats) -> Floats:
    """Standard deviations over repetitions; 0 where there are none."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros_like(shape)


def check_combination(combination: Mapping[str, float], known: Iterable[str]) -> None:
    """Raise a ConfigError where a name is unknown, a weight is under 0, or none is above 0."""
    for name, factor in combination.items():
        if name == COMBINED:
            raise ConfigError(f"an evaluation is named {name!r}, as the combination of all is; give it another name")
        check_one_of("evaluation", name, known)
        if not 0 <= factor < float("inf"):
            raise ConfigError(f"evaluation {name!r}: weight is {factor}; expected a number, 0 or more")
    if not any(combination.values()):
        raise ConfigError("the weights of all evaluations are 0; expected one above 0")


def _losses(predictors: Mapping[str, Predictor], factors: Mapping[str, float], mixtures: Floats) -> Floats:
    """Predicted losses [losses + 1, mixtures], the combined one last."""
    values = np.array([predict(mixtures) for predict in predictors.values()])
    return np.vstack((values, np.array([factors[name] for name in predictors]) @ values))


def _lowest(predictors: Mapping[str, Predictor], factors: Mapping[str, float], points: Floats, seed: int) -> Floats:
    """The convex combination of points with the lowest combined loss: the best of many, then rounds of narrower draws
    around the best one. Needs no slope, which trees do not have."""
    rng = np.random.default_rng(seed)

    def combined(parts: Floats) -> Floats:
        return _losses(predictors, factors, parts @ points)[-1]

    n = len(points)
    drawn = rng.dirichlet(np.full(n, 2 / n), _POOL)  # a few points in each, so that edges are looked at too
    parts = np.vstack((np.eye(n), drawn))
    best = parts[np.argmin(combined(parts))]
    for step in 0.5 ** np.arange(1, _ROUNDS + 1):
        parts = np.vstack((best, (1 - step) * best + step * rng.dirichlet(np.full(n, 2 / n), _REFINED)))
        # Towards points, and away from them, as far as no part goes below 0.
        away = np.maximum(2 * best - parts, 0)
        parts = np.vstack((parts, away / away.sum(1, keepdims=True)))
        best = parts[np.argmin(combined(parts))]
    return best @ points


def _notes(laws: Mapping[str, FittedLaw], sources: Sequence[str] | None, best: Floats, prior: Floats) -> list[str]:
    notes = []
    for name, law in laws.items():
        if not law.matters:
            form, error = min(((f, e) for f, e in law.cv_rmse.items() if f != MEAN), key=lambda pair: pair[1])
            notes.append(
                f"the {len(law.losses)} trials do not show that the mixture matters for {name}: no law predicts a trial "
                f"better than the mean of the others does (CV error {error:.4g} of {form}, {law.cv_rmse[MEAN]:.4g} of the "
                f"mean, p {law.p_value:.2g})"
            )
    if len(notes) == len(laws):
        return [*notes, "so the recommended weights are the prior's; try more trials, wider ones, or longer training"]
    most = next(iter(laws.values())).weights.max(0)
    for i in np.flatnonzero((best > prior) & (best > 0.9 * most)).tolist():
        notes.append(
            f"the recommended share of {sources[i] if sources else f'source {i}'}, {best[i]:.1%}, is near the largest that "
            f"was tried, {most[i]:.1%}: more may be better; search again around the recommended weights"
        )
    return notes


def summarise(
    sources: Sequence[str],
    prior: Floats,
    laws: Mapping[str, FittedLaw],
    combination: Mapping[str, float],
    found: Recommendation,
    checks: Sequence[Floats] = (),
) -> dict[str, Any]:
    """Summarise a search as JSON values.

    For every loss, and the combined one: the trials, the law, and for the prior ("natural") and the recommended weights
    what the law predicts and what `checks` measured, each [seeds, losses].

    `influential` is the source whose weight correlates most with the combined loss over the trials. Its curve is that loss
    by the laws as the source's weight changes and the others share the rest as in the prior.
    """
    trials = next(iter(laws.values())).weights
    factors = {name: combination.get(name, 0) for name in laws}
    # The combined loss is the last column, in trials and in checks.
    losses, *checks = (
        np.column_stack((values, values @ np.array(list(factors.values()))))
        for values in (np.column_stack([law.losses for law in laws.values()]), *checks)
    )
    moves = [abs(np.corrcoef(w, losses[:, -1])[0, 1]) if np.ptp(w) * np.ptp(losses[:, -1]) else 0 for w in trials.T]
    most = int(np.argmax(moves))
    shares = np.linspace(trials[:, most].min(), trials[:, most].max(), 50)
    mixtures = np.outer(1 - shares, np.where(np.arange(len(prior)) == most, 0, prior) / (1 - prior[most] or 1))
    mixtures[:, most] = shares
    curve = _losses({name: law.predict for name, law in laws.items()}, factors, mixtures)[-1]
    sets: dict[str, dict[str, Any]] = {}
    for i, name in enumerate([*laws, COMBINED]):
        sets[name] = {"weight": combination.get(name), "trials": losses[:, i].tolist()}
        for k, (kind, predicted) in enumerate({"natural": found.prior, "recommended": found.predicted}.items()):
            sets[name][kind] = {"predicted": predicted[name], "measured": checks[k][:, i].tolist() if checks else []}
    for name, law in laws.items():
        sets[name] |= {"law": law.form, "cv_rmse": dict(law.cv_rmse), "p_value": law.p_value}
        sets[name]["held_out"] = law.held_out.tolist()
    return {
        "sources": list(sources),
        "natural": prior.tolist(),
        "recommended": found.weights.tolist(),
        "recommended_error": found.weight_errors.tolist(),
        "predicted_gain": found.gain,
        "evaluation": sets,
        "trials": trials.tolist(),
        "influential": {"source": most, "shares": shares.tolist(), "combined": curve.tolist()},
        "notes": found.notes,
    }
