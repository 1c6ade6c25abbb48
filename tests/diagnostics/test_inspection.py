"""What a look at rows gives: tokens with their texts, what becomes of each row, figures and bars."""

from __future__ import annotations

import chat_corpus as corpus
import numpy as np
import pytest

from hf_objectives import demo
from hf_objectives.diagnostics.inspection import TokenTexts, histogram, inspect_rows
from hf_objectives.errors import ConfigError, ConversationError, FormatError
from hf_objectives.prepare import prepare_dataset


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


def test_tokens_that_share_a_character_stay_together():
    tokenizer = corpus.byte_tokenizer()
    ids = np.array(tokenizer("a👩é")["input_ids"], np.int32)
    tokens = TokenTexts(tokenizer).tokens(ids, ids)
    assert [(token.text, len(token.ids)) for token in tokens] == [("a", 1), ("👩", 4), ("é", 2)]
    broken = TokenTexts(tokenizer).tokens(ids[:3], ids[:3])  # a row that ends within a character
    assert [len(token.ids) for token in broken] == [1, 2] and broken[1].text == "\ufffd"


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
        assert [number for _, number, _ in shown.documents] == row["rows"]
        assert [i for _, _, tokens in shown.documents for token in tokens for i in token.ids] == row["input_ids"]
        assert shown.num_tokens == len(row["input_ids"])
    assert found.statistics.fill == pytest.approx(sum(map(len, prepared["input_ids"])) / (400 * len(prepared)))


def test_few_rows_to_show_are_of_every_source_and_every_warning(tokenizer):
    rows = [{**chat(f"q{i}", "a"), "source": "one", "row": i} for i in range(50)]
    rows[30] = {**chat("long" * 200, "a"), "source": "one", "row": 30}
    rows.append({**chat("other", "b"), "source": "two", "row": 0})
    found = inspect_rows(rows, tokenizer, max_length=100, show=3)
    assert [(row.source, row.row) for row in found.examples] == [("one", 0), ("one", 30), ("two", 0)]


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
    with pytest.raises(ConversationError, match="row 1"):
        inspect_rows([chat("a", "b"), {"messages": [{"role": "robot", "content": "x"}]}], tokenizer)
