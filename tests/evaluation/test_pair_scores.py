"""The counts of preference pairs by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_objectives.evaluation.pair_scores import (
    COLUMNS,
    PairScores,
    by_column,
    nats_per_token,
    pair_figures,
    unique_rows,
)

MASK = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 1, 0]])  # chosen, chosen, rejected, rejected
POLICY = torch.tensor([[-1.0, -2.0, 0.0], [0.0, -0.5, -0.25], [-3.0, -1.0, -1.0], [0.0, -4.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, 0.0], [0.0, -0.5, -0.5], [-2.0, -1.0, -1.0], [0.0, -3.0, 0.0]])


TOKENS = {
    "entropy": torch.tensor([[1.0, 2.0, 9.0], [9.0, 0.5, 0.25], [3.0, 1.0, 2.0], [9.0, 4.0, 9.0]]),
    "mean_logits": torch.tensor([[-1.0, 3.0, math.nan], [9.0, 0.5, 1.0], [1.0, 1.0, 1.0], [9.0, -2.0, 9.0]]),
    "is_top1": torch.tensor([[True, False, True], [True, True, True], [False, True, True], [True, False, True]]),
    "log_sum_sq_probs": torch.tensor([[-0.5, -1.5, 9.0], [9.0, -0.5, -0.5], [-1.0, -1.0, -1.0], [9.0, -3.0, 9.0]]),
}


def test_rows_of_a_batch():
    found = PairScores(POLICY, REFERENCE, MASK, lengths=torch.tensor([3, 2, 3, 1]), tokens=TOKENS).rows(
        torch.tensor([8, 9])
    )
    expected = {
        "row": [8, 9],
        "chosen_nats": [3, 0.75],
        "rejected_nats": [5, 4],
        "chosen_ref_nats": [3.5, 1],
        "rejected_ref_nats": [4, 3],
        "chosen_tokens": [2, 2],
        "rejected_tokens": [3, 1],
        "chosen_length": [3, 2],
        "rejected_length": [3, 1],
        "chosen_logps": [-3, -0.75],
        "rejected_logps": [-5, -4],
        "chosen_ratio": [0.5, 0.25],
        "rejected_ratio": [-1, -1],
        "chosen_entropy": [3, 0.75],
        "rejected_entropy": [6, 4],
        "chosen_logits": [2, 1.5],
        "rejected_logits": [3, -2],
        "chosen_top1": [1, 2],
        "rejected_top1": [2, 0],
        # exp of the mean of log p - log sum p^2
        "chosen_weight": [math.exp((-0.5 - 0.5) / 2), math.exp((0 + 0.25) / 2)],
        "rejected_weight": [math.exp((-2 + 0 + 0) / 3), math.exp(-1)],
    }
    assert tuple(expected) == COLUMNS and found.dtype == torch.float64
    for name, values in by_column(found.numpy()).items():
        assert values == pytest.approx(expected[name], abs=1e-12), name


def test_what_is_not_known_of_a_batch():
    sums = REFERENCE.sum(dim=1)
    columns = by_column(PairScores(POLICY, None, MASK, sums).rows(None).numpy())
    assert columns["row"].tolist() == [-1, -1] and columns["rejected_ref_nats"].tolist() == [4, 3]
    assert columns["chosen_length"].tolist() == [2, 2] and columns["rejected_ratio"].tolist() == [-1, -1]
    assert all(np.isnan(columns[f"chosen_{name}"]).all() for name in ("entropy", "logits", "top1", "weight"))
    figures = pair_figures(PairScores(POLICY, None, MASK, sums).rows(None).numpy(), 0.5)
    assert "entropy" not in figures and figures["logps/rejected"] == -4.5


def test_length_desensitised_sums():
    """LD-DPO: what is beyond the shorter answer of a pair counts ld_alpha times."""
    scores = PairScores(POLICY, REFERENCE, MASK, ld_alpha=0.25)
    # Pair 0 shares two tokens, so that the third of the rejected answer is a quarter; pair 1 shares one.
    assert scores.weighted(POLICY).tolist() == [-3.0, -0.5625, -4.25, -4.0]
    columns = by_column(scores.rows(None).numpy())
    assert columns["chosen_nats"].tolist() == [3, 0.75]  # nats are of all tokens
    assert columns["chosen_logps"].tolist() == [-3, -0.5625] and columns["chosen_ratio"].tolist() == [0.5, 0.0625]
    beforehand = PairScores(POLICY, None, MASK, scores.weighted(REFERENCE), ld_alpha=0.25).rows(None).numpy()
    assert by_column(beforehand)["chosen_ratio"].tolist() == [0.5, 0.0625]
    assert np.isnan(by_column(beforehand)["chosen_ref_nats"]).all()
    assert "reference_chosen_perplexity" not in pair_figures(beforehand, 0.5)


def test_drift_and_nll():
    scores = PairScores(POLICY, REFERENCE, MASK)
    assert scores.drift().tolist() == [0.75, -2.0, 4, 4, 2]
    assert PairScores(POLICY, None, MASK, REFERENCE.sum(dim=1)).drift().tolist() == [0.75, -2.0, 4, 4, 2]
    assert scores.chosen_nll().item() == pytest.approx(3.75 / 4)


def test_figures_count_tokens_and_rows():
    rows = PairScores(POLICY, REFERENCE, MASK, tokens=TOKENS).rows(torch.tensor([8, 9])).numpy()
    third = dict.fromkeys(COLUMNS, 0.0)  # a tie is no win
    third |= {"row": 4, "chosen_nats": 2, "rejected_nats": 1, "chosen_ref_nats": 2, "rejected_ref_nats": 1}
    third |= {"chosen_tokens": 4, "rejected_tokens": 2, "chosen_logps": -2, "rejected_logps": -1}
    third |= {"chosen_entropy": 5, "rejected_entropy": 1, "chosen_logits": 4, "chosen_top1": 3}
    figures = pair_figures(np.concatenate([rows, np.array([[*third.values()]])]), 0.5)
    assert figures["chosen_perplexity"] == pytest.approx(math.exp(5.75 / 8))
    assert figures["rejected_perplexity"] == pytest.approx(math.exp(10 / 6))
    assert figures["reference_chosen_perplexity"] == pytest.approx(math.exp(6.5 / 8))
    assert figures["reference_rejected_perplexity"] == pytest.approx(math.exp(8 / 6))
    assert (figures["num_pairs"], figures["num_chosen_tokens"], figures["num_rejected_tokens"]) == (3, 8, 6)
    assert figures["rewards/accuracies"] == pytest.approx(2 / 3)
    assert figures["rewards/margins"] == pytest.approx((0.75 + 0.625) / 3)
    assert figures["rewards/chosen"] == pytest.approx(0.375 / 3)
    assert figures["logps/chosen"] == pytest.approx(-5.75 / 3) and figures["logps/rejected"] == pytest.approx(-10 / 3)
    assert figures["entropy"] == pytest.approx((3.75 + 10 + 6) / 14)  # per token of both sides
    assert figures["mean_token_accuracy"] == pytest.approx(6 / 8)  # of the chosen answers
    assert figures["logits/chosen"] == pytest.approx(7.5 / 8) and figures["logits/rejected"] == pytest.approx(1 / 6)
    # Wilson's interval of 2 of 3, from its formula with z = 1.96.
    low, high = figures["rewards/accuracies_low"], figures["rewards/accuracies_high"]
    assert (low, high) == (pytest.approx(0.2077, abs=1e-4), pytest.approx(0.9385, abs=1e-4))
    assert nats_per_token(rows, "ref_") == {"chosen": 4.5 / 4, "rejected": 7 / 4}


def batch(*numbers, mark=0.0):
    rows = np.full((len(numbers), len(COLUMNS)), mark)
    rows[:, 0] = numbers
    return rows


def test_rows_that_ranks_repeat_count_once():
    assert unique_rows([[batch(4, 0)], [batch(2, 4)]])[:, 0].tolist() == [0, 2, 4]
    assert unique_rows([[], [batch(2)]])[:, 0].tolist() == [2] and len(unique_rows([[], []])) == 0


def test_rows_without_a_number_are_in_the_order_of_their_dataset():
    """Two ranks of two rows take five rows in turn, and begin again to fill the last batch."""
    marked = [[[0, 1], [4, 0]], [[2, 3], [1, 2]]]
    parts = [[np.concatenate([batch(-1, mark=at) for at in rows]) for rows in rank] for rank in marked]
    assert unique_rows(parts, 5)[:, 1].tolist() == [0, 1, 2, 3, 4]
    assert len(unique_rows(parts)) == 8  # of how many is not known
