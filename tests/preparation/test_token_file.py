"""Encoded documents on disk."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.errors import DiskFullError
from hf_objectives.packing import pack_table, pack_tables
from hf_objectives.preparation.token_file import TokenFile
from hf_objectives.preparation.work import concatenated

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6)


def table(documents, labelled, first):
    lists = pa.array(documents, pa.list_(pa.int32()))
    own = {"labels": pa.array([[-100] * len(ids) for ids in documents], lists.type)} if labelled else {}
    numbers = pa.array(range(first, first + len(documents)), pa.int64())
    return pa.table(
        {"input_ids": lists, **own, "source": pa.array(["x"] * len(documents), pa.string()), "row": numbers}
    )


@given(st.lists(st.tuples(DOCUMENTS, st.booleans()), min_size=1, max_size=4))
def test_documents_come_back_with_labels_where_any_has_some(tmp_path_factory, batches):
    file = TokenFile(tmp_path_factory.getbasetemp())
    tables = [table(documents, labelled, 10 * i) for i, (documents, labelled) in enumerate(batches)]
    for part in tables:
        file.write(part)
    found = file.table()
    assert found.to_pylist() == concatenated(tables).to_pylist()
    assert ("labels" in found.column_names) == any(labelled for _, labelled in batches)
    assert all(found[name].num_chunks == 1 for name in found.column_names)


@given(DOCUMENTS.filter(any), st.integers(1, 4), st.sampled_from(["best_fit", "concat"]))
def test_rows_that_are_packed_some_at_a_time_are_those_of_all_at_once(documents, at_once, strategy):
    whole = table(documents, False, 0)
    how = {"strategy": strategy, "overflow": "split", "allow_empty": True}
    parts = list(pack_tables(whole, 4, at_once, **how))
    assert pa.concat_tables(parts).to_pylist() == pack_table(whole, 4, **how).to_pylist()
    assert all(part.num_rows <= at_once for part in parts)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = TokenFile(tmp_path)
    monkeypatch.setattr(file, "_ids", open("/dev/full", "wb", buffering=0))  # noqa: PTH123, SIM115
    with pytest.raises(DiskFullError, match="no space left to write input_ids"):
        file.write(table([[1, 2]], False, 0))
