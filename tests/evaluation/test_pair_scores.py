"""The counts of preference pairs by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_objectives.evaluation.pair_scores import COLUMNS, PairScores, nats_per_token, pair_figures, unique_rows

MASK = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 1, 0]])  # chosen, chosen, rejected, rejected
POLICY = torch.tensor([[-1.0, -2.0, 0.0], [0.0, -0.5, -0.25], [-3.0, -1.0, -1.0], [0.0, -4.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, 0.0], [0.0, -0.5, -0.5], [-2.0, -1.0, -1.0], [0.0, -3.0, 0.0]])


def test_rows_of_a_batch():
    rows = PairScores(POLICY, REFERENCE, MASK).rows(0.5, torch.tensor([8, 9]))
    expected = [[8, 3, 5, 3.5, 4, 2, 3, 0.25, -0.5], [9, 0.75, 4, 1, 3, 2, 1, 0.125, -0.5]]
    assert rows.tolist() == expected and rows.dtype == torch.float64
    assert PairScores(POLICY, REFERENCE, MASK).rows(0.5, None)[:, 0].tolist() == [-1, -1]
    sums = REFERENCE.sum(dim=1)
    assert PairScores(POLICY, None, MASK, sums).rows(0.5, torch.tensor([8, 9])).tolist() == expected


def test_length_desensitised_sums():
    """LD-DPO: what is beyond the shorter answer of a pair counts ld_alpha times."""
    scores = PairScores(POLICY, REFERENCE, MASK, ld_alpha=0.25)
    # Pair 0 shares two tokens, so that the third of the rejected answer is a quarter; pair 1 shares one.
    assert scores.weighted(POLICY).tolist() == [-3.0, -0.5625, -4.25, -4.0]
    rows = scores.rows(1.0, None)
    assert rows[:, 1].tolist() == [3, 0.75]  # nats are of all tokens
    assert rows[:, 7].tolist() == [0.5, 0.0625]
    beforehand = PairScores(POLICY, None, MASK, scores.weighted(REFERENCE), ld_alpha=0.25).rows(1.0, None)
    assert beforehand[:, 7].tolist() == [0.5, 0.0625] and beforehand[:, 3].isnan().all()
    assert "reference_chosen_perplexity" not in pair_figures(beforehand.numpy())


def test_drift_and_nll():
    scores = PairScores(POLICY, REFERENCE, MASK)
    assert scores.drift().tolist() == [0.75, -2.0, 4, 4, 2]
    assert PairScores(POLICY, None, MASK, REFERENCE.sum(dim=1)).drift().tolist() == [0.75, -2.0, 4, 4, 2]
    assert scores.chosen_nll().item() == pytest.approx(3.75 / 4)


def test_figures_count_tokens_and_rows():
    rows = PairScores(POLICY, REFERENCE, MASK).rows(0.5, torch.tensor([8, 9])).numpy()
    third = np.array([[4, 2.0, 1.0, 2.0, 1.0, 4, 2, 0.0, 0.0]])  # a tie is no win
    figures = pair_figures(np.concatenate([rows, third]))
    assert figures["chosen_perplexity"] == pytest.approx(math.exp(5.75 / 8))
    assert figures["rejected_perplexity"] == pytest.approx(math.exp(10 / 6))
    assert figures["reference_chosen_perplexity"] == pytest.approx(math.exp(6.5 / 8))
    assert figures["reference_rejected_perplexity"] == pytest.approx(math.exp(8 / 6))
    assert (figures["num_pairs"], figures["num_chosen_tokens"], figures["num_rejected_tokens"]) == (3, 8, 6)
    assert figures["rewards/accuracies"] == pytest.approx(2 / 3)
    assert figures["rewards/margins"] == pytest.approx((0.75 + 0.625) / 3)
    assert figures["rewards/chosen"] == pytest.approx(0.375 / 3)
    # Wilson's interval of 2 of 3, from its formula with z = 1.96.
    low, high = figures["rewards/accuracies_low"], figures["rewards/accuracies_high"]
    assert (low, high) == (pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4))
    assert nats_per_token(rows, "ref_") == {"chosen": 4.5 / 4, "rejected": 7 / 4}


def test_rows_that_ranks_repeat_count_once():
    width = len(COLUMNS)
    parts = [np.full((2, width), 1.0), np.full((2, width), 1.0)]
    parts[0][:, 0], parts[1][:, 0] = (4, 0), (2, 4)
    assert unique_rows(parts)[:, 0].tolist() == [4, 0, 2]
    parts[1][:, 0] = -1  # rows of which nothing is known stay
    assert unique_rows(parts)[:, 0].tolist() == [4, 0, -1, -1]
