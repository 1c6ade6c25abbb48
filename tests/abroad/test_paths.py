"""Every way from a chat to labels gives those of `encode_chat`, token for token, under every template of TRL."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset

from hf_objectives import (
    DataCollatorForAssistantOnlyLM,
    DataCollatorWithEosPacking,
    build_mixture,
    encode_chat,
    encode_chats,
    encode_row,
    prepare_dataset,
)
from hf_objectives.errors import DataError
from hf_objectives.labels import to_example
from tests.support.chat_corpus import ORIGINALS, PLAIN, SYSTEM, byte_tokenizer, template

TEXTS = os.environ.get("HF_OBJECTIVES_TEST_TEXTS")
LONGEST = 100_000


def rows_of(names, count):
    """Rows as they lie in files: Alpaca, and ShareGPT with tool calls."""
    rows = []
    for name in names:
        rows += json.loads((Path(TEXTS or "") / name).read_text())[:count]
    return rows


def check(tokenizer, rows):
    """Compare the ways for the rows that the template takes; return how many those are."""
    taken, expected = [], []
    for row in rows:
        example = to_example(row)
        try:
            expected.append(encode_chat(tokenizer, example.messages, tools=example.tools))
        except DataError:  # a template without system turns or tools
            continue
        tools = example.tools if isinstance(example.tools, str) else json.dumps(example.tools or [])
        taken.append({"messages": json.dumps(example.messages), "tools": tools})
        for same in (row, {"messages": example.messages, "tools": example.tools}):
            assert encode_row(tokenizer, same) == expected[-1]
    if not taken:
        return 0
    pairs = [(row["input_ids"], row["labels"]) for row in expected]
    batch = encode_chats(tokenizer, [json.loads(row["messages"]) for row in taken],
                         tools=[json.loads(row["tools"]) or None for row in taken])  # fmt: skip
    assert list(zip(batch["input_ids"].to_pylist(), batch["labels"].to_pylist(), strict=True)) == pairs
    table = Dataset.from_list(taken)
    unpacked = prepare_dataset(table, tokenizer, max_length=LONGEST, packing=False, num_proc=1)
    assert [(row["input_ids"], row["labels"]) for row in unpacked] == pairs
    known = {tuple(ids): labels for ids, labels in pairs}
    packed = prepare_dataset(table, tokenizer, max_length=LONGEST, num_proc=1)
    # 128 rows of a mixture are packed together: short rows.
    config = {"sources": {"chat": {"dataset": table}}, "packing": "across", "max_length": 2 * max(map(len, known))}
    mixture = build_mixture(config, tokenizer=tokenizer)
    seen = 0
    for row in [*packed, *itertools.islice(mixture, 1)]:
        begin = 0
        for length in row["seq_lengths"]:
            ids, labels = (list(row[name][begin : begin + length]) for name in ("input_ids", "labels"))
            if tuple(ids) in known:  # the last document of a mixture's row may be cut
                assert labels == known[tuple(ids)]
                seen += 1
            begin += length
    assert seen >= len(pairs)
    padded = DataCollatorForAssistantOnlyLM(tokenizer)(taken)
    joined = DataCollatorWithEosPacking(tokenizer, max_length=LONGEST)(taken)
    for i, (ids, labels) in enumerate(pairs):
        assert padded["input_ids"][i, : len(ids)].tolist() == ids and padded["labels"][i, : len(ids)].tolist() == labels
    bounds = joined["cu_seq_lens_q"].tolist()
    flat = joined["input_ids"].flatten().tolist(), joined["labels"].flatten().tolist()
    found = {tuple(flat[0][a:b]): flat[1][a:b] for a, b in itertools.pairwise(bounds)}
    for ids, labels in pairs:  # a document that does not end with EOS is closed with one
        closed = min((document for document in found if document[: len(ids)] == tuple(ids)), key=len)
        assert found[closed][: len(ids)] == labels and len(closed) <= len(ids) + 1
    return len(pairs)


@pytest.mark.parametrize("name", ORIGINALS)
def test_generated_chats(name):
    tokenizer = byte_tokenizer(template(name), special=["<|unused|>"])
    assert check(tokenizer, [{"messages": PLAIN}, {"messages": SYSTEM}, {"messages": PLAIN[:2]}]) >= 2


@pytest.mark.slow
@pytest.mark.skipif(TEXTS is None, reason="needs HF_OBJECTIVES_TEST_TEXTS, a folder of example data")
@pytest.mark.parametrize("name", ORIGINALS)
def test_real_chats(name):
    tokenizer = byte_tokenizer(template(name), special=["<|unused|>"])
    assert check(tokenizer, rows_of(["alpaca_en_demo.json", "glaive_toolcall_en_demo.json"], 12)) >= 12
