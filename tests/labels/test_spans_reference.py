"""The fast way to the spans against the definition, in which every prompt is rendered; and that it is linear in the turns."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from hf_objectives.errors import DataError
from hf_objectives.labels.chat import ChatEncoder
from hf_objectives.labels.formats import to_example
from hf_objectives.labels.templates import Renderer
from tests.support.chat_corpus import CALL, ORIGINALS, TOOLS, byte_tokenizer, template
from tests.support.conversations import conversation
from tests.support.prefix_reference import reference_render

TEXTS = os.environ.get("HF_OBJECTIVES_TEST_TEXTS")
BLOCK_TEMPLATES = ("idefics3", "llava_next", "smolvlm")


def outcome(render, *arguments):
    """Text and spans, or the kind of error."""
    try:
        rendered = render(*arguments)
    except DataError as error:
        return type(error).__name__
    return rendered.text, [tuple(span) for span in rendered.spans]


def check(name, conversations):
    """One encoder, which learns from conversation to conversation, against a reference that remembers nothing."""
    tokenizer = byte_tokenizer(template(name), special=["<|unused|>"])
    encoder = ChatEncoder(tokenizer)
    trained = 0
    for messages, tools in conversations:
        found = outcome(encoder.render, messages, tools)
        assert found == outcome(reference_render, tokenizer, messages, tools), (name, messages)
        trained += isinstance(found, tuple)
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_generated_conversations(name):
    generated = []
    for i in range(14):
        tools = i % 2 == 0
        messages = conversation(random.Random(i), tools=tools, reasoning=i % 3 == 0, longest=10 if i % 4 else 4)
        if any(message["role"] == "assistant" and message.get("train", True) for message in messages):
            generated.append((messages, TOOLS if tools else None))
    assert check(name, generated) >= 2


@pytest.mark.slow
@pytest.mark.skipif(TEXTS is None, reason="needs HF_OBJECTIVES_TEST_TEXTS, a folder of example data")
@pytest.mark.parametrize("name", ["gptoss", "llama3_1", "qwen2_5", "qwen3", "qwen3_6", "gemma4_v5"])
def test_real_conversations(name):
    rows = []
    for file, count in (("alpaca_en_demo.json", 40), ("glaive_toolcall_en_demo.json", 20)):
        for row in json.loads((Path(TEXTS or "") / file).read_text())[:count]:
            example = to_example(row)
            rows.append((example.messages, example.tools))
    assert check(name, rows) >= 40


def long_conversation(turns, tools):
    messages = []
    for n in range(turns // 2):
        messages.append({"role": "user", "content": f"question {n}"})
        if tools and n % 3 == 1:
            call = {**CALL, "id": f"call{n:05}", "function": {"name": "run", "arguments": {"q": f"text {n}", "n": n}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "run", "tool_call_id": call["id"], "content": f"found {n}"})
        messages.append({"role": "assistant", "content": f"answer {n}"})
    return messages


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", ORIGINALS)
def test_the_cost_is_linear_in_the_turns(name, tools, monkeypatch):
    """The prompts of the first turns are rendered, later those of a few: all renders together cost a few conversations."""
    encoder = ChatEncoder(byte_tokenizer(template(name), special=["<|unused|>"]))
    given = TOOLS if tools else None
    try:
        encoder.render(long_conversation(20, tools), given)
    except DataError:
        assert tools  # a template without tools
        return
    rendered = []
    plain = Renderer.__call__

    def counting(self, messages, **options):
        rendered.append(len(messages))
        return plain(self, messages, **options)

    monkeypatch.setattr(Renderer, "__call__", counting)
    messages = long_conversation(240, tools)
    encoder.render(messages, given)
    assert len(rendered) <= 64 and sum(rendered) <= 12 * len(messages)
