"""Marks in messages, found again in what a template printed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.labels.sentinels import mark

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "x", "n": 1}}}


def test_marks_are_found_where_texts_end():
    messages = [{"role": "user", "content": "ab "}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    user, assistant = mark(messages)
    call = assistant["tool_calls"][0]["function"]
    marks = read_marks(f"<{user['content']}|{call['name']} {call['arguments']['a']}>{call['name']}")
    assert marks.text == "<ab |f x>f"
    assert marks.positions == {0: [3], 1: [6, 8]}  # the second mention of the tool is not the call
    assert marks.calls == {1: {0}}
    assert mark(messages, only=0)[1] == messages[1]


@given(st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=5))
def test_a_render_without_its_marks_is_the_render(texts):
    messages = [{"role": "user", "content": text} for text in texts]
    marks = read_marks("|".join(message["content"] for message in mark(messages)))
    assert marks.text == "|".join(texts)
    at = 0
    for i, text in enumerate(texts):
        assert marks.end(i) == (at + len(text.rstrip()) if text.strip() else None)
        at += len(text) + 1
