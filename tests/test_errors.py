"""Errors name their place in the data, also after they have left a worker process."""

from __future__ import annotations

import pickle

import pytest

from hf_objectives.errors import ConversationError, DataError, FormatError, nearest, place


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ({}, ""),
        ({"source": "alpaca"}, "source 'alpaca'"),
        ({"row": 0}, "row 0"),
        ({"source": "alpaca", "row": 17, "turn": 2}, "source 'alpaca', row 17, turn 2"),
    ],
)
def test_place(where, text):
    assert place(**where) == text


def test_a_caller_adds_what_it_knows_and_changes_nothing_that_is_known():
    error = ConversationError("no messages", turn=3).at(source="chats", row=7)
    assert str(error) == "source 'chats', row 7, turn 3: no messages"
    assert str(error.at(source="other", row=8)) == "source 'chats', row 7, turn 3: no messages"


def test_the_place_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(FormatError("two formats", source="s", row=4)))
    assert type(error) is FormatError and isinstance(error, DataError)
    assert (error.reason, error.source, error.row, error.turn) == ("two formats", "s", 4, None)


def test_nearest():
    assert nearest("best_fitt", ["best_fit", "concat"]) == "; did you mean 'best_fit'?"
    assert nearest("zzz", ["best_fit", "concat"]) == ""
