"""Mixing laws: a law that made the losses is found again, and noise is called noise."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.laws import LAWS, fit_law, fit_mixing_law, fit_ridge
from hf_objectives.mixture.recommendation import recommend
from hf_objectives.mixture.weights import draw_mixtures

pytest.importorskip("sklearn", reason="scikit-learn is an extra: pip install 'hf-objectives[search]'")
pytest.importorskip("scipy", reason="scipy is an extra: pip install 'hf-objectives[search]'")

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])


def losses_of(weights, c=1.2, t=(0.3, 0.5, -1.0, -4.0)):
    """An exponential law by hand: the fourth source teaches most, the first two hurt a little."""
    return c + np.exp(weights @ np.array(t))


@pytest.mark.slow
def test_an_exponential_law_is_found_again():
    weights, fresh = draw_mixtures(PRIOR, 20, seed=0), draw_mixtures(PRIOR, 200, concentration=2, seed=1)
    predicted = fit_mixing_law(weights, losses_of(weights))(fresh)
    truth = losses_of(fresh)
    assert np.abs(predicted - truth).max() < 0.02 * np.ptp(truth)
    law = fit_law(weights, losses_of(weights))
    assert law.form == "mixing_law" and law.matters and law.p_value < 0.01
    assert law.cv_rmse["mixing_law"] < 0.1 * law.cv_rmse["mean"]


@pytest.mark.slow
def test_a_power_law_is_found_again():
    weights = draw_mixtures(PRIOR, 24, seed=0)
    truth = 2 * np.prod((weights + 0.01) ** [0.0, 0.05, -0.1, -0.3], axis=1)
    assert fit_ridge(weights, truth)(weights) == pytest.approx(truth, rel=2e-3)
    law = fit_law(weights, truth)
    assert law.form == "ridge" and law.cv_rmse["ridge"] < 0.1 * law.cv_rmse["mean"]


@pytest.mark.slow
def test_the_error_is_that_of_trials_left_out():
    weights, losses = draw_mixtures(PRIOR, 8, seed=0), np.arange(8.0)
    law = fit_law(weights, losses)
    others = (losses.sum() - losses) / 7
    assert law.cv_rmse["mean"] == pytest.approx(np.sqrt(np.mean((losses - others) ** 2)))
    rest = np.arange(8) != 3
    for form, fit in LAWS.items():
        again = fit_law(weights, losses, forms=[form])
        if again.matters:
            assert again.held_out[3] == pytest.approx(float(fit(weights[rest], losses[rest], 0)(weights[[3]])[0]))


@pytest.mark.slow
def test_a_quadratic_loss_has_a_law():
    """Lowest in the middle, which no exponential is; chosen by its error on trials left out."""
    weights = draw_mixtures(PRIOR, 40, seed=0)
    losses = 2 + 8 * np.square(weights - [0.4, 0.3, 0.2, 0.1]).sum(1)
    law = fit_law(weights, losses)
    assert law.matters and law.form != "mixing_law"
    assert law.cv_rmse[law.form] == min(law.cv_rmse.values()) < 0.8 * law.cv_rmse["mean"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_noise_is_no_law(seed):
    weights = draw_mixtures(PRIOR, 16, seed=seed)
    losses = 2 + 0.1 * np.random.default_rng(seed).random(16)
    law = fit_law(weights, losses)
    assert not law.matters and law.form == "mean"
    assert law.predict(weights) == pytest.approx(np.full(16, losses.mean()))
    found = recommend({"x": law}, {"x": 1}, PRIOR)
    assert found.weights == pytest.approx(PRIOR) and found.gain == (0, 0)
    assert "the 16 trials do not show that the mixture matters for x" in found.notes[0]
    assert "recommended weights are the prior's" in found.notes[1]


def test_equal_losses_are_no_law():
    law = fit_law(draw_mixtures(PRIOR, 6), np.full(6, 2.0))
    assert not law.matters and law.cv_rmse["mean"] == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda w, y: (w[:4], y[:4]), ConfigError, "4 trials; expected at least 5"),
        (lambda w, y: (w, y[:-1]), DataError, "losses of shape (7,)"),
        (lambda w, y: (w, np.r_[y[:-1], np.nan]), DataError, "the loss of trial 7 is nan"),
        (lambda w, y: (w, np.r_[-1.0, y[1:]]), DataError, "the loss of trial 0 is -1.0"),
        (lambda w, y: (2 * w, y), DataError, "the weights of trial 0 are"),
    ],
)
def test_trials_that_cannot_be_fitted(change, error, words):
    weights = draw_mixtures(PRIOR, 8)
    with pytest.raises(error) as raised:
        fit_law(*change(weights, losses_of(weights)))
    assert words in str(raised.value)


def test_unknown_forms_are_named():
    weights = draw_mixtures(PRIOR, 8)
    with pytest.raises(ConfigError, match="form is 'rigde'.*did you mean 'ridge'"):
        fit_law(weights, losses_of(weights), forms=["rigde"])
