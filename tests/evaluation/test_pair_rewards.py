"""Figures of preference pairs, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_objectives.errors import DataError, NonFiniteError
from hf_objectives.evaluation.pair_rewards import PairRewards


def pairs(chosen, rejected, *, rows=None, lengths=None, target=None) -> PairRewards:
    n = len(chosen)
    longer, shorter = zip(*(lengths or [(1, 1)] * n), strict=True) if n else ((), ())
    return PairRewards(
        np.array(range(n) if rows is None else rows, np.int64),
        np.array(chosen, np.float64),
        np.array(rejected, np.float64),
        np.array(longer, np.int64),
        np.array(shorter, np.int64),
        np.zeros(n) if target is None else np.array(target, np.float64),
    )


def test_by_hand():
    """Four pairs: two right, one wrong, one tie."""
    found = pairs([2.0, 1.0, 0.0, 3.0], [1.0, 0.0, 2.0, 3.0], lengths=[(4, 2), (2, 4), (1, 5), (3, 3)]).metrics()
    assert found["accuracy"] == 2.5 / 4 and found["ties"] == 1 and found["num_pairs"] == 4
    assert found["margin"] == pytest.approx((1 + 1 - 2 + 0) / 4)
    assert (found["min_reward"], found["mean_reward"], found["max_reward"]) == (0.0, 12 / 8, 3.0)
    assert found["loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in (1, 1, -2, 0)) / 4)
    assert found["accuracy_low"] < 0.625 < found["accuracy_high"]
    # Of the three pairs of two lengths the longer answer is chosen in the first, and scored higher in the first and third.
    assert found["longer_accuracy"] == pytest.approx(1 / 3)
    assert found["longer_preferred"] == pytest.approx(2 / 3)


def test_margins_and_centring_are_those_of_the_loss():
    found = pairs([2.0, 1.0], [1.0, 2.0], target=[0.5, 0.0]).metrics(center=0.1)
    nll = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(1.0))) / 2
    assert found["loss"] == pytest.approx(nll + 0.1 * (9 + 9) / 2)


def test_length_bias():
    """Rewards in the order of lengths, and against it; without two lengths there is none."""
    with_length = pairs([4.0, 1.0], [2.0, 3.0], lengths=[(40, 20), (10, 30)]).metrics()
    assert with_length["length_bias"] == pytest.approx(1)
    against = pairs([-4.0, -1.0], [-2.0, -3.0], lengths=[(40, 20), (10, 30)]).metrics()
    assert against["length_bias"] == pytest.approx(-1) and against["longer_preferred"] == 0
    assert not {"length_bias", "longer_accuracy", "longer_preferred"} & pairs([1.0], [0.0]).metrics().keys()


def test_rows_that_two_ranks_hold_count_once():
    first, second = pairs([1.0, 2.0], [0.0, 0.0], rows=[0, 2]), pairs([3.0, 1.0], [0.0, 0.0], rows=[1, 0])
    joined = PairRewards.of_ranks([first, second])
    assert joined.row.tolist() == [0, 1, 2] and joined.chosen.tolist() == [1.0, 3.0, 2.0]


def test_rewards_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="row 7: rewards 1.0 of the chosen and nan of the rejected answer"):
        pairs([0.0, 1.0], [0.0, math.nan], rows=[3, 7]).metrics()
    with pytest.raises(DataError, match="no preference pair"):
        pairs([], []).metrics()
