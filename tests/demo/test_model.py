"""The built-in tokenizer and model, and the share of questions that a model answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hf_objectives import demo
from hf_objectives.labels import encode_row


@pytest.mark.slow
def test_tokenizer_and_model():
    tokenizer = demo.build_tokenizer()
    text = "What is 12 plus 7? naïve 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    a, b = demo.build_model(tokenizer), demo.build_model(tokenizer)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert 1e5 < sum(p.numel() for p in a.parameters()) < 2e6
    roles = ("system", "user", "assistant", "tool", "<|im_start|>", "<|im_end|>", "<tool_call>")
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in roles)
    for row in demo.chats(30):
        encoded = encode_row(tokenizer, row)
        trained = tokenizer.decode([label for label in encoded["labels"] if label != -100])
        expected = "".join(
            "<tool_call>calculator "
            + json.dumps(m["tool_calls"][0]["function"]["arguments"])
            + "</tool_call><|im_end|>"
            if m.get("tool_calls")
            else m["content"] + "<|im_end|>"
            for m in row["messages"]
            if m["role"] == "assistant"
        )
        assert trained == expected


def test_a_tokenizer_is_nobody_elses():
    changed = demo.build_tokenizer()
    changed.add_tokens(["of its own"])
    changed.chat_template = None
    tokenizer = demo.build_tokenizer()
    assert len(tokenizer) == 640 and tokenizer.chat_template is not None
    assert "of its own" in changed.get_vocab() and "of its own" not in tokenizer.get_vocab()


def test_exact_match_counts_letters():
    tokenizer = demo.build_tokenizer()
    model = demo.build_model(tokenizer)
    asked = demo.questions(5, split="test", skills=["sorting"])
    share, answers = demo.exact_match(model, tokenizer, asked, max_new_tokens=2)
    assert share == 0 and [question for question, _ in answers] == asked


def test_a_call_is_the_answer_where_a_calculator_is_needed():
    (question,) = demo.questions(1, skills=["multiplication"])
    row = next(row for row in demo.chats(50) if row["source"] == "tool")
    call = next(m["tool_calls"][0]["function"] for m in row["messages"] if m.get("tool_calls"))
    asked = replace(question, expression=call["arguments"]["expression"])
    template = demo.build_tokenizer().apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
    assert f"assistant\n{demo.expected(asked)}<|im_end|>" in template
