"""One row to ids and labels: documents, completions and ids."""

from __future__ import annotations

import pytest

from hf_objectives.errors import FormatError
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import byte_tokenizer, trained_text, with_bos

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def test_documents_end_with_one_trained_eos():
    row = encode_row(TOKENIZER, {"text": "abc"})
    assert row["input_ids"] == [*TOKENIZER.encode("abc"), EOS]
    assert row["labels"] == row["input_ids"]
    ended = encode_row(TOKENIZER, {"text": "abc<|im_end|>"}, control_tokens="allow")
    assert ended["input_ids"] == row["input_ids"]
    plain = encode_row(TOKENIZER, {"text": "abc<|im_end|>"})
    assert plain["input_ids"].count(EOS) == 1 and TOKENIZER.decode(plain["input_ids"]) == "abc<|im_end|><|im_end|>"


def test_what_the_tokenizer_puts_before_a_text_is_not_trained():
    tokenizer = with_bos(byte_tokenizer())
    bos = tokenizer.bos_token_id
    row = encode_row(tokenizer, {"text": "ab"})
    assert row["input_ids"] == [bos, *tokenizer.encode("ab", add_special_tokens=False), EOS]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_completion_is_trained_and_its_prompt_is_not():
    row = encode_row(TOKENIZER, {"prompt": "1+1=", "completion": "2"})
    assert TOKENIZER.decode(row["input_ids"]) == "1+1=2<|im_end|>"
    assert trained_text(TOKENIZER, row) == "2<|im_end|>"
    cut = encode_row(TOKENIZER, {"prompt": "1+1=", "completion": "222"}, max_length=7)
    assert set(cut["labels"]) == {-100}  # its EOS fell to the cut


def test_tokens_pass_as_they_are():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    assert encode_row(TOKENIZER, row) == row
    assert encode_row(TOKENIZER, {"input_ids": [5, 6]}) == {"input_ids": [5, 6], "labels": [5, 6]}
    with pytest.raises(FormatError, match="row 3.*one length"):
        encode_row(TOKENIZER, {"input_ids": [5, 6], "labels": [5]}, row_index=3)
