"""Loaders with forked and spawned workers, loaders that cut batches, `Dataset.map`, and streams that are split twice."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_objectives import (
    DataCollatorForPreferencePairs,
    DataCollatorWithEosPacking,
    build_mixture,
    demo,
    encode_chat,
    encode_chats,
    encode_row,
)
from hf_objectives.errors import ConfigError
from hf_objectives.labels import encode_pair
from tests.support.hosts import (
    ALONE,
    EXPECTED,
    LENGTH,
    PACKING,
    PADDING,
    RAW,
    TOKENIZER,
    arguments,
    as_tensors,
    check,
    ids,
)
from tests.support.language_models import llama

# -- Dataset.map -----------------------------------------------------------------------------------------------------------


def by_chat(row, tokenizer):
    return encode_chat(tokenizer, row["messages"])


def by_row(row, tokenizer):
    return encode_row(tokenizer, row)


def by_chats(batch, tokenizer):
    return encode_chats(tokenizer, batch["messages"])


@pytest.mark.parametrize(("encode", "batched"), [(by_chat, False), (by_row, False), (by_chats, True)])
@pytest.mark.parametrize("processes", [None, 2])
def test_dataset_map(encode, batched, processes):
    options = {"batched": batched, "batch_size": 7, "remove_columns": "messages"}
    encoded = RAW.map(encode, num_proc=processes, fn_kwargs={"tokenizer": TOKENIZER}, **options)
    assert [(tuple(row["input_ids"]), row["labels"]) for row in encoded] == [*EXPECTED.items()]


@pytest.mark.parametrize("processes", [None, 2])
def test_dataset_map_of_pairs(processes):
    rows = demo.preferences(5)
    encoded = Dataset.from_list(rows).map(lambda row: encode_pair(TOKENIZER, row), num_proc=processes)
    pairs = [encode_pair(TOKENIZER, row) for row in rows]
    assert [{name: row[name] for name in pair} for row, pair in zip(encoded, pairs, strict=True)] == pairs


# -- workers ---------------------------------------------------------------------------------------------------------------


def several(context):
    """Two workers; one where it is spawned, which takes seconds: two that are spawned are in the tests of mixtures."""
    return {"num_workers": 2 if context == "fork" else 1, "multiprocessing_context": context}


@pytest.mark.slow
@pytest.mark.parametrize(("context", "collator"), [("fork", PADDING), ("fork", PACKING), ("spawn", PACKING)])
def test_a_plain_loader_with_workers(collator, context):
    check(DataLoader(RAW, 4, collate_fn=collator, **several(context)))


def mixture():
    texts = [{"text": f"text {i} {'x' * (i % 9)}"} for i in range(300)]
    made = build_mixture(
        {"sources": {"chat": {"dataset": RAW}, "text": {"dataset": Dataset.from_list(texts)}}, "max_length": LENGTH,
         "packing": "within"}, tokenizer=TOKENIZER,
    )  # fmt: skip
    made.batch_rows = 4
    return made


def taken(n):
    return ids(itertools.islice(mixture(), n))


@pytest.mark.slow
@pytest.mark.parametrize(("context", "as_dataset"), [("fork", False), ("fork", True), ("spawn", False)])
def test_a_mixture_in_a_loader_with_workers(as_dataset, context):
    data = mixture().to_iterable_dataset() if as_dataset else mixture()
    loader = DataLoader(data, 4, collate_fn=ids, **several(context))
    assert list(itertools.chain.from_iterable(itertools.islice(loader, 5))) == taken(20)


# -- batches that are handed out -------------------------------------------------------------------------------------------

WITHOUT_BOUNDS = DataCollatorWithEosPacking(TOKENIZER, max_length=LENGTH, return_flash_attn_kwargs=False)
WORKERS = pytest.mark.parametrize("workers", [None, "fork", "spawn"])


def with_workers(context):
    return {"num_workers": 1 if context else 0, "multiprocessing_context": context}


def prepared(loader, dispatch_batches):
    config = DataLoaderConfiguration(dispatch_batches=dispatch_batches)
    return Accelerator(cpu=True, dataloader_config=config).prepare(loader)


@WORKERS
def test_a_stream_of_one_process_whose_batches_are_cut(workers):
    """accelerate cuts each tensor to the number of packed rows, `cu_seq_lens_q` too."""
    loader = DataLoader(RAW.to_iterable_dataset(), 8, collate_fn=PACKING, **with_workers(workers))
    with pytest.raises(ConfigError, match="hands out the batches of one process.*dispatch_batches=False"):
        next(iter(prepared(loader, None)))


@pytest.mark.parametrize("workers", [None, "fork"])
def test_a_stream_of_one_process_whose_batches_are_left_whole(workers):
    loader = DataLoader(RAW.to_iterable_dataset(), 8, collate_fn=PACKING, **with_workers(workers))
    batches = list(prepared(loader, False))
    check(batches)
    for batch in batches:
        begins = torch.nonzero(batch["position_ids"].flatten() == 0)[:, 0].tolist()
        assert batch["cu_seq_lens_q"].tolist() == [*begins, batch["input_ids"].numel()]


@pytest.mark.parametrize("collator", [PADDING, WITHOUT_BOUNDS])
def test_a_stream_of_one_process_whose_batches_hold_rows_alone(collator):
    loader = Accelerator(cpu=True).prepare(DataLoader(RAW.to_iterable_dataset(), 8, collate_fn=collator))
    check(loader)


@pytest.mark.parametrize("options", [{}, {"accelerator_config": {"dispatch_batches": False}}])
def test_a_stream_in_a_trainer(options, tmp_path):
    args = arguments(TrainingArguments, tmp_path, max_steps=3, per_device_train_batch_size=8, **options, **ALONE)
    trainer = Trainer(llama(), args, PACKING, train_dataset=RAW.to_iterable_dataset())
    if options:
        check(trainer.get_train_dataloader())
        assert trainer.train().training_loss > 0
    else:
        with pytest.raises(ConfigError, match="accelerator_config={'dispatch_batches': False}"):
            trainer.train()


@pytest.mark.parametrize(
    "collator", [PACKING, WITHOUT_BOUNDS, DataCollatorForPreferencePairs(TOKENIZER)], ids=["packed", "rows", "pairs"]
)
def test_batches_that_several_processes_would_share(collator, monkeypatch):
    """An odd number of packed rows would lose one, and a pair would be torn apart."""
    for module in ("packing", "preference"):
        monkeypatch.setattr(f"hf_objectives.collators.{module}.world_size", lambda: 2)
    loader = DataLoader(RAW.to_iterable_dataset(), 8, collate_fn=collator)
    with pytest.raises(ConfigError, match="hands out the batches of one process"):
        next(iter(Accelerator(cpu=True).prepare(loader)))


# -- streams that are split twice ------------------------------------------------------------------------------------------


def shard(data, rank, collate=ids, **options):
    """What a Trainer's loader on two processes is, for one of them."""
    loader = DataLoader(data, 4, collate_fn=collate, **options)
    return prepare_data_loader(
        loader, torch.device("cpu"), 2, rank, put_on_device=False, dispatch_batches=False, rng_types=[]
    )


