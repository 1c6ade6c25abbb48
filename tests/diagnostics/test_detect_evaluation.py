"""Faults of rows that are not trained on curves made by hand, and none without the fault."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.curves_by_hand import T, kinds, log, noisy


@pytest.mark.parametrize("evaluation", [[1.5, 1.6, 2.0], [2.0, 1.5, 1.55, 1.7, 2.0]])
def test_few_evaluations_that_rise(evaluation):
    assert "overfitting" in kinds(log(eval_loss=evaluation))
    assert not kinds(log(eval_loss=[1.5, 1.51, 1.52]))


def test_several_evaluation_sets():
    history = log(epochs=5)
    for k, value in enumerate([3.0, 2.6, 2.3, 2.1, 2.0, 2.1, 2.3, 2.6, 2.9, 3.2]):
        history.append({"step": (k + 1) * 30, "eval_code_loss": value})
        history.append({"step": (k + 1) * 30, "eval_wiki_loss": 3 - 0.1 * k})
    found = kinds(history)
    assert list(found) == ["overfitting"] and found["overfitting"].evidence.startswith("eval_code_loss 2 at step 150")
    history[-1]["eval_wiki_loss"] = float("nan")
    assert kinds(history)["non_finite"].evidence.startswith("eval_wiki_loss is nan at step 300")


def test_overfitting():
    evaluation = [3.0, 2.6, 2.3, 2.1, 2.0, 2.1, 2.3, 2.6, 2.9, 3.2]
    found = kinds(log(epochs=5, eval_loss=evaluation))
    assert (
        list(found) == ["overfitting"] and found["overfitting"].step == 150 and found["overfitting"].severity == "error"
    )
    assert "checkpoint of step 150" in found["overfitting"].advice
    assert not kinds(log(epochs=5, eval_loss=[3.0, 2.6, 2.3, 2.1, 2.0, 2.0, 2.01, 2.0, 2.01, 2.0]))


def test_overfitting_that_turns_sharply():
    evaluation = [3.798, 3.366, 2.701, 2.379, 2.257, 2.125, 2.294, 2.321, 2.533, 2.796]
    found = kinds(log(noisy(6 * 0.99**T), eval_loss=evaluation))["overfitting"]
    assert (found.step, found.last_step) == (180, 300)


def test_too_good():
    loss = noisy(0.02 + 3 * np.exp(-T / 8))
    found = kinds(log(loss, epochs=1))
    assert list(found) == ["too_good"] and "of the first epoch" in found["too_good"].evidence
    assert not kinds(log(noisy(0.02 + 3 * np.exp(-T / 80)), epochs=8))  # by heart, after several epochs
    assert "evaluation loss 0.01" in kinds(log(eval_loss=[2.0, 1.0, 0.01]))["too_good"].evidence
