"""Every accepted row format, recognised from one row; the same conversation from a list, JSON lines and Parquet."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, load_dataset

from hf_objectives.errors import ConversationError, FormatError, VisionContentError
from hf_objectives.labels.config import EncodingConfig
from hf_objectives.labels.formats import detect_format, drop_nulls, to_example
from hf_objectives.labels.ledger import Ledger
from hf_objectives.labels.prompts import to_prompt
from hf_objectives.labels.rows import RowEncoder, encode_row
from tests.support.chat_corpus import TOOL, TOOLS, byte_tokenizer, template, trained_text

EXCHANGE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": EXCHANGE, "prompt": "q"}, "messages", EXCHANGE),
        ({"messages": json.dumps(EXCHANGE)}, "messages", EXCHANGE),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", EXCHANGE),
        (
            {"instruction": "q", "input": "x", "output": "a", "system": "s"},
            "alpaca",
            [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\nx"}, EXCHANGE[1]],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", EXCHANGE),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]},
            "sharegpt",
            [EXCHANGE[0], {**EXCHANGE[1], "weight": 0}],
        ),
        (
            {"prompt": [*EXCHANGE, EXCHANGE[0]], "completion": [EXCHANGE[1]]},
            "prompt_completion",
            [*({**m, "train": False} for m in [*EXCHANGE, EXCHANGE[0]]), EXCHANGE[1]],
        ),
        ({"prompt": EXCHANGE[:1], "chosen": "a", "rejected": "b"}, "preference", EXCHANGE),
        (
            {
                "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "rejected": [EXCHANGE[0], {"role": "assistant", "content": "b"}],
            },
            "preference",
            EXCHANGE,
        ),
        (
            {"chosen": EXCHANGE, "rejected": [EXCHANGE[0], {"role": "assistant", "content": "b"}]},
            "preference",
            EXCHANGE,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "preference",
            EXCHANGE,
        ),
    ],
)
def test_conversational_rows(row, format, messages):
    assert detect_format(row) == format
    example = to_example(row)
    assert example.messages == messages
    if format == "preference":
        assert example.rejected == [EXCHANGE[0], {"role": "assistant", "content": "b"}]


def test_rows_that_are_no_conversation():
    assert to_example({"text": "t", "source": "s"}).text == "t"
    example = to_example({"prompt": "What? ", "completion": "That."})
    assert (example.kind, example.text, example.prompt_chars) == ("prompt_completion", "What? That.", 6)
    assert to_example({"input_ids": [1, 2], "labels": [-100, 2]}).labels == [-100, 2]
    example = to_example({"prompt": "What? ", "chosen": "That.", "rejected": "This."})
    assert (example.kind, example.text, example.rejected_text) == ("preference", "What? That.", "What? This.")
    assert example.prompt_chars == 6 and example.is_plain and not example.messages
    example = to_example({"chosen": "What? That.", "rejected": "What? Thus."})
    assert (example.text, example.rejected_text, example.prompt_chars) == ("What? That.", "What? Thus.", 8)


def test_a_preference_row_is_fine_tuned_on_its_chosen_answer():
    tokenizer = byte_tokenizer()
    plain = encode_row(tokenizer, {"prompt": "What? ", "chosen": "That.<|im_end|>", "rejected": "This."})
    assert tokenizer.decode(plain["input_ids"]) == "What? That.<|im_end|>"  # one EOS, whether the row has it or not
    assert trained_text(tokenizer, plain) == "That.<|im_end|>"
    earlier = [*EXCHANGE, {"role": "user", "content": "and?"}]
    asked = {"prompt": earlier, "chosen": [EXCHANGE[1]], "rejected": [EXCHANGE[1] | {"content": "b"}]}
    assert trained_text(tokenizer, encode_row(tokenizer, asked)) == "a<|im_end|>"


def test_sharegpt_tools():
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps(TOOLS),
    }
    roles = [message["role"] for message in to_example(row).messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    call = to_example(row).messages[1]["tool_calls"]
    assert call == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    qwen = byte_tokenizer(template("qwen3"))
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in trained_text(
        qwen, encode_row(qwen, row)
    )
    # A template without tool calls: the author's own text.
    chatml = byte_tokenizer()
    assert trained_text(chatml, encode_row(chatml, row)) == '{"name": "f", "arguments": {"x": 1}}<|im_end|>a<|im_end|>'


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"foo": 1, "bar": 2}, FormatError, "columns bar, foo; expected one of"),
        ({}, FormatError, "\\(none\\)"),
        ({"messages": None}, FormatError, "\\(none\\)"),
        ([1], FormatError, "a row is list"),
        ({"messages": EXCHANGE, "images": ["x"]}, VisionContentError, "column 'images'"),
        ({"messages": "not json"}, FormatError, "not JSON"),
        ({"messages": {"role": "user"}}, FormatError, "messages is dict"),
        ({"text": 5}, FormatError, "text is int"),
        ({"instruction": "q", "output": None, "text": 3}, FormatError, "text is int"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, ConversationError, "unknown speaker 'alien'"),
        ({"conversations": [{"value": "x"}]}, ConversationError, "expected"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, ConversationError, "not JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, ConversationError, "has no name"),
        ({"chosen": "a", "rejected": EXCHANGE, "prompt": "c"}, FormatError, "repeats the prompt|prompts differ"),
    ],
)
def test_rows_that_cannot_be_read(row, error, words):
    with pytest.raises(error, match=words):
        to_example(row)


def test_messages_that_are_none_are_data_errors():
    """A prompt of plain strings, and template variables that are not JSON, are named as any other bad row is."""
    with pytest.raises(ConversationError):
        encode_row(byte_tokenizer(), {"prompt": ["q"], "completion": EXCHANGE[1:]})
    with pytest.raises(ConversationError):
        RowEncoder(byte_tokenizer(), EncodingConfig(expand_turns=True)).encode(
            [{"messages": ["q"]}], source="s", ledger=Ledger()
        )
    with pytest.raises(FormatError, match="chat_template_kwargs is text but not JSON"):
        to_example({"messages": EXCHANGE, "chat_template_kwargs": "{"})
    with pytest.raises(FormatError, match="message 0 of the prompt is 'q'"):
        to_prompt({"chosen": ["q", "a"], "rejected": ["q", "b"]})


def test_tools_are_the_same_from_list_json_lines_parquet_and_after_map(tmp_path):
    """Two tools with different parameters never show each other's keys."""
    other = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    rows = [
        {"messages": TOOL, "tools": TOOLS},
        {"messages": [TOOL[0], {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [other, *TOOLS]},
    ]
    tokenizer = byte_tokenizer(template("qwen3"))
    expected = [encode_row(tokenizer, row) for row in rows]
    assert "null" not in tokenizer.decode(expected[1]["input_ids"])
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = Dataset.from_list(rows)
    listed.to_parquet(tmp_path / "rows.parquet")
    cache = str(tmp_path / "cache")
    loaded = {
        "list": listed,
        "json": load_dataset("json", data_files=str(lines), split="train", cache_dir=cache),
        "parquet": load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=cache),
        "map": listed.map(lambda row: {"extra": 1}),
    }
    for name, dataset in loaded.items():
        assert [encode_row(tokenizer, row) for row in dataset] == expected, name


def test_drop_nulls_keeps_members_of_lists():
    assert drop_nulls({"a": None, "b": {"c": None, "d": [None, {"e": None}]}}) == {"b": {"d": [None, {}]}}
