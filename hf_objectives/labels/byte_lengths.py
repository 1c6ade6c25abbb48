"""How many bytes of text each token id stands for: bits per byte, and the place of tokens in byte-level encodings."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def vocabulary_size(tokenizer: Any) -> int:
    """The highest id of a tokenizer, added tokens included, and one: ids may have gaps, which `len` does not count."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def token_byte_lengths(tokenizer: Any, *, special: Literal["zero", "text"] = "zero") -> NDArray[np.int64]:
    """Bytes of text per token id.

    Args:
        tokenizer: a fast transformers tokenizer.
        special: what special tokens count: "zero", they stand for no text (bits per byte), or "text", the bytes of
            their own name (places in a rendered conversation).

    Returns:
        int64 [vocabulary], 0 for ids that the tokenizer does not use.

    A byte-level BPE spells bytes in the GPT-2 alphabet, one character each; other vocabularies spell text, with `▁` for
    a space and `<0x0A>` for a single byte.
    """
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    backend = tokenizer.backend_tokenizer
    byte_level = "ByteLevel" in f"{backend.decoder} {backend.pre_tokenizer}"  # alone, or in a sequence
    alphabet = set(bytes_to_unicode().values())
    added = tokenizer.added_tokens_decoder
    for token, i in vocabulary.items():
        if i in added:
            lengths[i] = 0 if added[i].special and special == "zero" else len(added[i].content.encode())
        elif byte_level and alphabet.issuperset(token):
            lengths[i] = len(token)
        elif _BYTE_FALLBACK.fullmatch(token):
            lengths[i] = 1
        else:
            lengths[i] = len(token.replace("▁", " ").encode())
    return lengths
