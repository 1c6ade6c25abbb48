"""Answers are drawn from the softmax of the scores, by noise that is a function of the answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hf_objectives.trainers.hf_compat import processing_last
from hf_objectives.trainers.sampling import OwnNoise
from tests.support.ppo_worlds import small_model

CPU = torch.device("cpu")


def draws(rows: int, scores: torch.Tensor, *, round: int = 0, positions: int = 1) -> torch.Tensor:
    """Tokens that are drawn from the same scores [vocabulary]: int64 [positions, rows]."""
    noise, all_scores = OwnNoise(3, round, range(rows), CPU), scores.expand(rows, -1)
    return torch.stack([noise(None, all_scores).argmax(dim=1) for _ in range(positions)])


def test_tokens_are_drawn_from_the_softmax():
    """Each of 20,000 answers draws two tokens; the second ones and those of another round are independent of the first."""
    scores = torch.tensor([0.0, 1.0, -2.0, 0.5, 2.0, -torch.inf, -4.0])
    kept = [i for i in range(7) if i != 5]
    weights = np.exp(scores.double().numpy()[kept])
    first, second = draws(20_000, scores, positions=2)
    for drawn in (first, second, draws(20_000, scores, round=1)[0]):
        counts = np.bincount(drawn.numpy(), minlength=7)
        assert counts[5] == 0
        assert stats.chisquare(counts[kept], 20_000 * weights / weights.sum()).pvalue > 1e-3
    for one, other in ((first, second), (first[:-1], first[1:]), (first, draws(20_000, scores, round=1)[0])):
        table = np.zeros((7, 7))
        np.add.at(table, (one.numpy(), other.numpy()), 1)
        table = table[np.ix_([0, 1, 3, 4], [0, 1, 3, 4])]  # the others are too rare for the test
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_noise_belongs_to_seed_round_answer_and_position():
    scores = torch.zeros(4, 50_000)  # two draws are hardly the same by chance
    noise, other = OwnNoise(3, 5, [0, 1, 2, 3], CPU), OwnNoise(3, 5, [2], CPU)
    whole = [noise(None, scores).argmax(dim=1) for _ in range(3)]
    alone = [other(None, scores[:1]).argmax(dim=1) for _ in range(3)]
    assert [int(one[2]) for one in whole] == [int(one) for one in alone]
    changed = [OwnNoise(*key, CPU)(None, scores[:1]).argmax() for key in ((4, 5, [2]), (3, 6, [2]), (3, 5, [1]))]
    assert len({int(one) for one in [*changed, *alone]}) == 6


def test_one_token_is_left_and_what_is_no_number_stays():
    scores = torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 1.0]])
    first, second = OwnNoise(0, 0, range(2), CPU)(None, scores)
    assert first.isinf().sum() == 2 and first.max() == scores[0, first.argmax()]
    assert second.isnan().any()
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        torch.multinomial(second.softmax(dim=0), 1)


class Seen:
    """A processor that keeps the scores that reach it."""

    def __init__(self):
        self.scores = []

    def __call__(self, input_ids, scores):
        self.scores.append(scores.clone())
        return scores


def test_a_processor_comes_after_all_others_where_tokens_are_sampled():
    """transformers has no place for one behind temperature and top-k; `_get_logits_processor` makes the list."""
    model, ids = small_model(), torch.tensor([[2, 3]])
    logits = model(ids).logits[0, -1].detach()
    options = {"max_new_tokens": 1, "pad_token_id": 0}
    seen = Seen()
    with processing_last(model, seen):
        model.generate(ids, do_sample=True, temperature=0.5, top_k=3, **options)
        (scores,) = seen.scores[0]
        best = logits.topk(3).indices
        assert set(scores.isfinite().nonzero().flatten().tolist()) == set(best.tolist())
        assert torch.allclose(scores[best], logits[best] / 0.5, atol=1e-6)
        model.generate(ids, do_sample=False, **options)
        model.generate(ids, do_sample=False, num_beams=2, **options)
    model.generate(ids, do_sample=True, **options)
    assert len(seen.scores) == 1 and "_get_logits_processor" not in vars(model)


def test_generate_draws_what_the_processor_left():
    model, ids = small_model(), torch.tensor([[2, 3]] * 6)

    def answers(first: int) -> list[list[int]]:
        with processing_last(model, OwnNoise(0, 0, range(first, first + 6), CPU)):
            return model.generate(ids, do_sample=True, max_new_tokens=5, pad_token_id=0)[:, 2:].tolist()

    torch.manual_seed(0)
    whole = answers(0)
    torch.manual_seed(1)
    assert answers(0) == whole and answers(3)[:3] == whole[3:] and len({*map(tuple, whole)}) > 3
