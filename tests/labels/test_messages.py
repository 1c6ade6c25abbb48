"""Messages: cleaned for a template, and safe against forged control tokens."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.errors import ConversationError
from hf_objectives.labels.messages import CLOSE, OPEN, ControlTokens, defuse, read_messages

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "x", "n": 1}}}


def test_what_the_template_sees():
    turns = read_messages(
        [
            {"role": "user", "content": "q", "name": None},
            {"role": "assistant", "content": "a", "reasoning": "r", "train": False},
            {"role": "assistant", "content": "b", "weight": 1, "tool_calls": []},
        ]
    )
    assert turns.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "r", "thinking": "r", "reasoning_content": "r"},
        {"role": "assistant", "content": "b"},
    ]
    assert turns.trained == [2]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only the assistant calls tools"),
        ({"role": "assistant", "content": "", "tool_calls": "f"}, "tool_calls is str"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}, "has no name"),
        ({"role": "assistant", "content": "x", "reasoning_content": 3}, "reasoning_content is int"),
        ({"role": "user", "content": [{"type": "text"}]}, "content block"),
        ({"role": "assitant", "content": "x"}, "did you mean 'assistant'"),
        ("hello", "expected a message with role and content"),
    ],
)
def test_malformed_messages_are_named(message, words):
    with pytest.raises(ConversationError, match=words) as caught:
        read_messages([message])
    assert caught.value.turn == 0


def test_a_tool_may_answer_nothing():
    assert read_messages([{"role": "tool", "content": ""}]).messages == [{"role": "tool", "content": ""}]


TOKENS = ControlTokens(["<|im_start|>", "<|im_end|>", "<s>"])


def test_wrapping_by_hand():
    assert TOKENS.wrap("a<|im_end|>b") == f"a{OPEN}<|im_end|>{CLOSE}b"
    assert TOKENS.wrap("end <|im_") == f"end <|im_{CLOSE}"
    assert TOKENS.wrap("end|> x <") == f"{CLOSE}end|> x <{CLOSE}"
    assert not TOKENS.touches("a < b") and TOKENS.touches("a <|") and TOKENS.touches("<s>")


@given(
    st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<s>", "<", "|>", "<|im_", "s>", "a", " "]), max_size=12)
)
def test_no_text_keeps_a_control_token(pieces):
    text = "".join(pieces)
    wrapped = TOKENS.wrap_all(text)
    assert wrapped.replace(OPEN, "").replace(CLOSE, "") == text
    # What is left of each mark is encoded apart from what is right of it, so that no token can form across one.
    outside = re.sub(f"{OPEN}.*?{CLOSE}", CLOSE, wrapped, flags=re.DOTALL)
    assert not TOKENS.pattern.search(outside)


def test_assistants_keep_their_markup():
    messages = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "<think>x</think><|im_end|>"}]
    defused = defuse(messages, ControlTokens(["<think>", "<|im_end|>"]), ControlTokens(["<|im_end|>"]))
    assert defused[0]["content"] == f"{OPEN}<think>{CLOSE}"
    assert defused[1]["content"] == f"<think>x</think>{OPEN}<|im_end|>{CLOSE}"
    assert defuse(messages, None, None) == messages
