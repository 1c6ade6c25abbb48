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
from hf_objectives.preparation.dataset import prepare_dataset, token_count
from tests.support.chat_corpus import PLAIN, byte_tokenizer
from tests.trainers.test_causal_lm import chats

TOKENIZER = byte_tokenizer()


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
    assert token_count(packed) == (total.trained + total.masked, total.trained)
    encoded = {tuple(encode_row(TOKENIZER, row)["input_ids"]) for row in chats(200)}
    for row in packed:
        at = 0
        for length in row["seq_lengths"]:
            assert tuple(row["input_ids"][at : at + length]) in encoded
            at += length
        assert len(row["input_ids"]) == at <= 512


def test_several_processes_give_the_same():
    rows = chats(9000)
    one, two = Ledger(), Ledger()
    alone = prepare_dataset(rows, TOKENIZER, max_length=256, num_proc=1, ledger=one)
    several = prepare_dataset(rows, TOKENIZER, max_length=256, num_proc=2, ledger=two)
    assert alone.data.table.equals(several.data.table) and one.to_dict() == two.to_dict()


@pytest.mark.parametrize("kind", [Dataset.from_list, iter])
def test_several_processes_take_any_rows(kind):
    alone = prepare_dataset(chats(5000), TOKENIZER, max_length=256, num_proc=1)
    several = prepare_dataset(kind(chats(5000)), TOKENIZER, max_length=256, num_proc=2)
    assert alone.data.table.equals(several.data.table)


def test_a_killed_worker_is_an_error_not_a_hang():
    def rows():
        for i, row in enumerate(chats(20_000)):
            if i == 4_000:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield row

    with pytest.raises(WorkerError, match="one of 2 worker processes died"):
        prepare_dataset(rows(), TOKENIZER, max_length=256, num_proc=2)


def test_a_bad_row_is_named_whatever_the_processes():
    rows = chats(9000)
    rows[8123] = {"messages": [PLAIN[0], {"role": "assistant", "content": ""}], "source": "odd"}
    for num_proc in (1, 2):
        with pytest.raises(ConversationError, match="source 'odd', row 8123, turn 1: empty content"):
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
