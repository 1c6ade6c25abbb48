"""Where scores are read: padding tokens that end no text, and batches that would be misread."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.trainers.score_position import check_batch, spare_pad_token
from tests.support.chat_corpus import byte_tokenizer


def tokenizer(*special: str, **names: str):
    return byte_tokenizer(special=["<|im_start|>", *special], **names)


def test_spare_tokens():
    assert spare_pad_token(tokenizer(), 1000) is None
    assert spare_pad_token(tokenizer("<|reserved_special_token_0|>"), 1000) == "<|reserved_special_token_0|>"
    known = tokenizer("<|reserved_special_token_0|>", "<|right_pad_id|>", unk_token="<|endoftext|>")
    assert spare_pad_token(known, 1000) == "<|right_pad_id|>"
    assert spare_pad_token(tokenizer("<|reserved|>", unk_token="<|endoftext|>"), 1000) == "<|endoftext|>"
    # A token that texts may hold is none, nor one without an embedding.
    assert spare_pad_token(tokenizer("<|tool_call|>", unk_token="<|im_end|>"), 1000) is None
    assert spare_pad_token(tokenizer("<|pad|>"), len(tokenizer())) is None


def test_a_token_of_the_template_does_not_pad():
    own = tokenizer("<|pad|>")
    own.chat_template += "{{ '<|pad|>' }}"
    assert spare_pad_token(own, 1000) is None


def held(ids, mask=None, *, rows=(4, 9), **options):
    mask = None if mask is None else torch.tensor(mask)
    check_batch(
        torch.tensor(ids), mask, **{"pad_token_id": 0, "num_embeddings": 10, "rows": rows, "token": "<pad>", **options}
    )


def test_batches():
    """Two rows, chosen answers first."""
    mask = [[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1]]
    held([[1, 0, 3], [1, 2, 0], [0, 1, 2], [4, 5, 6]], mask)
    with pytest.raises(ConfigError, match="the collator pads with id 7, and the model takes 0"):
        held([[1, 2, 3], [1, 2, 7], [0, 1, 2], [4, 5, 6]], mask)
    with pytest.raises(ConfigError, match="the rejected side of row 4 ends with '<pad>', which is the padding token"):
        held([[1, 2, 3], [1, 2, 0], [0, 1, 0], [4, 5, 6]], mask)
    held([[1, 2, 3], [1, 2, 0], [0, 1, 0], [4, 5, 6]], mask, allow_eos_padding=True)
    with pytest.raises(FormatError, match="row 9: id 10 in chosen; the model has embeddings for 0 to 9"):
        held([[1, 2, 3], [1, 10, 0], [0, 1, 2], [4, 5, 6]], mask)
    with pytest.raises(FormatError, match="id -100 in rejected"):
        held([[1, 2], [-100, 2]], rows=(0,))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_reads_as_this_module_says(kind):
    """The last id that is not `pad_token_id`, whatever the mask; a closing padding token is passed over."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "num_labels": 1, "pad_token_id": 0}
    if kind == "llama":
        config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **sizes)
        model = LlamaForSequenceClassification(config).eval()
    else:
        model = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, **sizes)).eval()
    text = [5, 6, 7, 8]

    def score(ids, mask):
        with torch.no_grad():
            return float(model(torch.tensor([ids]), attention_mask=torch.tensor([mask])).logits[0, 0])

    alone, shorter = score(text, [1] * 4), score(text[:3], [1] * 3)
    assert score([*text, 0, 0], [1, 1, 1, 1, 0, 0]) == pytest.approx(alone, abs=1e-6)
    assert score([*text, 0], [1] * 5) == pytest.approx(alone, abs=1e-6)  # an end that is not read
    assert score([*text[:3], 0], [1] * 4) == pytest.approx(shorter, abs=1e-6)
    assert abs(score([*text, 9], [1, 1, 1, 1, 0]) - alone) > 1e-4  # read on padding
    left = score([0, 0, *text], [0, 0, 1, 1, 1, 1])
    if kind == "llama":
        assert left == pytest.approx(alone, abs=1e-6)
    else:
        assert abs(left - alone) > 1e-4  # positions are counted from the first column
