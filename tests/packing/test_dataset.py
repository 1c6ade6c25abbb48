"""Packing of a dataset, by hand."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hf_objectives.errors import FormatError, NothingSupervisedError
from hf_objectives.packing.dataset import pack_dataset

IGNORE = -100
ROWS = Dataset.from_list(
    [
        {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3], "source": "a", "row": 0},
        {"input_ids": [4, 5], "labels": [4, 5], "source": "b", "row": 7},
        {"input_ids": [6, 7, 8, 9], "labels": [IGNORE, IGNORE, IGNORE, 9], "source": "a", "row": 2},
    ]
)


def test_best_fit_by_hand():
    assert pack_dataset(ROWS, 5).to_list() == [
        {
            "input_ids": [1, 2, 3, 4, 5],
            "labels": [IGNORE, 2, 3, IGNORE, 5],
            "position_ids": [0, 1, 2, 0, 1],
            "seq_lengths": [3, 2],
            "sources": ["a", "b"],
            "rows": [0, 7],
        },
        {
            "input_ids": [6, 7, 8, 9],
            "labels": [IGNORE, IGNORE, IGNORE, 9],
            "position_ids": [0, 1, 2, 3],
            "seq_lengths": [4],
            "sources": ["a"],
            "rows": [2],
        },
    ]


def test_rows_that_train_nothing_are_left_out():
    packed = pack_dataset(ROWS, 3)  # truncated, the third document has no label left
    assert packed["input_ids"] == [[1, 2, 3], [4, 5]]
    with pytest.raises(NothingSupervisedError, match="none of 3 packed rows"):
        pack_dataset(ROWS.remove_columns("labels").add_column("labels", [[IGNORE] * 3, [IGNORE] * 2, [IGNORE] * 4]), 4)


def test_concat_is_a_stream():
    packed = pack_dataset(ROWS.remove_columns(["labels", "source", "row"]), 4, strategy="concat")
    assert packed["input_ids"] == [[1, 2, 3, 4], [5, 6, 7, 8]]  # the last row, 9 alone, predicts nothing
    assert packed["seq_lengths"] == [[3, 1], [1, 3]]


def test_a_filtered_dataset_packs_its_own_rows():
    assert pack_dataset(ROWS.filter(lambda row: row["row"] != 0), 6)["rows"] == [[7, 2]]


def test_bad_columns_are_named():
    with pytest.raises(FormatError, match="columns text; expected input_ids"):
        pack_dataset(Dataset.from_dict({"text": ["a"]}), 4)
    with pytest.raises(FormatError, match="row 1: labels and input_ids"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]}), 4)
    with pytest.raises(FormatError, match="expected lists of token ids"):
        pack_dataset(Dataset.from_dict({"input_ids": [1, 2]}), 4)
