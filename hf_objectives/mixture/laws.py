"""How a loss depends on the weights of a mixture: candidates to try, laws fitted to the trials, and the best weights.

Needs the extra `search` (scikit-learn), which is imported when a law is fitted. Trains nothing; see
`recipes/mixture_search.py` for the experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError, DataError, nearest
from hf_objectives.mixture.schedule import normalised

Floats = NDArray[np.float64]
#: Losses [mixtures] from weights [mixtures, sources].
Predictor = Callable[[Floats], Floats]
Fit = Callable[[Floats, Floats, int], Predictor]

COMBINED = "combined"  # no name of a loss
MEAN = "mean"  # the form of a law that is none: the trials do not show that the mixture matters
MIN_TRIALS = 5
_LEAVE_ONE_OUT = 32  # trials up to which each is left out on its own
_FOLDS = 10
_PERMUTATIONS = 999
_SIGNIFICANT = 0.05
# Keeps the exponents of sources whose weight hardly varied near those of the others; small beside a residual of 1.
_PENALTY = 1e-3
_NOTHING = 0.01  # a share that counts as little more than none
_POOL, _ROUNDS, _REFINED = 4096, 10, 512  # mixtures that are compared: at first, and in each round around the best


# -- candidates ------------------------------------------------------------------------------------------------------


def draw_mixtures(prior: ArrayLike, n: int, *, concentration: float = 1.0, seed: int = 0) -> Floats:
    """Mixtures to try: the prior itself, then draws of a Dirichlet distribution around it (as RegMix, arXiv
    2407.01492).

    More of them for the same seed begin with the same ones, so that a search can be made longer.

    Args:
        prior: weights of the sources, [sources], 0 or more; normalised. A source of weight 0 gets none in any draw.
        n: how many.
        concentration: how close draws are to the prior; at 1, and for a prior of equal weights, all mixtures are alike
            likely. The parameters of the distribution are `concentration * sources * prior`, so its mean is the prior.
        seed: of the draws.

    Returns:
        Float64 [n, sources], rows that sum to one.

    Raises:
        ConfigError: a prior that means nothing, `n` below 1 or a concentration that is not above 0.
    """
    shares = normalised(prior)
    if n < 1 or not 0 < concentration < float("inf"):
        raise ConfigError(f"n is {n} and concentration {concentration}; expected at least 1, and a number above 0")
    used = np.flatnonzero(shares)
    drawn = np.zeros((n, len(shares)))
    drawn[0] = shares
    rng = np.random.default_rng(seed)
    for row in drawn[1:]:  # one by one: the begin of a longer list is the shorter one
        row[used] = _dirichlet(rng, concentration * len(used) * shares[used])
    return drawn


def _dirichlet(rng: np.random.Generator, alpha: Floats) -> Floats:
    """One draw; from logarithms, since with small parameters all gamma draws may be 0."""
    # Marsaglia and Tsang 2000, section 6: gamma(a) is gamma(a + 1) times u^(1/a).
    with np.errstate(over="ignore"):  # of a weight next to none, which becomes 0
        logs = np.log(rng.standard_gamma(alpha + 1)) + np.log(1 - rng.random(len(alpha))) / alpha
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


# -- laws ------------------------------------------------------------------------------------------------------------


def fit_mixing_law(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """L(r) = c + k exp(sum_j t_j r_j) (Ye et al., "Data Mixing Laws", arXiv 2403.16952, section 3).

    Weights sum to one, so k above 0 is part of the t_j. Least squares from several c, each with the t_j that are best on a
    logarithmic scale; c is 0 or more, as a loss is, and the t_j are held together by a small penalty, without which a
    source that hardly varied could have any.

    Args:
        weights: [trials, sources].
        losses: [trials], 0 or more.
        seed: not used, nothing is drawn.
    """
    from scipy.optimize import least_squares

    low, scale = float(losses.min()), float(losses.std()) or 1.0
    target, sources = (losses - low) / scale, weights.shape[1]
    centre = _PENALTY**0.5 * (np.eye(sources) - 1 / sources)

    def residuals(p: Floats) -> Floats:
        return np.concatenate((p[0] + _exp(weights @ p[1:]) - target, centre @ p[1:]))

    def slopes(p: Floats) -> Floats:
        rises = _exp(weights @ p[1:])[:, None] * weights
        head = np.column_stack((np.ones(len(weights)), rises))
        return np.vstack((head, np.column_stack((np.zeros(sources), centre))))

    floor = -low / scale
    found = []
    for share in (0.02, 0.3, 0.95):  # of the way from the lowest loss down to 0
        begin = min(share * floor, -1e-3)
        exponents = np.linalg.lstsq(weights, np.log(target - begin), rcond=None)[0]
        bounds = (np.r_[min(floor, begin) - 1e-9, np.full(sources, -np.inf)], np.inf)
        found.append(least_squares(residuals, np.r_[begin, exponents], slopes, bounds=bounds, max_nfev=200))
    best = min(found, key=lambda one: one.cost).x
    return lambda mixtures: low + scale * (best[0] + _exp(mixtures @ best[1:]))


def _exp(exponents: Floats) -> Floats:
    return np.exp(np.minimum(exponents, 50.0))


def fit_ridge(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """Ridge regression of the loss on the weights, both as logarithms, the penalty by leave-one-out: a power law of each
    source's share.

    One coefficient a source is what few trials bear. A share well under a percent counts as none, where the loss of what
    it teaches is largest and a straight line, or a square, would be drawn to those trials alone.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-5, 3, 17)))
    model.fit(np.log(weights + _NOTHING), np.log(np.maximum(losses, 1e-3 * losses.max() + 1e-300)))
    return lambda mixtures: _exp(model.predict(np.log(mixtures + _NOTHING)))


