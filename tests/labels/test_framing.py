"""Frames around documents: each has its own BOS and EOS, and one that ends with EOS gets no second one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.errors import TokenizerError
from hf_objectives.labels.framing import Frame, document_frame, frame_documents
from tests.support.chat_corpus import byte_tokenizer, with_bos

EOS = 9


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.lists(st.integers(1, 4) | st.just(EOS), max_size=4), st.booleans()), max_size=12),
    st.sampled_from([[], [7], [7, 8]]),
)
def test_documents_lie_between_what_is_theirs(documents, before):
    ids = np.array([i for document, _ in documents for i in document], np.int32)
    offsets = np.cumsum([0, *(len(document) for document, _ in documents)])
    made = frame_documents(ids, offsets, Frame(before, EOS), np.array([framed for _, framed in documents], bool))
    expected = [
        [*before, *document, *[EOS] * (document[-1:] != [EOS])] if framed else document
        for document, framed in documents
    ]
    assert [made.ids[a:b].tolist() for a, b in itertools.pairwise(made.offsets)] == expected
    assert made.ids[made.own].tolist() == ids.tolist()
    assert made.closed.tolist() == [framed and document[-1:] != [EOS] for document, framed in documents]


def test_the_frame_of_a_tokenizer():
    tokenizer = byte_tokenizer()
    assert document_frame(tokenizer) == Frame([], tokenizer.eos_token_id)
    tokenizer = with_bos(byte_tokenizer())
    assert document_frame(tokenizer) == Frame([tokenizer.bos_token_id], tokenizer.eos_token_id)
    tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="no EOS token"):
        document_frame(tokenizer)
