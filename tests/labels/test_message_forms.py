"""Templates that take one form of a conversation and not another are given the form that they take."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import TemplateError
from hf_objectives.labels.chat import encode_chat
from hf_objectives.labels.message_forms import FORMS, blocks, filled, joined, parsed, quoted
from tests.support.chat_corpus import PLAIN, TOOL, TOOLS, byte_tokenizer, template, trained_runs

CALL = {"function": {"name": "f", "arguments": {"a": 1}}}


def test_forms_by_hand():
    message = {"role": "assistant", "tool_calls": [CALL]}
    assert filled([message]) == [{**message, "content": ""}]
    as_text = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]
    assert quoted([message]) == as_text and parsed(as_text) == [message]
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]
    assert joined(parts) == [{"role": "user", "content": "xy"}]
    assert blocks([{"role": "user", "content": "x"}]) == [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


def test_forms_that_change_nothing_are_left_out():
    assert [form(PLAIN) is None for form in FORMS] == [False, True, True, True, True, True, False, True, True]
    assert parsed([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "not json"}]}]) is None


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next"])
def test_block_templates_take_strings(name):
    tokenizer = byte_tokenizer(template(name))
    as_blocks = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]
    row = encode_chat(tokenizer, PLAIN)
    assert row == encode_chat(tokenizer, as_blocks)
    assert row["input_ids"] == tokenizer.apply_chat_template(as_blocks)["input_ids"]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseekv3", "glm4moe", "gemma4_v5", "qwen3_5_think"])
def test_arguments_as_text_and_as_mapping_train_the_same(name):
    tokenizer = byte_tokenizer(template(name))
    call = {**TOOL[1]["tool_calls"][0]}
    call["function"] = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
    as_text = [TOOL[0], {**TOOL[1], "tool_calls": [call]}, *TOOL[2:]]
    rows = [encode_chat(tokenizer, messages, tools=TOOLS) for messages in (TOOL, as_text)]
    assert trained_runs(tokenizer, rows[0]) == trained_runs(tokenizer, rows[1])


def test_the_first_error_is_told_when_no_form_fits():
    with pytest.raises(TemplateError, match="0 of the 1 tool calls|drops this assistant turn"):
        encode_chat(byte_tokenizer(), TOOL, tools=TOOLS)


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It is four."}]},
]
JOINED = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "It is four."}]
PRINTS_ANYTHING = (
    "{% for m in messages %}<u>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
)


@pytest.mark.parametrize("text", [None, template("qwen3"), template("llama3"), template("phi3"), PRINTS_ANYTHING])
def test_text_parts_are_joined_for_templates_of_plain_strings(text):
    """They add parts to a string (a TypeError), drop them (Qwen3), or print them as Python writes a list."""
    tokenizer = byte_tokenizer() if text is None else byte_tokenizer(text)
    assert encode_chat(tokenizer, PARTS) == encode_chat(tokenizer, JOINED)


def test_text_parts_stay_parts_where_the_template_knows_them():
    tokenizer = byte_tokenizer(template("qwen2_5_vl"))
    assert encode_chat(tokenizer, PARTS)["input_ids"] == tokenizer.apply_chat_template(PARTS)["input_ids"]