def fit_boosted(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """Gradient-boosted trees (RegMix, arXiv 2407.01492, section 3.2, which uses LightGBM); for many trials."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=100, learning_rate=0.1, max_depth=2, min_samples_leaf=2, random_state=seed
    )
    return model.fit(weights, losses).predict


def fit_mean(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """The mean of the losses, whatever the weights: what a law has to be better than."""
    mean = float(losses.mean())
    return lambda mixtures: np.full(len(mixtures), mean)


#: The forms, by name.
LAWS: dict[str, Fit] = {"mixing_law": fit_mixing_law, "ridge": fit_ridge, "boosted": fit_boosted}
_ALL = {**LAWS, MEAN: fit_mean}


@dataclass(frozen=True)
class FittedLaw:
    """How one loss depends on the weights, as far as trials show it.

    Attributes:
        form: the form that predicts trials best that it was not fitted to, a key of LAWS; "mean" where none predicts them.
        predict: losses [mixtures] from weights [mixtures, sources].
        cv_rmse: root mean square error in cross-validation of each form, and of the mean.
        p_value: how often the best form would do as well if the losses were dealt to the trials at random, times the
            number of forms that were tried.
        held_out: [trials], what the form gave for each trial when it was left out of the fit.
        weights, losses: the trials, [trials, sources] and [trials].
    """

    form: str
    predict: Predictor
    cv_rmse: Mapping[str, float]
    p_value: float
    held_out: Floats
    weights: Floats
    losses: Floats

    @property
    def matters(self) -> bool:
        """Whether the trials show that the mixture matters for this loss."""
        return self.form != MEAN


def fit_law(weights: ArrayLike, losses: ArrayLike, *, forms: Sequence[str] = tuple(LAWS), seed: int = 0) -> FittedLaw:
    """The law that predicts a loss best, by cross-validation: leave-one-out, or ten folds beyond 32 trials.

    The best form must have a lower error than the mean, and one that chance would not give: in fewer than one in twenty
    permutations of the trials against its held-out predictions, counted for every form that was tried (Bonferroni).
    Otherwise the law is the mean, of form "mean".

    Args:
        weights: of the trials, [trials, sources], rows that sum to one.
        losses: [trials].
        forms: names of the forms to try.
        seed: of folds, permutations and trees.

    Raises:
        ConfigError: an unknown form, or fewer than five trials.
        DataError: a loss that is negative or not finite, weights that are no mixture, or a number of each that differs.
    """
    weights, losses = _trials(weights, losses)
    for form in forms:
        if form not in LAWS:
            raise ConfigError(f"unknown form {form!r}; expected one of {', '.join(LAWS)}{nearest(form, LAWS)}")
    rng = np.random.default_rng(seed)
    held_out = {form: np.empty(len(losses)) for form in (*forms, MEAN)}
    for fold in _folds(len(losses), rng):
        rest = np.setdiff1d(np.arange(len(losses)), fold)
        for form, predicted in held_out.items():
            predicted[fold] = _ALL[form](weights[rest], losses[rest], seed)(weights[fold])
    errors = {form: float(np.sqrt(np.mean((losses - of) ** 2))) for form, of in held_out.items()}
    best = min(forms, key=errors.__getitem__)
    dealt = np.array([np.square(rng.permutation(losses) - held_out[best]).sum() for _ in range(_PERMUTATIONS)])
    as_good = dealt <= np.square(losses - held_out[best]).sum() * (1 + 1e-12)
    p_value = min(1.0, len(forms) * (1 + int(as_good.sum())) / (1 + _PERMUTATIONS))
    if errors[best] >= errors[MEAN] or p_value >= _SIGNIFICANT:
        best = MEAN
    return FittedLaw(best, _ALL[best](weights, losses, seed), errors, p_value, held_out[best], weights, losses)


def _trials(weights: ArrayLike, losses: ArrayLike) -> tuple[Floats, Floats]:
    w, y = np.asarray(weights, np.float64), np.asarray(losses, np.float64)
    if w.ndim != 2 or y.shape != w.shape[:1]:
        raise DataError(
            f"weights of shape {w.shape} and losses of shape {y.shape}; expected [trials, sources], [trials]"
        )
    if len(y) < MIN_TRIALS:
        raise ConfigError(f"{len(y)} trials; expected at least {MIN_TRIALS} to fit a law to")
    if not (np.isfinite(y) & (y >= 0)).all():
        trial = int(np.argmin(np.isfinite(y) & (y >= 0)))
        raise DataError(f"the loss of trial {trial} is {y[trial]}; expected a number, 0 or more")
    wrong = ~(np.isclose(w.sum(1), 1, atol=1e-6) & (w >= 0).all(1))
    if wrong.any():
        trial = int(np.argmax(wrong))
        raise DataError(f"the weights of trial {trial} are {w[trial].tolist()}; expected 0 or more, adding to 1")
    return w, y


def _folds(n: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    order = rng.permutation(n)
    return np.array_split(order, n if n <= _LEAVE_ONE_OUT else _FOLDS)


# -- the best weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recommendation:
    """Weights that minimise a combination of losses, as far as the trials show.

    Attributes:
        weights: float64 [sources].
        weight_errors: float64 [sources], how far each weight moves when the trials are drawn again (bootstrap).
        predicted, prior: what the laws give for these weights and for the prior, by name of the loss, and "combined": the
            loss and its standard error.
        gain: how much lower the combined loss is than the prior's, and the standard error of that.
        notes: what has to be known beside the numbers.
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
    """The weights with the lowest combination of losses, among the mixtures that the trials enclose.

    Only convex combinations of the trials' weights, and the prior, are compared: beyond what was tried a law is a guess,
    and a minimum of guesses is where they are most wrong. A best mixture on that border is said in `notes`; draw
    candidates around it to go on. Where the losses show nothing (all laws are the mean) it is the prior.

    Errors are standard deviations over the bootstrap: trials drawn with replacement, laws of the same form fitted again.
    They hold how well the trials determine the law, not how well the form fits; that is `FittedLaw.cv_rmse`.

    Args:
        laws: the law of each evaluation loss, by name, fitted to the same trials.
        combination: what to minimise: the sum of these weights times the losses of these names.
        prior: the weights to compare with, [sources]; normalised.
        sources: names of the sources, for notes.
        bootstrap: how often trials are drawn again.
        seed: of the mixtures that are compared and of the bootstrap.

    Raises:
        ConfigError: an unknown name, a negative weight, or none above 0.
    """
    check_combination(combination, laws)
    start, trials = normalised(prior), next(iter(laws.values())).weights
    factors = {name: float(combination.get(name, 0)) for name in laws}
    matter = any(laws[name].matters for name, factor in factors.items() if factor)
    points = np.vstack((start, trials))  # what mixtures are made of
    predictors = {name: law.predict for name, law in laws.items()}
    best = _lowest(predictors, factors, points, seed) if matter else start
    both = np.vstack((start, best))
    values = _losses(predictors, factors, both)
    rng = np.random.default_rng(seed)
    again, moved = [], []
    for _ in range(bootstrap if matter else 0):
        drawn = rng.integers(len(trials), size=len(trials))
        refitted = {name: _ALL[law.form](trials[drawn], law.losses[drawn], seed) for name, law in laws.items()}
        again.append(_losses(refitted, factors, both))
        moved.append(_lowest(refitted, factors, points, seed))
    errors = np.std(again, axis=0, ddof=1) if len(again) > 1 else np.zeros_like(values)
    gains = [one[-1, 0] - one[-1, 1] for one in again]
    before, after = (
        {name: (float(v), float(e)) for name, v, e in zip((*laws, COMBINED), values[:, i], errors[:, i], strict=True)}
        for i in (0, 1)
    )
    return Recommendation(
        best,
        np.std(moved, axis=0, ddof=1) if len(moved) > 1 else np.zeros(len(best)),
        after,
        before,
        (before[COMBINED][0] - after[COMBINED][0], float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0),
        _notes({name: laws[name] for name, factor in factors.items() if factor}, sources, best, start),
    )


def check_combination(combination: Mapping[str, float], known: Mapping[str, object] | Sequence[str]) -> None:
    """Whether losses can be combined so.

    Raises:
        ConfigError: an unknown name, a negative weight, or none above 0.
    """
    for name, factor in combination.items():
        if name == COMBINED:
            raise ConfigError(f"an evaluation is named {name!r}, as the combination of all is; give it another name")
        if name not in known:
            raise ConfigError(f"unknown evaluation {name!r}; expected one of {', '.join(known)}{nearest(name, known)}")
        if not 0 <= factor < float("inf"):
            raise ConfigError(f"evaluation {name!r}: weight is {factor}; expected a number, 0 or more")
    if not any(combination.values()):
        raise ConfigError("the weights of all evaluations are 0; expected one above 0")


def _losses(predictors: Mapping[str, Predictor], factors: Mapping[str, float], mixtures: Floats) -> Floats:
    """[losses + 1, mixtures], the combined one last."""
    values = np.array([predict(mixtures) for predict in predictors.values()])
    return np.vstack((values, np.array([factors[name] for name in predictors]) @ values))


def _lowest(predictors: Mapping[str, Predictor], factors: Mapping[str, float], points: Floats, seed: int) -> Floats:
    """The mixture with the lowest combined loss among convex combinations of points: the best of many, then rounds of
    narrower draws around the best one. Needs no slope, which trees have not."""
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
    """A search as JSON values: of every loss, and of the combined one, the trials, the law, and what it gives for the
    prior ("natural") and the recommended weights beside what `checks` of both measured, each [seeds, losses].

    `influential` is the source whose weight goes with the combined loss most closely, over the trials, and that loss by
    the laws as the source's weight changes and the others share the rest as in the prior.
    """
    first = next(iter(laws.values()))
    factors = np.array([combination.get(name, 0) for name in laws])
    losses = np.column_stack([law.losses for law in laws.values()])
    # The combined one is the last, in trials and in checks.
    losses, *checks = (np.column_stack((one, one @ factors)) for one in (losses, *checks))
    moves = [
        abs(np.corrcoef(of, losses[:, -1])[0, 1]) if np.ptp(of) * np.ptp(losses[:, -1]) else 0 for of in first.weights.T
    ]
    most = int(np.argmax(moves))
    along = np.linspace(first.weights[:, most].min(), first.weights[:, most].max(), 50)
    mixtures = np.outer(1 - along, np.where(np.arange(len(prior)) == most, 0, prior) / (1 - prior[most] or 1))
    mixtures[:, most] = along
    curve = _losses({name: law.predict for name, law in laws.items()}, dict(zip(laws, factors, strict=True)), mixtures)[
        -1
    ]
    sets: dict[str, dict[str, Any]] = {}
    for i, name in enumerate([*laws, COMBINED]):
        sets[name] = {"weight": combination.get(name), "trials": losses[:, i].tolist()}
        for k, (kind, predicted) in enumerate({"natural": found.prior, "recommended": found.predicted}.items()):
            sets[name][kind] = {"predicted": predicted[name], "measured": checks[k][:, i].tolist() if checks else []}
    for name, law in laws.items():
        about = {"law": law.form, "cv_rmse": dict(law.cv_rmse), "p_value": law.p_value}
        sets[name] |= {**about, "held_out": law.held_out.tolist()}
    return {
        "sources": list(sources),
        "natural": prior.tolist(),
        "recommended": found.weights.tolist(),
        "recommended_error": found.weight_errors.tolist(),
        "predicted_gain": found.gain,
        "evaluation": sets,
        "trials": first.weights.tolist(),
        "influential": {"source": most, "shares": along.tolist(), "combined": curve.tolist()},
        "notes": found.notes,
    }
