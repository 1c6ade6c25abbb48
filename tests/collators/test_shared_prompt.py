"""Pairs in rows: by hand, and for any batch against a plain loop over its sequences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.collators.shared_prompt import share_prompts
from hf_objectives.errors import FormatError


def batch(*pairs):
    """(chosen, rejected) lists of ids as a padded batch."""
    sequences = [pair[side] for side in (0, 1) for pair in pairs]
    width = max(map(len, sequences))
    ids = [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences]
    return np.array(ids), np.array(mask)


def listed(rows):
    return {name: getattr(rows, name).tolist() for name in rows.__slots__}


def test_two_pairs_by_hand():
    """One row of 9 costs less than two of 5."""
    rows = share_prompts(*batch(([5, 6, 7], [5, 6, 8, 9]), ([1, 2], [1, 3, 4])))
    assert listed(rows) == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 2, 3, 4]],
        "position_ids": [[0, 1, 2, 2, 3, 0, 1, 1, 2]],
        "pieces": [[0, 0, 0, 0, 0, 1, 1, 1, 1]],
        "branches": [[0, 0, 1, 2, 2, 0, 1, 2, 2]],
        "places": [[0, 1, 2, -1], [5, 6, -1, -1], [0, 1, 3, 4], [5, 7, 8, -1]],
    }


def test_a_row_that_is_not_full():
    common = [7] * 2000
    rows = share_prompts(*batch(*[([*common, *[1] * 500], [*common, *[2] * 500])] * 2, ([7, 1], [7, 2])))
    assert rows.input_ids.shape == (2, 3003) and (rows.pieces == -1).sum() == 3  # no row of 6,003 tokens
    empty = rows.pieces == -1
    assert not rows.input_ids[empty].any() and not rows.position_ids[empty].any()


@pytest.mark.parametrize(
    ("chosen", "rejected", "ids", "places"),
    [
        ([1, 2], [1, 2], [1, 2], [[0, 1], [0, 1]]),  # equal answers
        ([1, 2, 3], [1, 2], [1, 2, 3], [[0, 1, 2], [0, 1, -1]]),  # one begins the other
        ([1, 2], [1, 2, 3], [1, 2, 3], [[0, 1, -1], [0, 1, 2]]),
    ],
)
def test_what_the_sides_have_in_common(chosen, rejected, ids, places):
    rows = share_prompts(*batch((chosen, rejected)))
    assert rows.input_ids.tolist() == [ids] and rows.places.tolist() == places


def test_a_pair_without_a_common_beginning_is_two_pieces():
    rows = share_prompts(*batch(([1, 2], [3, 2])))
    assert listed(rows) == {
        "input_ids": [[1, 2], [3, 2]],
        "position_ids": [[0, 1], [0, 1]],
        "pieces": [[0, 0], [1, 1]],
        "branches": [[0, 0], [0, 0]],
        "places": [[0, 1], [2, 3]],
    }
    # 10 common tokens save less than a mask of 4,010 x 4,010 costs more than two of 2,010 x 2,010.
    rows = share_prompts(*batch(([9] * 10 + [1] * 2000, [9] * 10 + [2] * 2000)))
    assert rows.input_ids.shape == (2, 2010)


def test_without_sharing_by_hand():
    rows = share_prompts(*batch(([5, 6, 7], [5, 6, 8, 9]), ([1, 2], [1, 3, 4])), share=False)
    assert listed(rows) == {
        "input_ids": [[5, 6, 7, 1, 2, 5, 6, 8, 9, 1, 3, 4]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1, 2]],
        "pieces": [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]],
        "branches": [[0] * 12],
        "places": [[0, 1, 2, -1], [3, 4, -1, -1], [5, 6, 7, 8], [9, 10, 11, -1]],
    }


SEQUENCES = st.lists(st.integers(1, 2), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SEQUENCES, SEQUENCES), min_size=1, max_size=7), st.booleans())
def test_a_token_sees_what_it_sees_in_its_own_sequence(pairs, share):
    rows = share_prompts(*batch(*pairs), share=share)
    length = rows.input_ids.shape[1]
    flat = {name: getattr(rows, name).reshape(-1).tolist() for name in rows.__slots__ if name != "places"}
    for number, sequence in enumerate([pair[side] for side in (0, 1) for pair in pairs]):
        places = rows.places[number].tolist()
        assert places[len(sequence) :] == [-1] * (len(places) - len(sequence))
        places = places[: len(sequence)]
        for at, place in enumerate(places):
            seen = [
                other
                for other in range(place // length * length, place + 1)
                if flat["pieces"][other] == flat["pieces"][place]
                and flat["branches"][other] in (0, flat["branches"][place])
            ]
            assert seen == places[: at + 1]  # the sequence up to here, in order
            assert [flat["input_ids"][other] for other in seen] == sequence[: at + 1]
            assert [flat["position_ids"][other] for other in seen] == [*range(at + 1)]
    in_common = [
        next((i for i, (a, b) in enumerate(zip(c, r, strict=False)) if a != b), min(len(c), len(r))) for c, r in pairs
    ]
    tokens = sum(len(c) + len(r) for c, r in pairs) - (sum(in_common) if share else 0)
    assert sum(pair >= 0 for pair in flat["pieces"]) == tokens == len({*rows.places[rows.places >= 0].tolist()})


def test_other_batches_are_refused():
    ids, mask = batch(([1, 2], [1, 3]))
    with pytest.raises(FormatError, match="has 1 sequences; expected chosen sides"):
        share_prompts(ids[:1], mask[:1])
    with pytest.raises(FormatError, match="padded on the left or within"):
        share_prompts(ids, np.array([[0, 1], [1, 1]]))
