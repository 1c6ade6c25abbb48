"""Weights over a run: presets as published, temperature, steps and straight lines, and draws around a prior."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.config import PRESETS
from hf_objectives.mixture.weights import Stage, WeightPlan, draw_mixtures, tempered
from tests.support.mixtures import due_on_the_line

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])
WEIGHTS = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1e-9, 1.0]), min_size=1, max_size=12).filter(
    lambda weights: sum(weights) > 0
)


def test_presets_are_those_of_the_document():
    assert list(PRESETS["gpt3"].values()) == [0.60, 0.16, 0.03, 0.03, 0.22] and sum(
        PRESETS["gpt3"].values()
    ) == pytest.approx(1.04)
    assert list(PRESETS["llama3"].values()) == [0.82, 0.08, 0.04, 0.03, 0.03]


def test_temperature_by_hand():
    assert tempered([9, 1], 2).tolist() == pytest.approx([0.75, 0.25])  # the square roots are 3 and 1
    assert tempered([9, 1], 1).tolist() == pytest.approx([0.9, 0.1])
    assert tempered([0.2, 0, 0.1], 1e9).tolist() == pytest.approx([0.5, 0, 0.5])
    assert tempered([0.6, 0.4], 1e-3).tolist() == pytest.approx([1, 0])
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match=f"temperature is {wrong}; expected more than 0"):
            tempered([1, 1], wrong)


def plan() -> WeightPlan:
    return WeightPlan([1, 1], [Stage(100, np.array([0.9, 0.1]), 100), Stage(1_000, np.array([0.0, 1.0]), 2_000)])


def test_steps_and_lines_by_hand():
    pieces = plan().pieces()
    assert (pieces[0][0], pieces[0][1].tolist()) == (100, [0.9, 0.1])
    assert [begin for begin, _ in pieces[1:]] == [*range(1_000, 2_000), 2_000]  # a unit each
    assert pieces[1][1].tolist() == pytest.approx([0.9 - 0.9 * 0.0005, 0.1 + 0.9 * 0.0005])
    assert pieces[-1][1].tolist() == [0, 1]
    # 50 + 810 + the triangle 0.9 * 1000 / 2 for the first source.
    assert due_on_the_line(plan(), 2_500).tolist() == pytest.approx([50 + 810 + 450, 50 + 90 + 550 + 500])
    assert due_on_the_line(plan(), 1_500)[0] == pytest.approx(50 + 810 + 500 * (0.9 + 0.45) / 2)
    assert due_on_the_line(plan(), 60).tolist() == [30, 30]


@st.composite
def plans(draw):
    rng, stages, at = np.random.default_rng(draw(st.integers(0, 2**32))), [], 0
    sources = draw(st.integers(1, 6))

    def weights():
        some = rng.random(sources) ** rng.integers(1, 6) * (rng.random(sources) < 0.8)
        return some / some.sum() if some.any() else np.full(sources, 1 / sources)

    for _ in range(draw(st.integers(0, 4))):
        begin = at + draw(st.integers(0, 300))
        at = begin + draw(st.sampled_from([0, 1, 7, 100, 600]))
        stages.append(Stage(begin, weights(), at))
    return WeightPlan(weights(), stages)


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(made=plans())
def test_every_source_within_one_draw_of_what_is_due_also_where_weights_change(made):
    schedule = made.schedule()
    ones = [np.ones(60, np.int64)] * len(made.weights)
    last = made.stages[-1].end if made.stages else 0
    while schedule.units < last + 200:
        assert np.abs(schedule.due - due_on_the_line(made, schedule.units)).max() <= 0.01  # steps against the line
        schedule.draw(ones, 1)
        assert np.abs(schedule.drawn - schedule.due).max() <= 1 + 1e-6


def test_stages_out_of_order_are_named():
    with pytest.raises(ConfigError, match="stage 1 goes from 150 to 150, and what comes before is complete at 200"):
        WeightPlan([1], [Stage(100, np.ones(1), 200), Stage(150, np.ones(1), 150)])
    with pytest.raises(ConfigError, match="stage 0 goes from 100 to 50"):
        WeightPlan([1], [Stage(100, np.ones(1), 50)])


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
