"""Rows of distillation in every format, and their two parts."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError, DataError, FormatError
from hf_objectives.trainers.distillation_rows import has_answer, parts_of, read_rows, without_nulls
from tests.support.distillation_worlds import CHATS, LETTERS, encoded

ASK, SAY = CHATS[0]


def read(rows, lmbda=0.5, name="rows", **options):
    settings = {"max_length": None, "train_on": "assistant", "control_tokens": "plain", "chat_template_kwargs": None}
    args = SimpleNamespace(lmbda=lmbda, main_process_first=lambda desc: nullcontext(), **{**settings, **options})
    return read_rows(rows, name, LETTERS, args)


def test_parts_by_hand():
    none = -100
    assert parts_of([5, 6, 7, 8, 9], [none, none, 7, none, none]) == ([5, 6], [7], [1])
    assert parts_of([5, 6, 7, 8, 9], [none, 6, none, 8, none]) == ([5], [6, 7, 8], [1, 0, 1])
    assert parts_of([5, 6], [5, 6]) == ([5], [6], [1])  # a text: its first id is predicted from nothing
    assert parts_of([5, 6, 7], [none] * 3) == ([5, 6], [7], [0])
    assert parts_of([5, 6, 7], [5, none, none]) == ([5, 6], [7], [0])


SHAREGPT = [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]
FORMS = {
    "messages": {"messages": [ASK, SAY]},
    "prompt and completion": {"prompt": [ASK], "completion": [SAY]},
    "ShareGPT": {"conversations": SHAREGPT},
    "Alpaca": {"instruction": "a b", "input": "", "output": "c"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_chats(form):
    row = read([FORMS[form]])[0]
    ids, labels = encoded([[ASK, SAY]])[0]
    assert (row["input_ids"], row["labels"], row["row"]) == (ids, labels, 0)
    assert row["prompt"] == [ASK]


def test_texts_and_encoded_rows_have_no_prompt():
    assert read([{"text": "a b"}], lmbda=0)[0] == {"row": 0, "input_ids": [4, 5, 1], "labels": [4, 5, 1]}
    row = {"input_ids": [4, 5, 1], "labels": [-100, 5, 1]}
    assert read([row], lmbda=0)[0] == {"row": 0, **row}
    for given in ({"text": "a b"}, row):
        with pytest.raises(FormatError, match="has no prompt"):
            read([given])


def test_prompts_alone():
    """They are what lmbda=1 needs."""
    assert read([{"prompt": "a b"}], lmbda=1)[0] == {"row": 0, "prompt": "a b"}
    assert read([{"messages": [ASK]}], lmbda=1)[0] == {"row": 0, "prompt": [ASK]}
    for row in ({"prompt": "a b"}, {"messages": [ASK]}):
        with pytest.raises(FormatError, match="'rows', row 0: the row is a prompt without an answer, and lmbda is 0.5"):
            read([row])


def test_datasets_streams_and_sets_by_name():
    rows = [{"messages": chat, "kind": "x"} for chat in CHATS]
    listed = [*read(rows)]
    assert [*read(Dataset.from_list(rows))] == listed == [*read(Dataset.from_list(rows).to_iterable_dataset())]
    assert [*read({"some": rows[:2]})["some"]] == listed[:2]
    assert read(None) is None


def test_options_of_encoding():
    ids, labels = encoded([CHATS[1]])[0]
    last = read([{"messages": CHATS[1]}], train_on="last_assistant")[0]
    assert last["input_ids"] == ids and last["labels"] == [-100] * (len(ids) - 3) + labels[-3:]
    short = read([{"messages": CHATS[1]}], max_length=8)[0]
    assert short["input_ids"] == ids[:8] and short["labels"] == labels[:6] + [-100] * 2


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], ConfigError, "rows has no rows"),
        ("rows.json", ConfigError, "rows is str; expected a Dataset"),
        ([{"messages": [ASK, SAY]}, {"messages": [ASK]}], FormatError, "row 1: the row is a prompt without an answer"),
        ([{"messages": [ASK, SAY]}, {"messages": []}], DataError, "row 1"),
        ([{"prompt": "a", "completion": "b"}, {"messages": [ASK, SAY]}], FormatError, "answer among rows that give a prompt"),
        ([{"prompt": [ASK], "image": "x"}], FormatError, "column 'image': pictures are not"),
        ([{"prompt": [ASK], "completion": [SAY], "tools": [{"name": "x"}]}], FormatError, "tools are not supported here"),
        ([{"words": 1}], FormatError, "'rows', row 0: unknown row format"),
    ],
)  # fmt: skip
def test_what_is_refused(rows, error, words):
    with pytest.raises(error, match=words):
        read(rows)


def test_whether_a_row_has_an_answer():
    assert has_answer({"text": "a"}) and has_answer({"input_ids": [1]}) and has_answer({"messages": [ASK, SAY]})
    assert has_answer({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert not has_answer({"prompt": "a"}) and not has_answer({"messages": [ASK]})


def test_a_table_gives_a_conversation_no_keys():
    """Two calls with arguments of different names: Arrow gives each the other's, as null, and null keys to all messages."""
    functions = [{"name": "f", "arguments": {key: 2}} for key in "ab"]
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": one}]} for one in functions
    ]
    chats = [[ASK, call, {"role": "tool", "name": "f", "content": "c"}] for call in calls]
    table = Dataset.from_list([{"prompt": chat} for chat in chats])
    assert table[0]["prompt"] != chats[0] and [without_nulls(row["prompt"]) for row in table] == chats


def test_rows_that_are_read_stay_as_they_are():
    """Also where they have gone through a list; ids of another tokenizer are not taken for ours."""
    once = read([{"messages": chat} for chat in CHATS])
    assert read(once) is once and [*read([*once])] == [*once]
    named = once.add_column("source", ["x"] * len(once))
    assert read(named) is named
    beyond = once.map(lambda row: {"input_ids": [*row["input_ids"][:-1], 99]})
    with pytest.raises(FormatError, match="id 99 is not one of the tokenizer's"):
        read(beyond)
    prompts = read([{"prompt": "a"}], lmbda=1)
    assert read(prompts, lmbda=1) is prompts
    with pytest.raises(FormatError, match="a prompt without an answer"):
        read(prompts, lmbda=0.5)
