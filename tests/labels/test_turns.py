"""Turns in a render, and which of them are of one kind."""

from __future__ import annotations

from hf_objectives.labels.sentinels import mark, read_sentinels
from hf_objectives.labels.turns import read_turns


def turns(messages):
    marked = "".join(f"<{m['role'][0]}>{m['content']}</s>" for m in mark(messages, begins=True))
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return read_turns(messages, trained, read_sentinels(marked), None)


def test_frames_by_hand():
    (turn,) = turns([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    assert (turn.frame_before, turn.frame_after, turn.window) == ("</s><a>", "</s>", "</s><a>Hello")
    assert (turn.before, turn.begin, turn.first, turn.end, turn.head) == (5, 12, 17, 17, 3)
    assert turn.following is None


def test_turns_of_one_kind():
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    found = turns(exchange * 6)
    kinds, followed = [turn.kind for turn in found], [turn.frame_kind for turn in found]
    # The first turns have other messages before them, and nothing follows the last.
    assert kinds[2] == kinds[3] == kinds[5] and kinds[0] != kinds[2]
    assert followed[2] == followed[3] == followed[4] != followed[5]
