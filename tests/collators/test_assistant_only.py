"""Padded batches, by hand."""

from __future__ import annotations

import pytest
import torch

from hf_objectives.collators.assistant_only import DataCollatorForAssistantOnlyLM
from hf_objectives.errors import NothingSupervisedError
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import PLAIN, byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
IGNORE = -100


def test_padded_by_hand():
    TOKENIZER.padding_side = "left"  # collators pad on the right all the same
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER)(
        [{"input_ids": [1, 2, EOS], "labels": [IGNORE, 2, EOS]}, {"input_ids": [3, 4], "labels": [IGNORE, 4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, EOS], [3, 4, EOS]]
    assert batch["labels"].tolist() == [[IGNORE, 2, EOS], [IGNORE, 4, IGNORE]]  # the real EOS stays, the pad is none
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_raw_rows_are_encoded():
    rows = [{"messages": PLAIN}, {"messages": PLAIN[:2], "source": "x"}]
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER, pad_to_multiple_of=16)(rows)
    assert batch["input_ids"].shape[1] % 16 == 0
    for i, row in enumerate(rows):
        encoded = encode_row(TOKENIZER, row)
        n = len(encoded["input_ids"])
        assert batch["input_ids"][i, :n].tolist() == encoded["input_ids"]
        assert batch["labels"][i, :n].tolist() == encoded["labels"]
        assert set(batch["labels"][i, n:].tolist()) <= {IGNORE}


def test_a_batch_that_trains_nothing_is_an_error():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, IGNORE, IGNORE]}]  # nothing predicts a first token
    with pytest.raises(NothingSupervisedError, match="no token is trained in a batch of 1 rows"):
        DataCollatorForAssistantOnlyLM(TOKENIZER)(rows)
    assert DataCollatorForAssistantOnlyLM(TOKENIZER, allow_empty=True)(rows)["labels"].tolist() == [[IGNORE] * 3]
