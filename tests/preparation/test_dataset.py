"""From rows to packed rows: nothing lost, the same with one process and several, errors that name the row."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError, ConversationError, NothingSupervisedError, WorkerError
from hf_objectives.labels.ledger import Ledger
from hf_objectives.labels.rows import encode_row
from hf_objectives.preparation.dataset import prepare_dataset
from tests.support.chat_corpus import PLAIN
from tests.support.corpora import TOKENIZER, write_demo


def chats(n: int = 23) -> list[dict]:
    """Conversations of uneven lengths from two sources."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Count to {i}"},
                {"role": "assistant", "content": " ".join(map(str, range(1 + (i * 7) % 19)))},
            ],
            "source": "even" if i % 2 == 0 else "odd",
        }
        for i in range(n)
    ]


def test_unpacked_rows_are_those_of_encode_row():
    prepared = prepare_dataset(chats(), TOKENIZER, max_length=None, packing=False)
    for i, (row, made) in enumerate(zip(chats(), prepared, strict=True)):
        assert made == {**encode_row(TOKENIZER, row), "source": row["source"], "row": i}


@pytest.mark.parametrize("as_dataset", [False, True])
def test_packed_rows_hold_every_token(as_dataset):
    rows = Dataset.from_list(chats(200)) if as_dataset else chats(200)
    ledger = Ledger()
    packed = prepare_dataset(rows, TOKENIZER, max_length=512, ledger=ledger)
    total = ledger.total()
    assert total.balance() == 0 and total.rows_in == 200
    labels = [label for row in packed for label in row["labels"]]
    assert len(labels) == total.trained + total.masked and sum(label != -100 for label in labels) == total.trained
    encoded = {tuple(encode_row(TOKENIZER, row)["input_ids"]) for row in chats(200)}
    for row in packed:
        at = 0
        for length in row["seq_lengths"]:
            assert tuple(row["input_ids"][at : at + length]) in encoded
            at += length
        assert len(row["input_ids"]) == at <= 512


@pytest.fixture(scope="module")
def alone():
    """Rows, what one process makes of them, and its ledger."""
    rows, ledger = chats(5000), Ledger()
    return rows, prepare_dataset(rows, TOKENIZER, max_length=256, num_proc=1, ledger=ledger), ledger


@pytest.mark.slow
@pytest.mark.parametrize("kind", [list, Dataset.from_list, iter])
def test_several_processes_give_the_same_for_any_rows(kind, alone):
    rows, expected, ledger = alone
    booked = Ledger()
    several = prepare_dataset(kind(rows), TOKENIZER, max_length=256, num_proc=2, ledger=booked)
    assert expected.data.table.equals(several.data.table) and booked.to_dict() == ledger.to_dict()


def test_a_killed_worker_is_an_error_not_a_hang():
    def rows():
        for i, row in enumerate(chats(20_000)):
            if i == 4_000:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield row

    with pytest.raises(WorkerError, match="one of 2 worker processes died"):
        prepare_dataset(rows(), TOKENIZER, max_length=256, num_proc=2)


def test_a_bad_row_is_named_whatever_the_processes():
    rows = chats(2300)
    rows[2123] = {"messages": [PLAIN[0], {"role": "assistant", "content": ""}], "source": "odd"}
    for num_proc in (1, 2):
        with pytest.raises(ConversationError, match="source 'odd', row 2123, turn 1: empty content"):
            prepare_dataset(rows, TOKENIZER, max_length=256, num_proc=num_proc)


def test_nothing_left_is_an_error_that_says_where_it_went():
    with pytest.raises(NothingSupervisedError, match="2 rows and .* dropped .longer than max_length; rows 0, 1."):
        prepare_dataset([{"messages": PLAIN}] * 2, TOKENIZER, max_length=20)
    with pytest.raises(NothingSupervisedError, match="the dataset is empty"):
        prepare_dataset([], TOKENIZER, max_length=20)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="packing needs max_length"):
        prepare_dataset(chats(), TOKENIZER, max_length=None)
    with pytest.raises(ConfigError, match="engine is 'spark'"):
        prepare_dataset(chats(), TOKENIZER, max_length=8, engine="spark")


def test_paths_without_a_folder_stay_in_memory(tmp_path):
    path = write_demo(tmp_path / "a.jsonl", 20)
    one = prepare_dataset(path, TOKENIZER, max_length=64)
    named = prepare_dataset({"a": path, "b": path}, TOKENIZER, max_length=64)
    assert sum(map(len, named["input_ids"])) == 2 * sum(map(len, one["input_ids"]))
    assert {name for names in named["sources"] for name in names} == {"a", "b"}
