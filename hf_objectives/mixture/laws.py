"""Mixing laws: how a loss depends on the weights of a mixture, fitted to trials and chosen by cross-validation.

Needs the extra `search` (scipy and scikit-learn), which is imported when a law is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.types import check_one_of

Floats = NDArray[np.float64]
#: Losses [mixtures] from weights [mixtures, sources].
Predictor = Callable[[Floats], Floats]
Fit = Callable[[Floats, Floats, int], Predictor]

MEAN = "mean"  # the form of a law that is none: the trials do not show that the mixture matters
MIN_TRIALS = 5
_LEAVE_ONE_OUT = 32  # trials up to which each is left out on its own
_FOLDS = 10
_PERMUTATIONS = 999
_SIGNIFICANT = 0.05
# Keeps the exponents of sources whose weight hardly varied near those of the others; small beside a residual of 1.
_PENALTY = 1e-3
_NOTHING = 0.01  # a share that counts as little more than none


def fit_mixing_law(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """L(r) = c + k exp(sum_j t_j r_j) (Ye et al., "Data Mixing Laws", arXiv 2403.16952, section 3).

    Weights sum to one, so a k above 0 is part of the t_j. Least squares from several c, each with the t_j that are best on
    a logarithmic scale. c is 0 or more, as a loss is. A small penalty keeps the t_j together; without it a source whose
    weight hardly varied could have any. Nothing is drawn, so the seed is not used.
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
    best = min(found, key=lambda fit: fit.cost).x
    return lambda mixtures: low + scale * (best[0] + _exp(mixtures @ best[1:]))


def _exp(exponents: Floats) -> Floats:
    return np.exp(np.minimum(exponents, 50.0))


def fit_ridge(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """Ridge regression of the loss on the weights, both as logarithms, the penalty by leave-one-out: a power law of each
    source's share.

    A share well under a percent counts as none: there the loss is largest, and a straight line would be drawn to those
    trials alone.
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

    model = GradientBoostingRegressor(max_depth=2, min_samples_leaf=2, random_state=seed)
    return model.fit(weights, losses).predict


def fit_mean(weights: Floats, losses: Floats, seed: int = 0) -> Predictor:
    """The mean of the losses, whatever the weights: what a law has to be better than."""
    mean = float(losses.mean())
    return lambda mixtures: np.full(len(mixtures), mean)


#: The forms of a law, by name.
LAWS: dict[str, Fit] = {"mixing_law": fit_mixing_law, "ridge": fit_ridge, "boosted": fit_boosted}
FORMS = {**LAWS, MEAN: fit_mean}


@dataclass(frozen=True)
class FittedLaw:
    """How one loss depends on the weights, as far as trials show it.

    Attributes:
        form: the form with the lowest error on trials that it was not fitted to, a key of LAWS; "mean" where none predicts
            them.
        predict: losses [mixtures] from weights [mixtures, sources].
        cv_rmse: root mean square error in cross-validation of each form, and of the mean.
        p_value: how often the best form would do as well if the losses were assigned to the trials at random, times the
            number of forms that were tried.
        held_out: [trials], the prediction for each trial when it was left out of the fit.
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
    """Fit the law that predicts a loss best, by cross-validation: leave-one-out, or ten folds beyond 32 trials.

    The best form must have a lower error than the mean, and a lower one than chance gives: fewer than one in twenty
    permutations of the trials against its held-out predictions, counted for every form that was tried (Bonferroni).
    Otherwise the law is the mean, of form "mean".

    Args:
        weights: of the trials, [trials, sources], rows that sum to one.
        losses: [trials].
        forms: names of the forms to try.
        seed: seed of folds, permutations and trees.

    Raises:
        ConfigError: a form is unknown, or there are fewer than five trials.
        DataError: a loss is negative or not finite, weights are no mixture, or their numbers differ.
    """
    from scipy.stats import permutation_test

    weights, losses = _check_trials(weights, losses)
    for form in forms:
        check_one_of("form", form, LAWS)
    rng = np.random.default_rng(seed)
    held_out = {form: np.empty(len(losses)) for form in (*forms, MEAN)}
    folds = len(losses) if len(losses) <= _LEAVE_ONE_OUT else _FOLDS
    for fold in np.array_split(rng.permutation(len(losses)), folds):
        rest = np.setdiff1d(np.arange(len(losses)), fold)
        for form, predicted in held_out.items():
            predicted[fold] = FORMS[form](weights[rest], losses[rest], seed)(weights[fold])
    errors = {form: float(np.sqrt(np.mean((losses - predicted) ** 2))) for form, predicted in held_out.items()}
    best = min(forms, key=errors.__getitem__)
    chance = permutation_test(
        (losses,),
        lambda assigned, axis: np.square(assigned - held_out[best]).sum(axis=axis),
        permutation_type="pairings",
        n_resamples=_PERMUTATIONS,
        alternative="less",
        random_state=rng,
    )
    p_value = min(1.0, len(forms) * float(chance.pvalue))
    form = MEAN if errors[best] >= errors[MEAN] or p_value >= _SIGNIFICANT else best
    return FittedLaw(form, FORMS[form](weights, losses, seed), errors, p_value, held_out[form], weights, losses)


def _check_trials(weights: ArrayLike, losses: ArrayLike) -> tuple[Floats, Floats]:
    w, y = np.asarray(weights, np.float64), np.asarray(losses, np.float64)
    if w.ndim != 2 or y.shape != w.shape[:1]:
        found = f"weights of shape {w.shape} and losses of shape {y.shape}"
        raise DataError(f"{found}; expected [trials, sources], [trials]")
    if len(y) < MIN_TRIALS:
        raise ConfigError(f"{len(y)} trials; expected at least {MIN_TRIALS} to fit a law to")
    for trial in np.flatnonzero(~(np.isfinite(y) & (y >= 0))).tolist():
        raise DataError(f"the loss of trial {trial} is {y[trial]}; expected a number, 0 or more")
    for trial in np.flatnonzero(~(np.isclose(w.sum(1), 1, atol=1e-6) & (w >= 0).all(1))).tolist():
        raise DataError(f"the weights of trial {trial} are {w[trial].tolist()}; expected 0 or more, adding to 1")
    return w, y
