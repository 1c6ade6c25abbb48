"""Several rows of one conversation, and batches put together and taken apart, by hand."""

from __future__ import annotations

import numpy as np

from hf_objectives.labels.chat import Labelled
from hf_objectives.labels.overlength import concatenate, expand, fitting_turns, select
from tests.support.chat_corpus import PLAIN


def test_expand_keeps_a_greeting_and_drops_unanswered_questions():
    greeting = {"role": "assistant", "content": "Hi"}
    rows = expand([greeting, *PLAIN, {"role": "user", "content": "?"}])
    assert rows == [
        [greeting, *PLAIN[:2]],
        [{**greeting, "train": False}, PLAIN[0], {**PLAIN[1], "train": False}, *PLAIN[2:]],
    ]


def test_turns_fit_greedily_behind_the_system_message():
    system, ask, answer = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    turn = [ask, answer]
    assert fitting_turns([system, *turn, *turn, *turn, ask], len, 5) == [[system, *turn, *turn], [system, *turn]]
    assert fitting_turns([*turn, *turn], len, 1) == [turn, turn]  # a turn alone may be too long
    assert fitting_turns([system, ask], len, 9) == []


def batch(*rows):
    """Rows of ids, of which the odd ones are trained, each a run of its own."""
    ids = np.array([i for row in rows for i in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)])
    trained = np.flatnonzero(ids % 2)
    span_rows = np.searchsorted(offsets, trained, "right") - 1
    return Labelled(ids, np.where(ids % 2, ids, -100), offsets, np.stack([trained, trained + 1], axis=1), span_rows)


def test_batches_are_joined_and_rows_selected_with_their_runs():
    rows = [[1, 2], [4], [5, 7, 8], [9]]
    joined = concatenate([batch(*rows[:1]), batch(*rows[1:])])
    for made, expected in ((joined, batch(*rows)), (select(joined, np.array([2, 0])), batch(rows[2], rows[0]))):
        for name in ("ids", "labels", "offsets"):
            assert getattr(made, name).tolist() == getattr(expected, name).tolist()
        runs = sorted(zip(made.spans.tolist(), made.span_rows.tolist(), strict=True))
        assert runs == sorted(zip(expected.spans.tolist(), expected.span_rows.tolist(), strict=True))
