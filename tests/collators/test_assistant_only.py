"""Padded and packed batches, by hand; packed documents lose exactly what they lose alone."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, FormatError, NothingSupervisedError, TokenizerError
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import PLAIN, byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
IGNORE = -100


def llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,  # room for a few more control tokens
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


def token_losses(logits, labels):
    """Per-token losses [B, L - 1], 0 where nothing is trained."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.view(labels.shape[0], -1)


def test_padded_by_hand():
    TOKENIZER.padding_side = "left"  # collators pad on the right all the same
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER)(
        [{"input_ids": [1, 2, EOS], "labels": [1, 2, EOS]}, {"input_ids": [3, 4], "labels": [IGNORE, 4]}]
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


def pack(rows, **options):
    batch = DataCollatorWithEosPacking(TOKENIZER, **{"max_length": 8, **options})(rows)
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
    chats = pack([{"messages": PLAIN[:2]}, {"messages": PLAIN[2:]}], max_length=96)
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


def test_overflowing_conversation_is_cut_before_its_turn():
    batch = pack([{"messages": PLAIN}], max_length=60)
    trained = [label for label in batch["labels"][0] if label != IGNORE]
    assert TOKENIZER.decode(trained) == "It is four.<|im_end|>"


def test_sources_and_weights_ride_along():
    rows = [
        {"input_ids": [1, 2], "source": "a", "loss_weights": [1.0, 0.5]},
        {"input_ids": [3, 4, 5], "source": "b"},
    ]
    padded = DataCollatorForAssistantOnlyLM(TOKENIZER, return_source=True)(rows)
    assert padded["source_names"] == ["a", "b"] and padded["source_ids"].tolist() == [[0, 0, -1], [1, 1, 1]]
    assert padded["loss_weights"].tolist() == [[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]]
    packed = DataCollatorWithEosPacking(TOKENIZER, max_length=8, return_source=True)(rows)
    assert packed["source_names"] == ["a", "b"] and packed["source_ids"].tolist() == [[0] * 3 + [1] * 4]
    assert packed["loss_weights"].tolist() == [[1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]]
    assert "source_ids" not in DataCollatorForAssistantOnlyLM(TOKENIZER)(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows_per_batch", [1, 3])
def test_packed_losses_are_those_of_each_document_alone(attention, rows_per_batch):
    model = llama(attention)
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 256, n).tolist() for n in (9, 14, 3, 20, 1, 7, 11)]
    alone = torch.cat(
        [
            token_losses(model(torch.tensor([[*d, EOS]]), use_cache=False).logits, torch.tensor([[*d, EOS]]))[0]
            for d in documents
        ]
    )
    collate = DataCollatorWithEosPacking(TOKENIZER, max_length=80 // rows_per_batch + 4)
    batch = collate([{"input_ids": document} for document in documents])
    assert batch["input_ids"].shape[0] == rows_per_batch
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    losses = token_losses(logits, batch["labels"])[batch["labels"][:, 1:] != IGNORE]
    assert sorted(losses.tolist()) == pytest.approx(sorted(alone.tolist()), abs=1e-4)


def test_pickles_and_works_in_loader_workers():
    collate = pickle.loads(pickle.dumps(DataCollatorWithEosPacking(TOKENIZER, max_length=96)))
    rows = [{"messages": PLAIN[:2]} for _ in range(8)]
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collate, num_workers=2))
    expected = list(DataLoader(rows, batch_size=4, collate_fn=collate))
    assert [b["input_ids"].tolist() for b in batches] == [b["input_ids"].tolist() for b in expected]


def test_plain_trainer(tmp_path):
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
    )
    for collate in (DataCollatorForAssistantOnlyLM(TOKENIZER), DataCollatorWithEosPacking(TOKENIZER, max_length=128)):
        rows = Dataset.from_list([{"messages": PLAIN}] * 4)
        trainer = Trainer(llama(), arguments, train_dataset=rows, data_collator=collate)
        assert np.isfinite(trainer.train().training_loss)


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
        llama(),
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


def test_tokenizer_without_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match="no EOS token to join"):
        DataCollatorWithEosPacking(tokenizer, max_length=8)
    with pytest.raises(TokenizerError, match="neither a pad nor an EOS"):
        DataCollatorForAssistantOnlyLM(tokenizer)([{"input_ids": [1, 2]}])
