"""What both collators of language modelling do: extra columns, workers, a plain Trainer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_objectives.collators.assistant_only import DataCollatorForAssistantOnlyLM
from hf_objectives.collators.packing import DataCollatorWithEosPacking
from hf_objectives.collators.preference import DataCollatorForPreferencePairs
from hf_objectives.errors import FormatError, TokenizerError
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import PLAIN, byte_tokenizer
from tests.support.language_models import llama as tiny_llama

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
IGNORE = -100


def test_sources_and_weights_ride_along():
    rows = [
        {"input_ids": [1, 2], "source": "a", "loss_weights": [1.0, 0.5]},
        {"input_ids": [3, 4, 5], "labels": [IGNORE, 4, 5], "source": "b"},
    ]
    padded = DataCollatorForAssistantOnlyLM(TOKENIZER, return_source=True)(rows)
    assert padded["source_names"] == ["a", "b"] and padded["source_ids"].tolist() == [[0, 0, -1], [1, 1, 1]]
    assert padded["loss_weights"].tolist() == [[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]]
    packed = DataCollatorWithEosPacking(TOKENIZER, max_length=8, return_source=True)(rows)
    assert packed["source_names"] == ["a", "b"] and packed["source_ids"].tolist() == [[0] * 3 + [1] * 4]
    assert packed["loss_weights"].tolist() == [[1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]]
    assert "source_ids" not in DataCollatorForAssistantOnlyLM(TOKENIZER)(rows)


def test_pickles_and_works_in_loader_workers():
    collate = pickle.loads(pickle.dumps(DataCollatorWithEosPacking(TOKENIZER, max_length=96)))
    rows = [{"messages": PLAIN[:2]} for _ in range(8)]
    batches = list(DataLoader(rows, batch_size=4, collate_fn=collate, num_workers=2))
    expected = list(DataLoader(rows, batch_size=4, collate_fn=collate))
    assert [b["input_ids"].tolist() for b in batches] == [b["input_ids"].tolist() for b in expected]


@pytest.mark.long
@pytest.mark.slow
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
        trainer = Trainer(tiny_llama(), arguments, train_dataset=rows, data_collator=collate)
        assert np.isfinite(trainer.train().training_loss)


def test_tokenizer_without_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match="no EOS token to join"):
        DataCollatorWithEosPacking(tokenizer, max_length=8)
    with pytest.raises(TokenizerError, match="neither a pad nor an EOS"):
        DataCollatorForAssistantOnlyLM(tokenizer)([{"input_ids": [1, 2], "labels": [IGNORE, 2]}])


def test_formats_may_be_mixed_in_a_batch_and_weights_must_fit():
    rows = [{"text": "ab"}, {"messages": PLAIN[:2]}, {"input_ids": [1, 2], "labels": [IGNORE, 2]}]
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER)(rows)
    for i, row in enumerate(rows):
        ids = encode_row(TOKENIZER, row)["input_ids"]
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == ids
    with pytest.raises(FormatError, match="1 loss_weights for 2 tokens"):
        DataCollatorForAssistantOnlyLM(TOKENIZER)([{"input_ids": [1, 2], "loss_weights": [1.0]}])


def test_what_changes_between_two_batches_is_used():
    tokenizer, row = byte_tokenizer(), {"messages": PLAIN[:2]}
    collate = DataCollatorForAssistantOnlyLM(tokenizer)
    first = collate([row])["input_ids"]
    collate.max_length = 8
    assert collate([{"input_ids": list(range(9)), "labels": [IGNORE, *range(1, 9)]}])["input_ids"].shape == (1, 8)
    collate.max_length = None
    tokenizer.chat_template = "BEGIN" + tokenizer.chat_template
    assert tokenizer.decode(collate([row])["input_ids"][0]) == "BEGIN" + tokenizer.decode(first[0])


@pytest.mark.parametrize(
    "kind", [DataCollatorForAssistantOnlyLM, DataCollatorForPreferencePairs, DataCollatorWithEosPacking]
)
def test_max_length_may_follow_the_tokenizer_without_its_name(kind):
    assert kind(TOKENIZER, 8) == kind(tokenizer=TOKENIZER, max_length=8)
    with pytest.raises(TypeError, match="positional arguments"):
        kind(TOKENIZER, 8, "all")


@pytest.mark.parametrize("labels", [{}, {"labels": [1, 2, 3]}, {"labels": np.array([1, 2, 3])}])
@pytest.mark.parametrize("packed", [{}, {"seq_lengths": [1, 2]}])
def test_ids_that_a_host_made_are_not_trained_whole(labels, packed):
    """SFTTrainer tokenises conversations before the collator sees them, and leaves labels that are the ids."""
    row = {"input_ids": [1, 2, 3], **labels, **packed}
    for kind in (DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking):
        with pytest.raises(
            FormatError, match=r"row 0: a row of 3 ids has .*train_on is 'assistant'.*skip_prepare_dataset"
        ):
            kind(TOKENIZER, max_length=8)([row])
    trained = DataCollatorWithEosPacking(TOKENIZER, max_length=8, train_on="all")([row])["labels"]
    assert (trained != IGNORE).sum() == (
        1 if packed else 3
    )  # first tokens are no targets; a loose document gets an EOS
    masked = {**row, "labels": [IGNORE, IGNORE, 3]}
    assert DataCollatorWithEosPacking(TOKENIZER, max_length=8)([masked])["labels"][0, 2] == 3


PACKED = {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE, 2, IGNORE, 4, 5]}


@pytest.mark.parametrize("columns", [{"seq_lengths": [2, 3]}, {"position_ids": [0, 1, 0, 1, 2]},
                                     {"seq_lengths": [2, 3], "position_ids": [0, 1, 0, 1, 2]}])  # fmt: skip
def test_documents_of_a_packed_row_are_known_from_either_column(columns):
    row = {**PACKED, **columns}
    batch = DataCollatorWithEosPacking(TOKENIZER, max_length=8)([row])
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]] and batch["cu_seq_lens_q"].tolist() == [0, 2, 5]
    with pytest.raises(FormatError, match="row 0: the row holds 2 documents, which would see each other"):
        DataCollatorForAssistantOnlyLM(TOKENIZER)([row])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"seq_lengths": [2, 2]}, "seq_lengths add up to 4, the row has 5 tokens"),
        ({"seq_lengths": [3, 4]}, "seq_lengths add up to 7"),
        ({"position_ids": [0, 1, 0, 1]}, "4 position_ids for 5 tokens"),
        ({"position_ids": [1, 2, 0, 1, 2]}, "count up from 0"),
        ({"position_ids": [0, 1, 0, 2, 3]}, "count up from 0"),
        ({"position_ids": [1, 2, 3, 4, 5]}, "count up from 0"),
        ({"seq_lengths": [2, 3], "position_ids": [0, 1, 2, 0, 1]}, "seq_lengths say 2 documents"),
    ],
)
def test_columns_that_do_not_cover_a_packed_row_are_refused(columns, words):
    with pytest.raises(FormatError, match=words):
        DataCollatorWithEosPacking(TOKENIZER, max_length=8)([{**PACKED, **columns}])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1.5, 2]}, "input_ids has a value that is no token id"),
        ({"input_ids": [1, -3]}, "input_ids has a value that is no token id"),
        ({"input_ids": ["1", "2"]}, "input_ids has a value that is no token id"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels has a value that is no token id"),
        ({"input_ids": [1, 2], "labels": [1, float("nan")]}, "labels has a value that is no token id"),
        ({"input_ids": [1, 2], "loss_weights": [1.0, -1.0]}, "loss_weights has a value below 0 or not finite"),
        ({"input_ids": [1, 2], "loss_weights": [1.0, float("inf")]}, "loss_weights has a value below 0 or not finite"),
    ],
)
def test_values_that_cannot_be_meant(row, words):
    with pytest.raises(FormatError, match=f"row 1: {words}"):
        DataCollatorForAssistantOnlyLM(TOKENIZER, train_on="all")([{"input_ids": [1, 2]}, row])


def test_whole_numbers_as_floats_are_ids():
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER)([{"input_ids": [4.0, 5.0], "labels": [-100.0, 5.0]}])
    assert batch["input_ids"].tolist() == [[4, 5]] and batch["labels"].tolist() == [[-100, 5]]
