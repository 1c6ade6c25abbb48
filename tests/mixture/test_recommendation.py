"""The best weights: a known optimum is found, within what was tried, with errors that grow with noise."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.laws import fit_law
from hf_objectives.mixture.recommendation import recommend, summarise
from hf_objectives.mixture.weights import draw_mixtures

pytest.importorskip("sklearn", reason="scikit-learn is an extra: pip install 'hf-objectives[search]'")
pytest.importorskip("scipy", reason="scipy is an extra: pip install 'hf-objectives[search]'")

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])


def losses_of(weights, c=1.2, t=(0.3, 0.5, -1.0, -4.0)):
    """An exponential law by hand: the fourth source teaches most, the first two hurt a little."""
    return c + np.exp(weights @ np.array(t))


@pytest.mark.slow
def test_the_optimum_of_a_known_combination_is_found():
    """Two skills that two sources teach: by symmetry the best is half of each, and a third source is of no use."""
    weights = draw_mixtures([0.6, 0.1, 0.3], 24, seed=0)
    laws = {name: fit_law(weights, losses_of(weights, t=t)) for name, t in (("a", (-4.0, 0, 0)), ("b", (0, -4.0, 0)))}
    found = recommend(laws, {"a": 1, "b": 1}, [0.6, 0.1, 0.3], sources=["x", "y", "z"], bootstrap=12)
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
    again = recommend(laws, {"a": 1, "b": 1}, [0.6, 0.1, 0.3], sources=["x", "y", "z"], bootstrap=12)
    assert np.array_equal(again.weight_errors, found.weight_errors) and again.predicted == found.predicted


@pytest.mark.slow
def test_it_stays_within_what_was_tried():
    weights = draw_mixtures(PRIOR, 16, concentration=20, seed=0)
    law = fit_law(weights, losses_of(weights, t=(0, 0, 0, -4.0)))
    found = recommend({"x": law}, {"x": 2}, PRIOR, sources=["a", "b", "c", "d"], bootstrap=5)
    assert found.weights.sum() == pytest.approx(1)
    assert (found.weights <= weights.max(0) + 1e-9).all() and (found.weights >= weights.min(0) - 1e-9).all()
    assert found.weights[3] > 0.9 * weights[:, 3].max()
    assert any("share of d" in note and "search again" in note for note in found.notes)
    assert found.predicted["combined"][0] == pytest.approx(2 * found.predicted["x"][0])


@pytest.mark.slow
def test_the_weight_of_a_loss_counts():
    weights = draw_mixtures([0.5, 0.5], 20, seed=0)
    laws = {
        "a": fit_law(weights, losses_of(weights, t=(-4.0, 0))),
        "b": fit_law(weights, losses_of(weights, t=(0, -4.0))),
    }
    shares = [recommend(laws, {"a": of, "b": 1}, [0.5, 0.5], bootstrap=0).weights[0] for of in (0.2, 1, 5)]
    assert shares == sorted(shares) and shares[1] == pytest.approx(0.5, abs=0.03) and shares[2] - shares[0] > 0.3


@pytest.mark.slow
def test_errors_grow_with_noise():
    weights = draw_mixtures(PRIOR, 24, seed=0)
    noise = np.random.default_rng(0).normal(size=24)
    errors = []
    for scale in (0.001, 0.05):
        law = fit_law(weights, losses_of(weights) + scale * noise, forms=["mixing_law"])
        errors.append(recommend({"x": law}, {"x": 1}, PRIOR, bootstrap=15).predicted["x"][1])
    assert 0 < errors[0] < 0.5 * errors[1]


@pytest.mark.slow
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


def test_combinations_that_mean_nothing_are_named():
    weights = draw_mixtures(PRIOR, 8)
    laws = {"web": fit_law(weights, losses_of(weights), forms=["ridge"])}
    for combination, words in (
        ({"wep": 1}, "evaluation is 'wep'; expected one of web; did you mean 'web'"),
        ({"web": -1}, "evaluation 'web': weight is -1"),
        ({"web": float("nan")}, "evaluation 'web': weight is nan"),
        ({"web": 0}, "weights of all evaluations are 0"),
        ({"combined": 1}, "give it another name"),
    ):
        with pytest.raises(ConfigError, match=words):
            recommend(laws, combination, PRIOR)
