"""Packed batches, by hand; packed documents lose exactly what they lose alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_objectives.collators.packing import DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import PLAIN, byte_tokenizer
from tests.support.language_models import llama as tiny_llama

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
IGNORE = -100


def pack(rows, **options):
    batch = DataCollatorWithEosPacking(TOKENIZER, **{"max_length": 8, "train_on": "all", **options})(rows)
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


DOCUMENTS = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, EOS]}, {"input_ids": [6]}]


def test_packed_by_hand():
    batch = pack(DOCUMENTS, max_length=7)
    # 1 2 3 EOS and 4 5 EOS fill a row of seven; 6 EOS is left, padded with five.
    assert batch["input_ids"] == [[1, 2, 3, EOS, 4, 5, EOS], [6, EOS, EOS, EOS, EOS, EOS, EOS]]
    assert batch["labels"] == [[IGNORE, 2, 3, EOS, IGNORE, 5, EOS], [IGNORE, EOS, *[IGNORE] * 5]]
    assert batch["position_ids"] == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["cu_seq_lens_q"] == batch["cu_seq_lens_k"] == [0, 4, 7, 9, 14]
    assert batch["max_length_q"] == batch["max_length_k"] == 5
    assert batch["seq_idx"] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert "attention_mask" not in batch


def test_concat_by_hand():
    batch = pack(DOCUMENTS, max_length=5, strategy="concat", isolate_documents=False)
    assert batch["input_ids"] == [[1, 2, 3, EOS, 4], [5, EOS, 6, EOS, EOS]]
    assert batch["labels"] == [[IGNORE, 2, 3, EOS, IGNORE], [IGNORE, EOS, IGNORE, EOS, IGNORE]]
    assert batch["attention_mask"] == [[1] * 5, [1, 1, 1, 1, 0]]
    assert "position_ids" not in batch


def test_one_eos_between_documents():
    texts = [{"text": "ab"}, {"text": "cd"}]
    batch = pack(texts)
    assert TOKENIZER.decode(batch["input_ids"][0]) == "ab<|im_end|>cd<|im_end|>"
    assert batch["cu_seq_lens_q"] == [0, 3, 6]
    chats = pack([{"messages": PLAIN[:2]}, {"messages": PLAIN[2:]}], max_length=96, train_on="assistant")
    closed = "It is four.<|im_end|>\n<|im_start|>user\nAnd"
    assert closed in TOKENIZER.decode(chats["input_ids"][0])
    untrained = pack([{"input_ids": [1, 2, 3], "labels": [IGNORE, 2, IGNORE]}])
    assert untrained["input_ids"] == [[1, 2, 3, EOS]] and untrained["labels"] == [[IGNORE, 2, IGNORE, IGNORE]]


def test_rows_packed_before_are_taken_as_they_are():
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [2, 3]}]
    batch = pack(rows)
    assert batch["input_ids"] == [[1, 2, 3, 4, 5]] and batch["labels"] == [[IGNORE, 2, IGNORE, 4, 5]]
    assert batch["position_ids"] == [[0, 1, 0, 1, 2]]
    with pytest.raises(FormatError, match="row 0: seq_lengths add up to 4, the row has 5 tokens"):
        pack([{**rows[0], "seq_lengths": [2, 2]}])


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit"])
def test_overflowing_conversation_is_cut_before_its_turn(strategy):
    batch = pack([{"messages": PLAIN}], max_length=60, strategy=strategy, train_on="assistant")
    trained = [label for label in batch["labels"][0] if label != IGNORE]
    assert TOKENIZER.decode(trained) == "It is four.<|im_end|>"


def token_losses(logits, labels):
    """Per-token losses [B, L - 1], 0 where nothing is trained."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.view(labels.shape[0], -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_packed_losses_are_those_of_each_document_alone(attention, rows_per_batch):
    model = tiny_llama(attention)
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 256, n).tolist() for n in (9, 14, 3, 20, 1, 7, 11)]
    alone = torch.cat(
        [
            token_losses(model(torch.tensor([[*d, EOS]]), use_cache=False).logits, torch.tensor([[*d, EOS]]))[0]
            for d in documents
        ]
    )
    collate = DataCollatorWithEosPacking(TOKENIZER, max_length=80 // rows_per_batch + 4, train_on="all")
    batch = collate([{"input_ids": document} for document in documents])
    assert batch["input_ids"].shape[0] == rows_per_batch
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    losses = token_losses(logits, batch["labels"])[batch["labels"][:, 1:] != IGNORE]
    assert sorted(losses.tolist()) == pytest.approx(sorted(alone.tolist()), abs=1e-4)


@pytest.mark.slow
def test_trl_sft_trainer(tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([encode_row(TOKENIZER, {"messages": PLAIN})] * 4)
    arguments = SFTConfig(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        tiny_llama(),
        arguments,
        train_dataset=rows,
        processing_class=TOKENIZER,
        data_collator=DataCollatorWithEosPacking(TOKENIZER, max_length=128),
    )
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": None}, "packing needs max_length"),
        ({"max_length": 1}, "max_length is 1"),
        ({"strategy": "bestfit"}, "did you mean 'best_fit'"),
        ({"overflow": "trunc"}, "did you mean 'truncate'"),
        ({"train_on": "assistants"}, "did you mean 'assistant'"),
        ({"pad_to_multiple_of": 0}, "expected at least 1"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        DataCollatorWithEosPacking(TOKENIZER, **{"max_length": 8, **options})
