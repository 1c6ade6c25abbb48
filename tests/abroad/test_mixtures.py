"""Mixtures in other people's loops, loaders and trainers: they resume at the next row, or say what to change."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from trl import SFTConfig, SFTTrainer

from hf_objectives import DataCollatorWithEosPacking, build_mixture
from hf_objectives.errors import ConfigError
from tests.support.chat_corpus import byte_tokenizer
from tests.support.language_models import llama

TOKENIZER = byte_tokenizer()
SOURCES = {
    name: {
        "weight": weight,
        "dataset": Dataset.from_list([{"text": f"{name} {i} {'x' * (i % 9)}"} for i in range(size)]),
    }
    for name, weight, size in (("a", 2, 300), ("b", 1, 200))
}
BATCH = 4
PACKINGS = pytest.mark.parametrize("packing", [None, "within", "across"])


def mixture(packing=None):
    made = build_mixture({"sources": SOURCES, "packing": packing, "max_length": 64}, tokenizer=TOKENIZER)
    made.batch_rows = BATCH
    return made


def ids(rows):
    return [[int(i) for i in row["input_ids"]] for row in rows]


def joined(batches):
    return list(itertools.chain.from_iterable(batches))


def taken(made, n):
    return ids(itertools.islice(made, n))


@PACKINGS
@pytest.mark.parametrize("n", [0, 1, 200, 333])
def test_a_plain_loop_that_is_broken_off_resumes_at_the_next_row(packing, n):
    made, whole = mixture(packing), taken(mixture(packing), n + 50)
    rows = iter(made)
    for _ in range(n):
        next(rows)
    resumed = mixture(packing)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert taken(resumed, 50) == whole[n:]
    assert taken(resumed, 5) == whole[n : n + 5], "another iteration begins at the place of the state"


@PACKINGS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [1, 37])
def test_stateful_data_loader(packing, workers, batches):
    def loader():
        return StatefulDataLoader(mixture(packing), batch_size=BATCH, num_workers=workers, collate_fn=ids)

    whole = taken(mixture(packing), (batches + 20) * BATCH)
    first = loader()
    read = list(itertools.islice(first, batches))
    assert joined(read) == whole[: batches * BATCH]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert joined(itertools.islice(second, 20)) == whole[batches * BATCH :]


def test_a_state_of_other_workers_is_refused():
    made = mixture()
    state = {**made.state_dict(0), "reader": {"begin": 0, "read": 8, "workers": 2, "worker": 1, "batch_rows": BATCH}}
    made.load_state_dict(state)
    with pytest.raises(
        ConfigError, match="of loader worker 1 of 2, this is worker 0 of 1; resume with as many workers"
    ):
        iter(made)


def test_workers_without_the_batch_size_are_refused():
    made = build_mixture({"sources": SOURCES}, tokenizer=TOKENIZER)
    with pytest.raises(ConfigError, match="set the stream's batch_rows to the batch size"):
        next(iter(DataLoader(made, batch_size=BATCH, num_workers=2, collate_fn=ids)))
    made.batch_rows = BATCH
    read = itertools.islice(DataLoader(made, batch_size=BATCH, num_workers=2, collate_fn=ids), 6)
    assert joined(read) == taken(mixture(), 6 * BATCH)


def as_tensors(rows):
    return {"row": torch.tensor([int(row["row"]) for row in rows])}


@pytest.mark.parametrize("workers", [0, 2])
def test_state_of_accelerate(workers, tmp_path):
    def start():
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
        loader = DataLoader(mixture(), batch_size=BATCH, num_workers=workers, collate_fn=as_tensors)
        return accelerator, accelerator.prepare(loader)

    whole = [int(row["row"]) for row in itertools.islice(mixture(), 60)]
    accelerator, loader = start()
    batches = iter(loader)
    assert joined(next(batches)["row"].tolist() for _ in range(5)) == whole[:20]
    accelerator.save_state(tmp_path)
    accelerator, loader = start()
    accelerator.load_state(tmp_path)
    assert joined(batch["row"].tolist() for batch in itertools.islice(loader, 10)) == whole[20:]


def test_a_mixture_that_accelerate_would_save_itself_is_refused(tmp_path):
    accelerator, made = Accelerator(cpu=True), mixture()
    loader = accelerator.prepare(DataLoader(made, batch_size=BATCH, collate_fn=as_tensors))
    accelerator.register_for_checkpointing(made)
    next(iter(loader))
    with pytest.raises(
        ConfigError, match="register_for_checkpointing saves what a loader has read.*use_stateful_dataloader"
    ):
        accelerator.save_state(tmp_path)


def test_several_processes_have_to_say_how_many_rows_they_took(monkeypatch):
    made = mixture()
    next(iter(made))
    monkeypatch.setattr("hf_objectives.preparation.ordered_stream.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="say how many all have taken"):
        made.state_dict()
    assert made.state_dict(8)["row"] == 8


@PACKINGS
def test_sft_trainer_takes_a_mixture_as_an_iterable_dataset(packing, tmp_path):
    args = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=BATCH, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    seen = []

    class Collator(DataCollatorWithEosPacking):
        def __call__(self, features):
            seen.extend(ids(features))
            return super().__call__(features)

    data = mixture(packing).to_iterable_dataset()
    collator = Collator(TOKENIZER, max_length=128, train_on="all")
    SFTTrainer(llama(), args, collator, train_dataset=data, processing_class=TOKENIZER).train()
    assert seen[: 3 * BATCH] == taken(mixture(packing), 3 * BATCH)
