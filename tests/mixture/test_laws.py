"""Mixing laws: draws stay mixtures, a law that made the losses is found again, and noise is called noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.laws import LAWS, draw_mixtures, fit_law, fit_mixing_law, fit_ridge, recommend, summarise

pytest.importorskip("sklearn", reason="scikit-learn is an extra: pip install 'hf-objectives[search]'")
pytest.importorskip("scipy", reason="scipy is an extra: pip install 'hf-objectives[search]'")

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])
WEIGHTS = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1e-9, 1.0]), min_size=1, max_size=12).filter(
    lambda weights: sum(weights) > 0
)


def losses_of(weights, c=1.2, t=(0.3, 0.5, -1.0, -4.0)):
    """An exponential law by hand: the fourth source teaches most, the first two hurt a little."""
    return c + np.exp(weights @ np.array(t))


# -- draws -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(prior=WEIGHTS, n=st.integers(1, 20), concentration=st.floats(1e-2, 1e3), seed=st.integers(0, 5))
def test_draws_are_mixtures(prior, n, concentration, seed):
    drawn = draw_mixtures(prior, n, concentration=concentration, seed=seed)
    assert drawn.shape == (n, len(prior)) and np.isfinite(drawn).all() and (drawn >= 0).all()
    assert np.allclose(drawn.sum(1), 1) and not drawn[:, np.array(prior) == 0].any()
    assert np.allclose(drawn[0], np.array(prior) / np.sum(prior))
    longer = draw_mixtures(prior, n + 3, concentration=concentration, seed=seed)
    assert np.array_equal(longer[:n], drawn)


def test_draws_have_the_prior_for_mean_and_the_spread_of_dirichlet():
    drawn = draw_mixtures(PRIOR, 20_001, concentration=2, seed=0)[1:]
    total = 2 * len(PRIOR)  # of the distribution's parameters
    assert drawn.mean(0) == pytest.approx(PRIOR, abs=5e-3)
    assert drawn.var(0) == pytest.approx(PRIOR * (1 - PRIOR) / (total + 1), rel=0.05)


@pytest.mark.parametrize(("n", "concentration"), [(0, 1), (3, 0), (3, float("nan")), (3, float("inf"))])
def test_draws_that_mean_nothing(n, concentration):
    with pytest.raises(ConfigError, match="expected at least 1, and a number above 0"):
        draw_mixtures(PRIOR, n, concentration=concentration)


# -- laws --------------------------------------------------------------------------------------------------------------


def test_an_exponential_law_is_found_again():
    weights, fresh = draw_mixtures(PRIOR, 20, seed=0), draw_mixtures(PRIOR, 200, concentration=2, seed=1)
    predicted = fit_mixing_law(weights, losses_of(weights))(fresh)
    truth = losses_of(fresh)
    assert np.abs(predicted - truth).max() < 0.02 * np.ptp(truth)
    law = fit_law(weights, losses_of(weights))
    assert law.form == "mixing_law" and law.matters and law.p_value < 0.01
    assert law.cv_rmse["mixing_law"] < 0.1 * law.cv_rmse["mean"]


def test_a_power_law_is_found_again():
    weights = draw_mixtures(PRIOR, 24, seed=0)
    truth = 2 * np.prod((weights + 0.01) ** [0.0, 0.05, -0.1, -0.3], axis=1)
    assert fit_ridge(weights, truth)(weights) == pytest.approx(truth, rel=2e-3)
    law = fit_law(weights, truth)
    assert law.form == "ridge" and law.cv_rmse["ridge"] < 0.1 * law.cv_rmse["mean"]


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


def test_a_quadratic_loss_has_a_law():
    """Lowest in the middle, which no exponential is; chosen by its error on trials left out."""
    weights = draw_mixtures(PRIOR, 40, seed=0)
    losses = 2 + 8 * np.square(weights - [0.4, 0.3, 0.2, 0.1]).sum(1)
    law = fit_law(weights, losses)
    assert law.matters and law.form != "mixing_law"
    assert law.cv_rmse[law.form] == min(law.cv_rmse.values()) < 0.8 * law.cv_rmse["mean"]


@pytest.mark.parametrize("seed", range(4))
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


# -- the best weights --------------------------------------------------------------------------------------------------


def test_the_optimum_of_a_known_combination_is_found():
    """Two skills that two sources teach: by symmetry the best is half of each, and a third source is of no use."""
    weights = draw_mixtures([0.6, 0.1, 0.3], 24, seed=0)
    laws = {name: fit_law(weights, losses_of(weights, t=t)) for name, t in (("a", (-4.0, 0, 0)), ("b", (0, -4.0, 0)))}
    found = recommend(laws, {"a": 1, "b": 1}, [0.6, 0.1, 0.3], sources=["x", "y", "z"], bootstrap=20)
    truth = sum(losses_of(found.weights, t=t) for t in ((-4.0, 0, 0), (0, -4.0, 0)))
    within = np.vstack([weights, np.random.default_rng(0).dirichlet(np.full(24, 0.2), 20_000) @ weights])
    best = min(sum(losses_of(within, t=t) for t in ((-4.0, 0, 0), (0, -4.0, 0))))
    assert truth <= best + 5e-3
    assert found.weights[2] < 0.1 and abs(found.weights[0] - found.weights[1]) < 0.1
    assert found.predicted["combined"][0] == pytest.approx(truth, abs=0.01)
    assert found.predicted["combined"][0] == pytest.approx(found.predicted["a"][0] + found.predicted["b"][0])
    assert (
        found.gain[0] == pytest.approx(found.prior["combined"][0] - found.predicted["combined"][0])
        and found.gain[0] > 0
    )
    assert (found.weight_errors >= 0).all() and found.weight_errors.max() < 0.15
    again = recommend(laws, {"a": 1, "b": 1}, [0.6, 0.1, 0.3], sources=["x", "y", "z"], bootstrap=20)
    assert np.array_equal(again.weight_errors, found.weight_errors) and again.predicted == found.predicted


def test_it_stays_within_what_was_tried():
    weights = draw_mixtures(PRIOR, 16, concentration=20, seed=0)
    law = fit_law(weights, losses_of(weights, t=(0, 0, 0, -4.0)))
    found = recommend({"x": law}, {"x": 2}, PRIOR, sources=["a", "b", "c", "d"], bootstrap=5)
    assert found.weights.sum() == pytest.approx(1)
    assert (found.weights <= weights.max(0) + 1e-9).all() and (found.weights >= weights.min(0) - 1e-9).all()
    assert found.weights[3] > 0.9 * weights[:, 3].max()
    assert any("share of d" in note and "search again" in note for note in found.notes)
    assert found.predicted["combined"][0] == pytest.approx(2 * found.predicted["x"][0])


def test_the_weight_of_a_loss_counts():
    weights = draw_mixtures([0.5, 0.5], 20, seed=0)
    laws = {
        "a": fit_law(weights, losses_of(weights, t=(-4.0, 0))),
        "b": fit_law(weights, losses_of(weights, t=(0, -4.0))),
    }
    shares = [recommend(laws, {"a": of, "b": 1}, [0.5, 0.5], bootstrap=0).weights[0] for of in (0.2, 1, 5)]
    assert shares == sorted(shares) and shares[1] == pytest.approx(0.5, abs=0.03) and shares[2] - shares[0] > 0.3


def test_errors_grow_with_noise():
    weights = draw_mixtures(PRIOR, 24, seed=0)
    noise = np.random.default_rng(0).normal(size=24)
    errors = []
    for scale in (0.001, 0.05):
        law = fit_law(weights, losses_of(weights) + scale * noise, forms=["mixing_law"])
        errors.append(recommend({"x": law}, {"x": 1}, PRIOR, bootstrap=30).predicted["x"][1])
    assert 0 < errors[0] < 0.5 * errors[1]


def test_a_summary_names_the_source_that_matters():
    weights = draw_mixtures(PRIOR, 20, seed=0)
    law = fit_law(weights, losses_of(weights))
    found = recommend({"x": law}, {"x": 1}, PRIOR, bootstrap=3)
    checks = [np.array([[2.0], [2.2]]), np.array([[1.5], [1.6]])]
    told = summarise(["a", "b", "c", "d"], PRIOR, {"x": law}, {"x": 1}, found, checks)
    assert told["influential"]["source"] == 3
    assert told["influential"]["combined"][0] > told["influential"]["combined"][-1]
    assert told["evaluation"]["combined"]["natural"]["measured"] == [2.0, 2.2]
    assert told["evaluation"]["x"]["recommended"]["measured"] == [1.5, 1.6]


# -- bad input ---------------------------------------------------------------------------------------------------------


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


def test_unknown_names_and_weights_that_mean_nothing():
    weights = draw_mixtures(PRIOR, 8)
    with pytest.raises(ConfigError, match="unknown form 'rigde'.*did you mean 'ridge'"):
        fit_law(weights, losses_of(weights), forms=["rigde"])
    laws = {"web": fit_law(weights, losses_of(weights), forms=["ridge"])}
    for combination, words in (
        ({"wep": 1}, "unknown evaluation 'wep'; expected one of web; did you mean 'web'"),
        ({"web": -1}, "evaluation 'web': weight is -1"),
        ({"web": float("nan")}, "evaluation 'web': weight is nan"),
        ({"web": 0}, "weights of all evaluations are 0"),
        ({"combined": 1}, "give it another name"),
    ):
        with pytest.raises(ConfigError, match=words):
            recommend(laws, combination, PRIOR)
