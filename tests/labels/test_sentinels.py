"""Sentinels in messages, found again in what a template printed; and how far two renders agree."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.errors import ConversationError
from hf_objectives.labels.sentinels import agreement, common_prefix, mark, read_sentinels, whole

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "x", "n": 1}}}


def test_sentinels_are_found_where_texts_begin_and_end():
    messages = [{"role": "user", "content": " ab "}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    user, assistant = mark(messages, begins=True)
    call = assistant["tool_calls"][0]["function"]
    found = read_sentinels(f"<{user['content']}|{call['name']} {call['arguments']['a']}>{call['name']}")
    assert found.text == "< ab |f x>f"
    assert found.begins == {0: 2}
    assert found.ends == {0: [4], 1: [7, 9]}  # the second mention of the tool is not the call
    assert found.calls == {1: {0}}
    assert found.last_end() == 9
    assert mark(messages, only=range(1))[1] == messages[1]


@given(st.lists(st.text("ab \n", max_size=6), min_size=1, max_size=5))
def test_a_render_without_its_sentinels_is_the_render(texts):
    messages = [{"role": "user", "content": text} for text in texts]
    found = read_sentinels("|".join(message["content"] for message in mark(messages, begins=True)))
    assert found.text == "|".join(texts)
    at = 0
    for i, text in enumerate(texts):
        assert found.end(i) == (at + len(text.rstrip()) if text.strip() else None)
        assert found.begins.get(i) == (at + len(text) - len(text.lstrip()) if text.strip() else None)
        at += len(text) + 1


def test_more_messages_than_code_points_are_refused():
    with pytest.raises(ConversationError, match="at most 16,384"):
        mark([{"role": "user", "content": "a"}] * 16_385)


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_common_prefix(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_agreement_by_hand():
    assert agreement("}</call>\n<end>", "}</call> <end>\n") == (14, 14)
    assert agreement(" [INST]a", "[INST]b") == (7, 6)
    assert agreement("a ", "b") == (0, 0)


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_agreement_is_the_common_prefix_of_what_is_no_white_space(a, b):
    in_a, in_b = agreement(a, b)
    said_a, said_b = "".join(a.split()), "".join(b.split())
    same = said_a[: common_prefix(said_a, said_b)]
    assert "".join(a[:in_a].split()) == "".join(b[:in_b].split()) == same


def test_a_control_token_is_not_split():
    markers = re.compile("<end>")
    assert [whole(markers, "a<end>b", cut) for cut in range(8)] == [0, 1, 1, 1, 1, 1, 6, 7]
