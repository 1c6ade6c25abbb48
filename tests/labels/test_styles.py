"""Templates that take one form of a conversation and not another are given the form that they take."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import TemplateError
from hf_objectives.labels.chat import encode_chat
from hf_objectives.labels.message_forms import STYLES, blocks, filled, parsed, quoted
from tests.support.chat_corpus import PLAIN, TOOL, TOOLS, byte_tokenizer, template, trained_runs

CALL = {"function": {"name": "f", "arguments": {"a": 1}}}


def test_forms_by_hand():
    message = {"role": "assistant", "tool_calls": [CALL]}
    assert filled([message]) == [{**message, "content": ""}]
    as_text = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]
    assert quoted([message]) == as_text and parsed(as_text) == [message]
    assert blocks([{"role": "user", "content": "x"}]) == [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


def test_forms_that_change_nothing_are_left_out():
    assert [style(PLAIN) is None for style in STYLES] == [False, True, True, True, True, True, False, True]
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
