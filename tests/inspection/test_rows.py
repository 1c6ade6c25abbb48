"""What a look at rows gives: tokens with their texts, what becomes of each row, figures and bars."""

from __future__ import annotations

import numpy as np
import pytest

from hf_objectives import demo
from hf_objectives.errors import ConfigError, ConversationError, FormatError
from hf_objectives.inspection.rows import histogram, inspect_rows
from hf_objectives.preparation.dataset import prepare_dataset
from tests.support import chat_corpus as corpus


@pytest.fixture(scope="module")
def tokenizer():
    return demo.build_tokenizer()


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_what_is_shown_is_what_is_trained(tokenizer):
    rows = demo.chats(40)
    found = inspect_rows(rows, tokenizer, max_length=150)
    prepared = prepare_dataset(rows, tokenizer, max_length=150, packing=False)
    kept = [row for row in found.examples if not row.fate.startswith("left out")]
    assert [row.row for row in kept] == prepared["row"][:] and [row.source for row in kept] == prepared["source"][:]
    for shown, row in zip(kept, prepared, strict=True):
        assert shown.input_ids.tolist() == row["input_ids"] and shown.labels.tolist() == row["labels"]
        assert [i for token in shown.tokens for i in token.ids] == row["input_ids"]
        assert "".join(token.text for token in shown.tokens) == tokenizer.decode(row["input_ids"])
        assert sum(len(token.ids) for token in shown.tokens if token.trained) == sum(x != -100 for x in row["labels"])
    figures = found.statistics
    assert figures.rows == 40 and figures.kept_rows == len(prepared) and figures.too_long == 40 - len(prepared)
    assert figures.kept_tokens == sum(map(len, prepared["input_ids"]))
    assert sum(count for _, _, count in found.histogram) == 40


def test_bars():
    assert histogram(np.array([3, 4, 4, 9])) == [
        (3, 3, 1),
        (4, 4, 2),
        (5, 5, 0),
        (6, 6, 0),
        (7, 7, 0),
        (8, 8, 0),
        (9, 9, 1),
    ]
    far = histogram(np.array([10] * 50 + [5000]))
    assert far[0] == (8, 15, 50) and far[-1] == (4096, 8191, 1)


def test_what_cannot_be_looked_at(tokenizer):
    with pytest.raises(FormatError, match="no rows"):
        inspect_rows([], tokenizer)
    with pytest.raises(ConfigError, match="overlength"):
        inspect_rows([chat("a", "b")], tokenizer, overlength="droop")
    with pytest.raises(ConfigError, match="packing needs max_length"):
        inspect_rows([chat("a", "b")], tokenizer, max_length=None, packing=True)


def words(row) -> str:
    return "".join(token.text for token in row.tokens)


def test_the_ledger_names_rows_by_their_own_numbers(tokenizer):
    found = inspect_rows([{**chat("x " * 100, "one"), "row": 70}, chat("second", "two")], tokenizer, max_length=40)
    assert found.ledger["data"].dropped_examples == {"longer than max_length": [70]}


def test_lengths_of_expanded_turns_are_those_of_the_rows_made_of_them():
    tokenizer = corpus.byte_tokenizer()
    turns = [message for i in range(4) for message in chat(f"question {i}", "x" * 40)["messages"]]
    found = inspect_rows([{"messages": turns}], tokenizer, max_length=200, expand_turns=True)
    # A token a byte and one a control token: 1 + 4 + 1 + 10 + 1 + 1 of the user, 1 + 9 + 1 + 40 + 1 + 1 of the answer.
    sizes = [71, 142, 213, 284]
    figures = found.statistics
    assert (figures.rows, figures.shortest, figures.longest, figures.tokens) == (1, 71, 284, sum(sizes))
    assert figures.too_long == 2 and sum(count for _, _, count in found.histogram) == 4
    assert [row.fate for row in found.examples] == [f"part {k} of 2, 2 others left out" for k in (1, 2)]
    (warning,) = found.warnings
    assert "1 of 1 rows have parts that are longer than max_length 200, the longest 284 tokens" in warning.evidence


def test_rows_that_cannot_be_used_are_told_and_the_others_looked_at(tokenizer):
    robot = {"messages": [{"role": "robot", "content": "x"}]}
    found = inspect_rows([chat("a", "b"), {**robot, "row": 40}, "text", robot, chat("c", "d")], tokenizer)
    warning = found.warnings[0]
    assert (warning.kind, warning.severity, warning.rows) == (
        "refused",
        "error",
        (("data", 40), ("data", 2), ("data", 3)),
    )
    assert "3 of 5 rows cannot be used. data 40, turn 0 and 1 more: unknown role 'robot'" in warning.evidence
    assert "data 2: a row is str" in warning.evidence
    assert [row.row for row in found.examples] == [0, 4] and found.statistics.rows == 5
    assert found.ledger["data"].rows_in == 5 and found.ledger["data"].rows_out == 2
    with pytest.raises(ConversationError, match="source 'x', row 7.*robot"):
        inspect_rows([{**robot, "row": 7}, robot], tokenizer, source="x")
