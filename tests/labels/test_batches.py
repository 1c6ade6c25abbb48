"""Batches of rows to tables: the fast way for texts gives what the careful way gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives import demo
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.labels.batches import BatchEncoder
from hf_objectives.labels.config import EncodingConfig
from hf_objectives.labels.ledger import Ledger
from hf_objectives.labels.rows import RowEncoder, encode_row
from tests.support.chat_corpus import PLAIN, byte_tokenizer, with_bos

TOKENIZERS = {"demo": demo.build_tokenizer(), "bytes": byte_tokenizer(), "bos": with_bos(byte_tokenizer())}
CHATS = [{"messages": PLAIN, "source": "odd"}, {"messages": PLAIN[:2]}, {"messages": PLAIN[2:], "source": "odd"}]
SETTINGS = EncodingConfig(max_length=16, splits_documents=True)
PIECES = st.sampled_from(["a", "é", " ", "\n", "<|im_end|>", "<|im_start|>", "🏳️‍🌈", "word ", "\x00", ""])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(st.lists(PIECES, max_size=12).map("".join), min_size=1, max_size=8),
    st.sampled_from(["plain", "allow"]),
)
def test_texts_are_encoded_as_one_by_one(name, texts, control_tokens):
    tokenizer = TOKENIZERS[name]
    options = EncodingConfig(max_length=16, splits_documents=True, control_tokens=control_tokens)
    rows = [{"text": text, **({"source": "odd"} if i % 3 == 1 else {})} for i, text in enumerate(texts)]
    table, ledger = BatchEncoder(tokenizer, options).encode(rows, source="s", numbers=range(5, 5 + len(rows)))
    kept = [i for i, text in enumerate(texts) if text.strip()]
    assert table["row"].to_pylist() == [5 + i for i in kept]
    assert table["source"].to_pylist() == [rows[i].get("source", "s") for i in kept]
    assert table["input_ids"].to_pylist() == [
        encode_row(tokenizer, rows[i], control_tokens=control_tokens)["input_ids"] for i in kept
    ]
    careful = Ledger()
    RowEncoder(tokenizer, options).encode(rows, source="s", numbers=range(5, 5 + len(rows)), ledger=careful)
    assert ledger.to_dict() == careful.to_dict() and ledger.total().balance() == 0


def test_rows_of_other_formats_keep_their_labels():
    table, _ = BatchEncoder(TOKENIZERS["demo"], EncodingConfig(max_length=512, splits_documents=True)).encode(
        CHATS, source="s", numbers=range(len(CHATS))
    )
    assert "labels" in table.column_names
    for row, made in zip(CHATS, table.to_pylist(), strict=True):
        assert {"input_ids": made["input_ids"], "labels": made["labels"]} == encode_row(TOKENIZERS["demo"], row)


def test_a_text_beside_another_format_is_not_taken_for_a_text():
    rows = [{"text": "a"}, {"text": "b", "messages": CHATS[0]["messages"]}]
    with pytest.raises(FormatError, match="row 1: a row in messages format among rows in text format"):
        BatchEncoder(TOKENIZERS["demo"], SETTINGS).encode(rows, source="s", numbers=range(2))


def test_what_cannot_be_used_is_skipped_and_booked():
    rows = [{"text": "a"}, {"text": None}, {"text": 7}, {"text": "half \ud800"}, {"text": "b"}, {}]
    encoder = BatchEncoder(TOKENIZERS["demo"], SETTINGS, on_error="skip")
    table, ledger = encoder.encode(rows, source="s", numbers=range(6))
    assert table["row"].to_pylist() == [0, 4]
    assert ledger["s"].dropped_rows == {"FormatError, skipped": 4}
    assert ledger["s"].dropped_examples == {"FormatError, skipped": [1, 2, 3, 5]}
    with pytest.raises(ConfigError, match="on_error is 'ignore'"):
        BatchEncoder(TOKENIZERS["demo"], SETTINGS, on_error="ignore")
