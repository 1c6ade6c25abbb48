"""Counts that add up, by hand."""

import math

import pytest

from hf_objectives.evaluation.counts import PerplexityResult, TokenCount


def test_by_hand():
    # Two tokens at probabilities 1/2 and 1/8: total ln 16, mean ln 4, perplexity 4; 4 bits over 2 bytes.
    count = TokenCount(math.log(2), 1, 1) + TokenCount(math.log(8), 1, 1)
    assert count.perplexity == pytest.approx(4)
    assert count.bits_per_byte == pytest.approx(2)
    assert count.loss == pytest.approx(math.log(4))


def test_empty_and_overflowing():
    assert (
        math.isnan(TokenCount().loss) and math.isnan(TokenCount().perplexity) and math.isnan(TokenCount().bits_per_byte)
    )
    assert TokenCount(1e6, 1, 1).perplexity == math.inf


def test_result_has_its_groups():
    result = PerplexityResult.of(TokenCount(math.log(9), 2, 3), {"a": TokenCount(math.log(2), 1, 1)})
    assert result.perplexity == pytest.approx(3) and result.groups["a"].perplexity == pytest.approx(2)
    assert (result.num_tokens, result.num_bytes, result.nll) == (2, 3, math.log(9))
