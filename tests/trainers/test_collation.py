"""Rows that were packed before need no collator: the trainer takes the one that keeps their documents apart."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import MambaConfig, MambaForCausalLM

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, FormatError, PackingLeakError
from hf_objectives.labels import encode_row
from hf_objectives.preparation import prepare_dataset
from hf_objectives.trainers import PerplexityTrainer
from hf_objectives.trainers.collation import collator_for
from tests.support.language_models import TOKENIZER, arguments, chats, llama, nats_of

WIDTH = 250


def packed(rows=None) -> Dataset:
    return prepare_dataset(chats() if rows is None else rows, TOKENIZER, max_length=WIDTH, packing=True)


def without_collator(folder, *, model=None, train=None, tests=None, **options) -> PerplexityTrainer:
    return PerplexityTrainer(
        model or llama(),
        arguments(folder, **options),
        train_dataset=train,
        eval_dataset=tests,
        processing_class=TOKENIZER,
    )


def loss_of_documents(rows) -> tuple[float, int]:
    """Nats per trained token of chats, one at a time, and the number of these tokens."""
    model, nats = llama(), []
    for row in rows:
        encoded = encode_row(TOKENIZER, row)
        own = nats_of(model, encoded["input_ids"])
        nats += [own[i - 1] for i in range(1, len(own) + 1) if encoded["labels"][i] != -100]
    return sum(nats) / len(nats), len(nats)


def positions(rows: Dataset) -> Dataset:
    """Packed rows as other libraries write them: places in place of lengths."""
    places = [[i for length in lengths for i in range(length)] for lengths in rows["seq_lengths"]]
    told = [name for name in ("seq_lengths", "position_ids") if name in rows.column_names]
    return rows.remove_columns(told).add_column("position_ids", places)


@pytest.mark.parametrize("kind", ["lengths", "positions", "list", "selected"])
def test_packed_rows_have_the_loss_of_their_documents(tmp_path, kind, monkeypatch):
    rows = packed()
    assert max(map(len, rows["seq_lengths"])) > 1
    rows = {
        "lengths": rows,
        "positions": positions(rows),
        "list": rows.to_list(),
        "selected": rows.select(range(len(rows))),
    }[kind]
    probed = []
    monkeypatch.setattr(
        "hf_objectives.trainers.isolation.probe_isolation", lambda model, **_: probed.append(model) or Report()
    )
    metrics = without_collator(tmp_path, tests=rows).evaluate()
    expected, tokens = loss_of_documents(chats())
    assert metrics["eval_num_tokens"] == tokens
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert len(probed) == 1


class Report:
    attention, change = "sdpa", 0.0


@pytest.mark.slow
def test_packed_rows_are_trained_with_the_loss_of_their_documents(tmp_path):
    rows = packed(chats(6))
    run = without_collator(tmp_path, train=rows, per_device_train_batch_size=len(rows), max_steps=1, learning_rate=0.0)
    run.train()
    expected, tokens = loss_of_documents(chats(6))
    log = run.state.log_history[0]
    assert log["num_supervised_tokens"] == tokens
    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert log["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)


@pytest.mark.slow
def test_each_dataset_has_its_own_collator(tmp_path):
    """Chats longer than a packed row are not cut by the collator of the training rows, and the other way round."""
    expected, tokens = loss_of_documents(chats())
    short = prepare_dataset(chats(3), TOKENIZER, max_length=40, packing=True)
    run = without_collator(tmp_path, train=short, tests={"raw": chats(), "packed": packed()})
    assert isinstance(run.data_collator, DataCollatorWithEosPacking)
    metrics = run.evaluate()
    assert metrics["eval_raw_num_tokens"] == metrics["eval_packed_num_tokens"] == tokens
    assert metrics["eval_raw_loss"] == pytest.approx(expected, rel=1e-6)
    other = without_collator(tmp_path, train=chats(), tests=packed())
    assert isinstance(other.data_collator, DataCollatorForAssistantOnlyLM)
    assert other.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    other.data_collator = DataCollatorForAssistantOnlyLM(TOKENIZER)
    with pytest.raises(FormatError, match="DataCollatorWithEosPacking"):
        other.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("act", ["train", "evaluate"])
def test_a_model_that_leaks_is_refused(tmp_path, act):
    model = MambaForCausalLM(MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(PackingLeakError, match="see each other"):
        getattr(without_collator(tmp_path, model=model, train=packed(), tests=packed()), act)()
    # Also where only the rows of the evaluation are packed.
    run = without_collator(tmp_path, model=model, train=chats(), tests=packed())
    run.train()
    with pytest.raises(PackingLeakError, match="see each other"):
        run.evaluate()


def test_rows_of_one_document_among_packed_ones_are_not_cut():
    loose = prepare_dataset(chats()[18:20], TOKENIZER, max_length=None, packing=False)
    loose = loose.select_columns(["input_ids", "labels"])
    rows = concatenate_datasets([packed(chats(2)), loose])
    batch = collator_for(rows, TOKENIZER)(list(rows))
    trained = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert int((batch["labels"] != -100).sum()) == trained


@pytest.mark.parametrize(
    "rows",
    [None, [], chats(2), [{"input_ids": [1, 2], "labels": [-100, 2]}], Dataset.from_list(chats(2)), iter([])],
)
def test_other_rows_are_padded(rows):
    assert isinstance(collator_for(rows, TOKENIZER), DataCollatorForAssistantOnlyLM)


class Seen(PerplexityTrainer):
    """Keeps the batches of training."""

    batches: list

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.batches.append(dict(inputs))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.slow
def test_batches_of_a_stream_reach_the_model_as_they_were_collated(tmp_path):
    """Accelerate cuts the tensors of a stream's batch to its number of rows, the bounds of documents too."""
    args = arguments(tmp_path, per_device_train_batch_size=6, max_steps=2)
    collator = DataCollatorWithEosPacking(TOKENIZER, max_length=200)
    run = Seen(llama(), args, collator, train_dataset=IterableDataset.from_generator(chats))
    run.batches = []
    run.train()
    assert len(run.batches) == 2
    for batch in run.batches:
        rows, width = batch["input_ids"].shape
        assert len(batch["cu_seq_lens_q"]) > rows and batch["cu_seq_lens_q"][-1] == rows * width
        assert batch["seq_idx"].shape == (rows, width)


def test_batches_that_one_process_hands_out_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="dispatch_batches"):
        without_collator(tmp_path, train=chats(), accelerator_config={"dispatch_batches": True})


def test_settings_of_workers_reach_the_loader_of_an_evaluation(tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_in_order": False}
    run = without_collator(tmp_path, tests=chats(), dataloader_multiprocessing_context="spawn", **options)
    loader = run.get_eval_dataloader()
    assert (loader.prefetch_factor, loader.in_order) == (3, False)
    assert loader.multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.slow
def test_an_evaluation_counts_the_rows_that_training_drops(tmp_path):
    options = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}
    assert (
        without_collator(tmp_path, tests=chats(), **options).evaluate()["eval_num_tokens"]
        == loss_of_documents(chats())[1]
    )
