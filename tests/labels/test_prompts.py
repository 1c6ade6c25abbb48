"""Prompts of rows of every format, and datasets of them in one form."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError, ConversationError, DataError, FormatError
from hf_objectives.labels.prompts import to_prompt, with_prompts

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "content": "Four."}
AGAIN = {"role": "user", "content": "And 3+3?"}
SIX = {"role": "assistant", "content": "Six."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "name": "add", "content": "4"}

FORMS = {
    "text": ({"prompt": "2+2="}, "2+2="),
    "messages as prompt": ({"prompt": [SYSTEM, ASK]}, [SYSTEM, ASK]),
    "messages as JSON": ({"prompt": json.dumps([ASK])}, json.dumps([ASK])),  # text, as TRL takes it
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, "2+2="),
    "conversational completion": ({"prompt": [SYSTEM, ASK], "completion": [FOUR]}, [SYSTEM, ASK]),
    "messages": ({"messages": [SYSTEM, ASK, FOUR]}, [SYSTEM, ASK]),
    "several turns": ({"messages": [ASK, FOUR, AGAIN, SIX]}, [ASK, FOUR, AGAIN]),
    "no answer yet": ({"messages": [ASK, FOUR, AGAIN]}, [ASK, FOUR, AGAIN]),
    "a tool's result": ({"messages": [ASK, CALL, RESULT, FOUR]}, [ASK, CALL, RESULT]),
    "words of training": ({"messages": [{**ASK, "weight": 0.5}, {**FOUR, "train": True}]}, [ASK]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "Four."}]},
        [ASK],
    ),
    "ShareGPT with system": (
        {
            "conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "x"}],
            "system": "Be brief.",
        },
        [SYSTEM, ASK],
    ),
    "Alpaca": ({"instruction": "What is 2+2?", "input": "", "output": "Four."}, [ASK]),
    "Alpaca with input": (
        {"instruction": "Add", "input": "2 2", "output": "4"},
        [{"role": "user", "content": "Add\n\n2 2"}],
    ),
    "preference": ({"prompt": [SYSTEM, ASK], "chosen": [FOUR], "rejected": [SIX]}, [SYSTEM, ASK]),
    "preference with its own prompt": ({"chosen": [ASK, FOUR], "rejected": [ASK, SIX]}, [ASK]),
    "preference of later turns": (
        {"chosen": [ASK, FOUR, AGAIN, SIX], "rejected": [ASK, FOUR, AGAIN, FOUR]},
        [ASK, FOUR, AGAIN],
    ),
    "plain preference": ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "2+2="),
    "plain preference with its own prompt": ({"chosen": "2+2=4", "rejected": "2+2=5"}, "2+2="),
}


@pytest.mark.parametrize("name", FORMS)
def test_prompts(name):
    row, expected = FORMS[name]
    assert to_prompt(row) == expected
    assert to_prompt({**row, "text": None, "source": "data"}) == expected  # a column that other rows of a table fill


BAD = {
    "nothing to answer": ({"text": "A document."}, "has no prompt"),
    "encoded": ({"input_ids": [1, 2]}, "has no prompt"),
    "unknown": ({"question": "2+2"}, "unknown row format with columns question"),
    "empty text": ({"prompt": " \n"}, "the prompt is empty"),
    "no messages": ({"prompt": []}, "the prompt is empty"),
    "only an answer": ({"messages": [FOUR]}, "the prompt is empty"),
    "answered": ({"prompt": [ASK, FOUR]}, "ends with a turn of assistant; expected one of user or tool"),
    "only a system message": ({"prompt": [SYSTEM]}, "ends with a turn of system"),
    "not messages": ({"prompt": ["hello"]}, "message 0 of the prompt is 'hello'"),
    "no role": ({"prompt": [{"content": "hello"}]}, "message 0 of the prompt"),
    "a number": ({"prompt": 7}, "int"),
    "tools": ({"prompt": [ASK], "tools": [{"type": "function"}]}, "tools are not supported"),
    "equal sides": ({"chosen": [ASK, FOUR], "rejected": [ASK, FOUR]}, "ends with a turn of assistant"),
    "one side": ({"prompt": [ASK], "chosen": [FOUR]}, "unknown row format"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_without_a_prompt(name):
    row, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        to_prompt(row, source="mine", row_index=7)
    assert str(caught.value).startswith("source 'mine', row 7: ")


def test_a_malformed_conversation_is_named():
    with pytest.raises(ConversationError, match=r"source 'mine', row 3, turn 0: unknown speaker 'bird'"):
        to_prompt({"conversations": [{"from": "bird", "value": "tweet"}]}, source="mine", row_index=3)


def test_datasets_of_every_kind():
    rows = demo.preferences(5)
    expected = [row["prompt"] for row in rows]
    for dataset in (rows, tuple(rows), Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        found = list(with_prompts(dataset, "train_dataset"))
        assert [row["prompt"] for row in found] == expected
        assert [row["answer"] for row in found] == [row["answer"] for row in rows]  # what reward functions are given
        assert [row["row"] for row in found] == [0, 1, 2, 3, 4]
    several = with_prompts(
        DatasetDict({"a": Dataset.from_list(rows), "b": Dataset.from_list(rows[:2])}), "eval_dataset"
    )
    assert [len(several[name]) for name in ("a", "b")] == [5, 2]
    assert with_prompts(None, "eval_dataset") is None
    assert with_prompts([{"prompt": "x", "row": 41}], "train_dataset")[0]["row"] == 41


def test_rows_of_several_formats_keep_all_columns():
    rows = [
        {"messages": [ASK, FOUR]},
        {"conversations": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "x"}], "answer": "4"},
        {"instruction": "What is 2+2?", "output": "4", "answer": "four"},
        {"prompt": [ASK]},
    ]
    found = with_prompts(rows, "train_dataset")
    assert found["prompt"][:] == [[ASK]] * 4
    assert found["answer"][:] == [None, "4", "four", None]


def test_text_among_conversations():
    rows = [
        {"messages": [ASK, FOUR]},
        {"messages": [ASK, FOUR]},
        {"instruction": None, "completion": "4", "prompt": "2+2="},
    ]
    with pytest.raises(
        FormatError, match="source 'train_dataset', row 2: the prompt is text among prompts that are a conv"
    ):
        with_prompts(rows, "train_dataset")


@pytest.mark.parametrize("dataset", ["a path", 7])
def test_what_is_no_dataset(dataset):
    with pytest.raises(ConfigError, match=f"train_dataset is {type(dataset).__name__}; expected a Dataset"):
        with_prompts(dataset, "train_dataset")


def test_a_bad_row_is_named():
    with pytest.raises(FormatError, match="source 'eval_dataset b', row 1: the prompt is empty"):
        with_prompts({"a": [{"prompt": "x"}], "b": [{"prompt": "x"}, {"prompt": ""}]}, "eval_dataset")
