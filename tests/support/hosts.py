"""Chats with the labels that `encode_chat` gives them, and what tests of other people's trainers and loaders share."""

from __future__ import annotations

import itertools

import torch
from datasets import Dataset

from hf_objectives import (
    DataCollatorForAssistantOnlyLM,
    DataCollatorWithEosPacking,
    encode_chat,
    prepare_dataset,
)
from tests.support.chat_corpus import byte_tokenizer

LENGTH = 200
TOKENIZER = byte_tokenizer()
CHATS = [
    [
        {"role": "user", "content": f"Say {n}"},
        {"role": "assistant", "content": f"I say {n}, {'na ' * (n % 7)}and no more."},
    ]
    for n in range(24)
]
RAW = Dataset.from_list([{"messages": messages} for messages in CHATS])
EXPECTED = {tuple(row["input_ids"]): row["labels"] for row in (encode_chat(TOKENIZER, messages) for messages in CHATS)}
ALONE = {"remove_unused_columns": False}


def documents(batch):
    """The documents of a batch with their labels, by positions where it is packed and by the mask where it is padded."""
    found = {}
    for i, ids in enumerate(batch["input_ids"]):
        if "position_ids" in batch:
            begins = [*torch.nonzero(batch["position_ids"][i] == 0)[:, 0].tolist(), len(ids)]
        else:
            begins = [0, int(batch["attention_mask"][i].sum())]
        for begin, end in itertools.pairwise(begins):
            found[tuple(ids[begin:end].tolist())] = batch["labels"][i, begin:end].tolist()
    return found


def check(batches, tokenizer=TOKENIZER):
    """Every document of the batches is one of the chats, and has its labels; padding is a document of EOS alone."""
    seen = 0
    for batch in batches:
        for ids, labels in documents(batch).items():
            if set(ids) == {tokenizer.eos_token_id}:
                assert set(labels) == {-100}
                continue
            assert labels == EXPECTED[ids]
            seen += 1
    assert seen == len(CHATS)


def arguments(kind, folder, **options):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(str(folder), **{**settings, "save_strategy": "no", **options})


def rows(name):
    return {
        "raw": lambda: RAW,
        "unpacked": lambda: prepare_dataset(RAW, TOKENIZER, max_length=LENGTH, packing=False),
        "packed": lambda: prepare_dataset(RAW, TOKENIZER, max_length=LENGTH),
    }[name]()


PADDING = DataCollatorForAssistantOnlyLM(TOKENIZER)
PACKING = DataCollatorWithEosPacking(TOKENIZER, max_length=LENGTH)


# What spawned loader workers collate with: they import this file, and not the tests with their trainers.


def ids(rows):
    return [[int(i) for i in row["input_ids"]] for row in rows]


def as_tensors(rows):
    return {"first": torch.tensor([row["input_ids"][0] for row in rows])}
