"""A tokenizer with tokens that a model has no embedding for is refused before anything is computed."""

from __future__ import annotations

import pytest
import torch

from hf_objectives.errors import TokenizerError
from hf_objectives.evaluation.perplexity import compute_perplexity
from hf_objectives.evaluation.vocabulary import check_vocabulary
from tests.support.chat_corpus import byte_tokenizer
from tests.support.language_models import TOKENIZER, llama


class Embedded:
    """A model of which only the number of embeddings is known."""

    def __init__(self, number):
        self.number = number

    def get_input_embeddings(self):
        return torch.nn.Embedding(self.number, 1)


def test_tokens_without_an_embedding():
    own = byte_tokenizer(special=["<|im_start|>", "<|image|>"])
    check_vocabulary(own, Embedded(len(own)))
    check_vocabulary(own, Embedded(len(own) - 1))  # <|image|>, which no text asks for
    with pytest.raises(TokenizerError, match=r"'<\|im_start\|>' is \d+; expected the model's own tokenizer"):
        check_vocabulary(own, Embedded(len(own) - 2))  # the template prints it
    own.add_tokens(["word"])
    with pytest.raises(TokenizerError, match=f"'word' is {len(own) - 1}; expected the model's own tokenizer"):
        check_vocabulary(own, Embedded(len(own) - 1))
    padded = byte_tokenizer(special=["<|im_start|>", "<|pad|>"], pad_token="<|pad|>")
    with pytest.raises(TokenizerError, match=r"'<\|pad\|>' is"):
        check_vocabulary(padded, Embedded(padded.pad_token_id))
    check_vocabulary(None, Embedded(3))
    check_vocabulary(own, torch.nn.Linear(1, 1))  # a model of one's own


def test_a_perplexity_is_not_begun():
    small = llama()
    small.resize_token_embeddings(100)
    with pytest.raises(TokenizerError, match="resize_token_embeddings"):
        compute_perplexity(small, TOKENIZER, ["a text"])
