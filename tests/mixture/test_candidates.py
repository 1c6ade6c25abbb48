"""Candidates: draws stay mixtures, around the prior."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.candidates import draw_mixtures

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])
WEIGHTS = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1e-9, 1.0]), min_size=1, max_size=12).filter(
    lambda weights: sum(weights) > 0
)


@settings(deadline=None)
@given(prior=WEIGHTS, n=st.integers(1, 20), concentration=st.floats(1e-2, 1e3), seed=st.integers(0, 5))
def test_draws_are_mixtures(prior, n, concentration, seed):
    drawn = draw_mixtures(prior, n, concentration=concentration, seed=seed)
    assert drawn.shape == (n, len(prior)) and np.isfinite(drawn).all() and (drawn >= 0).all()
    assert np.allclose(drawn.sum(1), 1) and not drawn[:, np.array(prior) == 0].any()
    assert np.allclose(drawn[0], np.array(prior) / np.sum(prior))
    longer = draw_mixtures(prior, n + 3, concentration=concentration, seed=seed)
    assert np.array_equal(longer[:n], drawn)


@pytest.mark.slow
def test_draws_have_the_prior_for_mean_and_the_spread_of_dirichlet():
    drawn = draw_mixtures(PRIOR, 20_001, concentration=2, seed=0)[1:]
    total = 2 * len(PRIOR)  # of the distribution's parameters
    assert drawn.mean(0) == pytest.approx(PRIOR, abs=5e-3)
    assert drawn.var(0) == pytest.approx(PRIOR * (1 - PRIOR) / (total + 1), rel=0.05)


@pytest.mark.parametrize(("n", "concentration"), [(0, 1), (3, 0), (3, float("nan")), (3, float("inf"))])
def test_draws_that_mean_nothing(n, concentration):
    with pytest.raises(ConfigError, match="expected at least 1, and a number above 0"):
        draw_mixtures(PRIOR, n, concentration=concentration)
