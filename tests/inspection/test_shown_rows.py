"""Which rows are shown, and what is said of each."""

from __future__ import annotations

import pytest

from hf_objectives import demo
from hf_objectives.inspection.rows import inspect_rows
from hf_objectives.preparation.dataset import prepare_dataset
from tests.support import chat_corpus as corpus


@pytest.fixture(scope="module")
def tokenizer():
    return demo.build_tokenizer()


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def words(row) -> str:
    return "".join(token.text for token in row.tokens)


@pytest.mark.parametrize(
    ("overlength", "fates"),
    [
        ("drop", ["left out: 74 tokens, longer than max_length 60"]),
        ("cut", ["cut from 74 to 60 tokens"]),
        ("split_turns", ["part 1 of 2", "part 2 of 2"]),
    ],
)
def test_what_becomes_of_a_long_row(overlength, fates):
    # One token a byte and one a control token: 1 + 4 + 1 + 2 + 1 + 1 and 1 + 9 + 1 + 14 + 1 + 1, twice.
    row = {"messages": [*chat("ab", "x" * 14)["messages"], *chat("cd", "y" * 14)["messages"]]}
    tokenizer = corpus.byte_tokenizer()
    size = len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False))
    found = inspect_rows([row, chat("a", "b")], tokenizer, max_length=60, overlength=overlength)
    assert size == 74 and [one.fate for one in found.examples if one.row == 0] == fates
    assert found.examples[-1].fate == ""
    assert "longer_than_max_length" in found.examples[0].warnings


def test_packed_rows_name_their_documents(tokenizer):
    rows = demo.chats(30)
    found = inspect_rows(rows, tokenizer, max_length=400, packing=True)
    prepared = prepare_dataset(rows, tokenizer, max_length=400, packing=True)
    assert found.statistics.packed_rows == len(prepared) == len(found.packed)
    for shown, row in zip(found.packed, prepared, strict=True):
        assert [number for _, number, _ in shown] == row["rows"]
        assert [i for _, _, tokens in shown for token in tokens for i in token.ids] == row["input_ids"]
    assert found.statistics.fill == pytest.approx(sum(map(len, prepared["input_ids"])) / (400 * len(prepared)))


def test_few_rows_to_show_are_of_every_source_and_every_warning(tokenizer):
    rows = [{**chat(f"q{i}", "a"), "source": "one", "row": i} for i in range(50)]
    rows[30] = {**chat("long" * 200, "a"), "source": "one", "row": 30}
    rows.append({**chat("other", "b"), "source": "two", "row": 0})
    found = inspect_rows(rows, tokenizer, max_length=100, show=3)
    assert [(row.source, row.row) for row in found.examples] == [("one", 0), ("one", 30), ("two", 0)]


def test_a_long_row_leaves_room_for_the_others():
    tokenizer = corpus.byte_tokenizer()
    rows = [chat(f"q{i}", "a") for i in range(10)]
    rows.insert(3, chat("x" * 50_000, "a"))
    found = inspect_rows(rows, tokenizer, max_length=100, show_tokens=20_000)
    assert [row.row for row in found.examples] == list(range(11))
    long = found.examples[3]
    assert sum(len(token.ids) for token in long.tokens) == 8_000 and long.more == len(long.input_ids) - 8_000
    assert len(long.input_ids) > 50_000 and "x" * 7_000 in words(long)
    few = inspect_rows(
        rows, tokenizer, max_length=100, show_tokens=100
    )  # the long row is one of the first to be picked
    assert len(few.examples) > 1 and 3 not in [row.row for row in few.examples]


def test_rows_are_told_apart_whatever_their_numbers(tokenizer):
    rows = [{**chat("first", "one"), "row": 0}, {**chat("second", "two"), "row": 0}]
    found = inspect_rows(rows, tokenizer, max_length=40, packing=True)
    assert [(row.row, "first" in words(row), "second" in words(row)) for row in found.examples] == [
        (0, True, False),
        (0, False, True),
    ]
    assert found.warnings == [] and found.statistics.kept_rows == 2
    assert [number for row in found.packed for _, number, _ in row] == [0, 0]


def test_repeats_are_shown_beside_what_they_repeat(tokenizer):
    rows = [chat("same", "same"), *(chat(f"q{i}", "a") for i in range(20)), chat("same", "same")]
    found = inspect_rows(rows, tokenizer, show=3)
    assert [row.row for row in found.examples if "duplicates" in row.warnings] == [0, 21]
