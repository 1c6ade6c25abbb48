"""From a segment to shards: no token is lost, and wrong records are named or counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives import demo
from hf_objectives.errors import FileFormatError, FormatError
from hf_objectives.preparation.config import CorpusConfig
from hf_objectives.preparation.corpus import load_prepared, prepare_corpus
from tests.support.corpora import SMALL, TOKENIZER, check_balance, write_demo, write_rows, write_texts

EOS = TOKENIZER.eos_token_id


def documents(rows) -> list[list[int]]:
    """Token ids of the documents of packed rows: the pieces that fill a row in order, then the rest."""
    pieces: dict[tuple[str, int], list[list[int]]] = {}
    for row in rows:
        begin = 0
        for length, source, number in zip(row["seq_lengths"], row["sources"], row["rows"], strict=True):
            pieces.setdefault((source, number), []).append(row["input_ids"][begin : begin + length])
            begin += length
        assert begin == len(row["input_ids"]) <= 64
    whole_first = (sorted(pieces[key], key=lambda piece: len(piece) < 64) for key in sorted(pieces))
    return [[token for piece in document for token in piece] for document in whole_first]


# Characters of every kind, control characters and unassigned ones too; lone surrogates are no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=90)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(
        st.one_of(TEXTS, st.just(""), st.just("x" * 63), st.just("y" * 64), st.just("<|im_end|>")), max_size=30
    ),
    strategy=st.sampled_from(["best_fit", "concat"]),
    labels=st.sampled_from(["auto", "always"]),
)
def test_no_token_is_lost(tmp_path_factory, texts, strategy, labels):
    folder = tmp_path_factory.mktemp("corpus")
    texts = ["start", *texts]
    path = write_texts(folder / "a.jsonl", texts)
    config = CorpusConfig(strategy=strategy, labels=labels, **SMALL)
    made = prepare_corpus({"a": path}, TOKENIZER, folder / "out", config)
    check_balance(made)
    rows = list(load_prepared(folder / "out"))
    if strategy == "concat":  # rows are one stream
        ids = np.concatenate([row["input_ids"] for row in rows])
        found = [list(part) for part in np.split(ids, np.flatnonzero(ids == EOS) + 1) if len(part)]
    else:
        found = documents(rows)
    # A last row of one token trains nothing and is left out; its token is in the account.
    if not made.sources["a"].dropped_tokens:
        assert all(ids[-1] == EOS for ids in found)
        assert [TOKENIZER.decode(ids[:-1]) for ids in found] == [text for text in texts if text.strip()]
    assert made.sources["a"].rows_in == len(texts)
    lengths = [length for row in rows for length in row["seq_lengths"]]
    assert made.ledgers["train"]["a"].trained == sum(max(0, length - 1) for length in lengths)
    if labels == "always":
        for row in rows:
            begins = np.cumsum([0, *row["seq_lengths"][:-1]])
            assert all(row["labels"][i] == -100 for i, n in zip(begins, row["seq_lengths"], strict=True) if n)
            assert sum(label != -100 for label in row["labels"]) == len(row["labels"]) - len(row["seq_lengths"])


def test_overflow_is_counted(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["x" * 200, "short"])
    for overflow, lost in (("truncate", 201 - 64), ("drop", 201), ("split", 0)):
        made = prepare_corpus({"a": path}, TOKENIZER, tmp_path / overflow, CorpusConfig(overflow=overflow, **SMALL))
        check_balance(made)
        assert made.sources["a"].dropped_tokens == ({"longer than max_length": lost} if lost else {})


def test_held_out_rows_have_accounts_and_shards_of_their_own(tmp_path):
    texts = [row["text"] for row in demo.texts(300)]
    path = write_texts(tmp_path / "a.jsonl", [*texts, texts[0]])
    made = prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(eval_share=0.2, **SMALL))
    check_balance(made)
    numbers = {
        split: {number for row in load_prepared(tmp_path / "out", split) for number in row["rows"]}
        for split in made.ledgers
    }
    assert numbers["train"].isdisjoint(numbers["validation"]) and 30 < len(numbers["validation"]) < 90
    assert len(numbers["train"] | numbers["validation"]) == 301
    assert (0 in numbers["train"]) == (300 in numbers["train"])  # two equal rows are on one side
    assert {split: ledger["a"].rows_in for split, ledger in made.ledgers.items()} == {
        split: len(found) for split, found in numbers.items()
    }


def test_chats_and_texts_side_by_side(tmp_path):
    chats = write_rows(tmp_path / "chats.jsonl", demo.chats(50))
    sources = {"texts": write_demo(tmp_path / "a.jsonl", 50), "chats": {"path": chats, "weight": 3}}
    made = prepare_corpus(sources, demo.build_tokenizer(), tmp_path / "out", CorpusConfig(256, num_proc=1))
    check_balance(made)
    assert {"texts", "chat", "tool"} == set(made.sources) and made.policy["labels"]
    assert len(load_prepared(tmp_path / "out")) == made.num_rows  # also of chats, whose rows name other sources
    assert {"chat", "tool"} == {n for row in load_prepared(tmp_path / "out", sources=["chats"]) for n in row["sources"]}
    for row in load_prepared(tmp_path / "out"):
        trained = sum(label != -100 for label in row["labels"])
        assert trained == len(row["labels"]) - len(row["seq_lengths"]) if row["sources"][0] == "texts" else trained
    assert made.sources["chat"].trained < made.sources["chat"].masked


def test_a_wrong_record_in_the_middle_is_named_or_counted(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["good", "fine", "well"])
    lines = Path(path).read_text().splitlines(True)
    lines[1:1] = ['{"text": 3}\n', '{"text": "half \\ud800"}\n', '{"body": "x"}\n', "{\n"]
    Path(path).write_text("".join(lines))
    strict = CorpusConfig(**SMALL)
    with pytest.raises(FileFormatError, match="a.jsonl, line 5: not valid JSON"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", strict)
    Path(path).write_text("".join(lines[:-3] + lines[-2:]))
    with pytest.raises(FormatError, match="source 'a', row 1: text is int; expected a string .*a.jsonl, line 2"):
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", strict)
    Path(path).write_text("".join(lines))
    made = prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", CorpusConfig(on_error="skip", **SMALL))
    assert made.broken == 1 and "line 5: not valid JSON" in made.broken_named[0]
    account = made.sources["a"]
    assert account.dropped_rows == {"FormatError, skipped": 3} and account.rows_out == 3
    assert account.dropped_examples == {"FormatError, skipped": [1, 2, 3]}
    check_balance(made)
    with pytest.raises(FileFormatError, match="a.jsonl, line 5: not valid JSON"):  # not content with what was skipped
        prepare_corpus({"a": path}, TOKENIZER, tmp_path / "out", strict)


@pytest.mark.parametrize("eval_share", [0, 0.5])
def test_a_lone_surrogate_is_named(tmp_path, eval_share):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud800"}\n')
    config = CorpusConfig(eval_share=eval_share, **SMALL)
    with pytest.raises(FormatError, match="row 1: half of a surrogate pair"):
        prepare_corpus({"a": str(tmp_path / "a.jsonl")}, TOKENIZER, tmp_path / "out", config)
