"""Bytes per token id, against decoding."""

from __future__ import annotations

import numpy as np

from hf_objectives.labels.byte_lengths import token_byte_lengths
from tests.labels.test_tokenization import TEXTS, metaspace, trained_bpe
from tests.support.chat_corpus import byte_tokenizer


def test_byte_level():
    tokenizer = trained_bpe()
    lengths = token_byte_lengths(tokenizer)
    for text in ("hello there", "naïve 日本語 👩‍👩‍👧‍👦", "  \n\t"):
        assert lengths[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_special_tokens_stand_for_no_text_or_for_their_name():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    special, added = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    assert token_byte_lengths(tokenizer)[[special, added]].tolist() == [0, 7]
    assert token_byte_lengths(tokenizer, special="text")[[special, added]].tolist() == [10, 7]


def test_metaspace_and_single_bytes():
    tokenizer = metaspace()
    lengths = token_byte_lengths(tokenizer, special="text")
    ids = tokenizer("hello there")["input_ids"]
    assert lengths[ids].sum() == len(" hello there")  # metaspace puts a space before the first word
    space = tokenizer.convert_tokens_to_ids("▁")
    assert lengths[space] == 1


def test_every_id_has_a_length():
    for tokenizer in (byte_tokenizer(), trained_bpe(), metaspace()):
        lengths = token_byte_lengths(tokenizer, special="text")
        assert lengths.shape == (len(tokenizer),) and lengths.dtype == np.int64 and (lengths > 0).all()
    assert TEXTS
