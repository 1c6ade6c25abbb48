"""Rows of a table by number: what datasets would give, whatever lies underneath."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.mixture.row_table import INTEGERS, RowList, RowTable
from hf_objectives.mixture.stream_feed import _is_shuffled

ROWS = [{"ids": [i] * (i % 4), "text": f"row {i}" if i % 3 else None, "n": i, "share": i / 7} for i in range(23)]


def plain(rows) -> list[dict]:
    return [{name: list(value) if name == "ids" else value for name, value in row.items()} for row in rows]


def chunked() -> Dataset:
    return concatenate_datasets(
        [Dataset.from_list(ROWS[:9]), Dataset.from_list(ROWS[9:10]), Dataset.from_list(ROWS[10:])]
    )


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Dataset.from_list(ROWS), ROWS),
        (chunked(), ROWS),
        (chunked().select([3, 22, 3, 0]), [ROWS[i] for i in (3, 22, 3, 0)]),
        (chunked().filter(lambda row: row["n"] % 2), ROWS[1::2]),
        (Dataset.from_list(ROWS).sort("n", reverse=True), ROWS[::-1]),
    ],
    ids=["one chunk", "chunks", "selected", "filtered", "sorted"],
)
def test_rows_are_those_of_the_dataset(dataset, expected):
    table = RowTable(dataset)
    order = np.random.default_rng(0).permutation(len(expected))
    assert len(table) == len(expected)
    assert plain(table.read(order)) == [expected[i] for i in order] and table.read(order[:0]) == []
    assert table.lengths("ids").tolist() == [len(row["ids"]) for row in expected]
    assert table.counts("ids", lambda values: values > 10).tolist() == [sum(v > 10 for v in r["ids"]) for r in expected]
    assert table.column("n").to_pylist() == [row["n"] for row in expected]


def test_columns_that_are_cut_in_different_places():
    ids = concatenate_datasets([Dataset.from_dict({"ids": [[i]]}) for i in range(9)])
    labels = concatenate_datasets(
        [Dataset.from_dict({"labels": [[-i] for i in part]}) for part in (range(4), range(4, 9))]
    )
    for dataset in (concatenate_datasets([ids, labels], axis=1), ids.add_column("labels", [[-i] for i in range(9)])):
        rows = RowTable(dataset).read(np.arange(9))
        assert [(row["ids"].tolist(), row["labels"].tolist()) for row in rows] == [([i], [-i]) for i in range(9)]
        assert RowTable(dataset).counts("labels", lambda values: values < -3).tolist() == [int(i > 3) for i in range(9)]


def test_lists_of_integers_are_views():
    (row,) = RowTable(Dataset.from_list(ROWS)).read(np.array([3]))
    assert isinstance(row["ids"], np.ndarray) and not row["ids"].flags.writeable


def test_nested_and_decoded_columns_come_as_datasets_gives_them():
    nested = Dataset.from_list([{"messages": [{"role": "user", "content": str(i)}]} for i in range(5)])
    assert RowTable(nested).read(np.array([4, 1])) == [nested[4], nested[1]]
    labelled = Dataset.from_dict({"k": [0, 1]}, Features({"k": ClassLabel(names=["no", "yes"])}))
    assert RowTable(labelled).read(np.array([1])) == [labelled[1]]


def test_columns_of_a_format_and_no_transform():
    dataset = Dataset.from_list(ROWS)
    assert list(RowTable(dataset.with_format("torch", columns=["n"])).read(np.array([2]))[0]) == ["n"]
    with pytest.raises(ConfigError, match="the dataset has a transform"):
        RowTable(dataset.with_transform(lambda batch: batch))


def test_rows_in_a_list_have_the_same_methods():
    rows = RowList(ROWS)
    assert rows.read(np.array([5, 2])) == [ROWS[5], ROWS[2]] and rows.lengths("ids")[7] == 3
    assert rows.counts("ids", lambda values: values > 10)[11] == 3
    assert rows.types() == {"ids": "", "text": "", "n": "int64", "share": "double"}
    assert RowTable(Dataset.from_list(ROWS)).types()["ids"] == INTEGERS
    assert RowTable(Dataset.from_dict({"t": ["a"]}, Features({"t": Value("string")}))).types() == {"t": "string"}
    rows.check_columns(["n", "ids", "text", "share"], "s")
    with pytest.raises(DataError, match="source 's', row 8: columns b; expected a, as in the first row"):
        RowList([{"a": 1}, {"b": 2}]).check_columns(["a"], "s", first=7)


def test_what_is_taken_from_datasets_that_is_not_public():
    dataset = Dataset.from_list(ROWS)
    assert dataset._indices is None and dataset.select([2, 1])._indices.column(0).to_pylist() == [2, 1], (
        "datasets keeps the rows of a selection elsewhere; see RowTable"
    )
    assert set(dataset.features._column_requires_decoding) == {"ids", "text", "n", "share"}, (
        "datasets tells elsewhere which columns are decoded; see RowTable"
    )
    shuffled = dataset.to_iterable_dataset().shuffle(seed=1).map(lambda row: row)
    assert _is_shuffled(shuffled) and not _is_shuffled(dataset.to_iterable_dataset().map(lambda row: row)), (
        "datasets keeps the shuffle buffer of a stream elsewhere; see _is_shuffled in mixture/stream_feed.py"
    )