def test_a_stream_is_shared_among_processes_once():
    whole = taken(24)
    for rank in (0, 1):
        read = [*itertools.islice(shard(mixture().to_iterable_dataset(), rank), 3)]
        assert read == [whole[8 * step + 4 * rank :][:4] for step in range(3)]


def test_split_by_node_in_a_plain_loader_is_every_second_row():
    for rank in (0, 1):
        data = split_dataset_by_node(mixture().to_iterable_dataset(), rank, 2)
        assert ids(itertools.islice(data, 10)) == taken(20)[rank::2]
        loader = DataLoader(data, 5, collate_fn=ids)
        assert [*itertools.chain.from_iterable(itertools.islice(loader, 2))] == taken(20)[rank::2]
        one_process = Accelerator(cpu=True).prepare(DataLoader(data, 5, collate_fn=as_tensors))
        rows = [row for batch in itertools.islice(one_process, 2) for row in batch["first"].tolist()]
        assert rows == [row[0] for row in taken(20)[rank::2]]


@pytest.mark.parametrize("workers", [None, "fork"])
def test_split_by_node_and_by_accelerate_is_refused(workers):
    data = split_dataset_by_node(mixture().to_iterable_dataset(), 0, 2)
    with pytest.raises(ConfigError, match="divides these among the processes again.*leave split_dataset_by_node out"):
        next(iter(shard(data, 0, **with_workers(workers))))


@pytest.mark.slow
@WORKERS
def test_split_by_node_before_batches_are_handed_out_is_refused(workers, monkeypatch):
    monkeypatch.setattr("hf_objectives.distributed.world_size", lambda: 2)
    data = split_dataset_by_node(mixture().to_iterable_dataset(), 0, 2)
    loader = Accelerator(cpu=True).prepare(DataLoader(data, 4, collate_fn=as_tensors, **with_workers(workers)))
    with pytest.raises(ConfigError, match="leave split_dataset_by_node out"):
        next(iter(loader))
