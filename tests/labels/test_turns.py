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


def test_turns_of_one_kind_have_one_key():
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    keys = [turn.key for turn in turns(exchange * 6)]
    # The first turns have other messages before them, and nothing follows the last.
    assert keys[2] == keys[3] == keys[4]
    assert keys[0] != keys[2] and keys[5] != keys[2]
