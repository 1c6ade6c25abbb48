"""Packed rows, made by hand; every token is in a row or counted as dropped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.packing import rows as packing_rows
from hf_objectives.packing.rows import pack_rows
from hf_objectives.types import IGNORE_INDEX as IGNORE


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.bool_])
@pytest.mark.parametrize(("longest", "documents"), [(3000, 500), (90, 4000), (3, 1), (900, 1)])
def test_rows_are_gathered_in_any_type_and_labels_are_a_copy(kind, longest, documents, monkeypatch):
    monkeypatch.setattr(packing_rows, "_GATHERED", 4096)  # so that short pieces are copied by several threads
    monkeypatch.setattr(packing_rows, "_CHUNKS_A_THREAD", 4)
    sizes = np.random.default_rng(0).integers(0, longest, documents)
    sizes[-1] = longest
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    flat = np.random.default_rng(1).integers(0, 60_000, offsets[-1]).astype(kind)
    packed, before = pack_rows(offsets, 2048, overflow="split"), flat.copy()
    rows, again = packed.gather_all([flat, flat])
    assert rows.dtype == kind and len(rows) == len(flat)
    at = 0
    for start, length in zip(packed.starts, packed.lengths, strict=True):
        assert np.array_equal(rows[at : at + length], flat[start : start + length])
        at += length
    if kind is np.int32:  # the others hold no -100, or no label
        packed.without_begins(again)
        assert np.array_equal(flat, before) and np.array_equal(packed.gather_all([flat])[0], rows)
        assert (again == -100).sum() == (packed.lengths > 0).sum()


def rows_of(flat, offsets, max_length, **options):
    packed = pack_rows(offsets, max_length, **options)
    labels = packed.without_begins(packed.gather_all([np.asarray(flat, np.int32)])[0])
    spans = list(zip(packed.row_offsets[:-1], packed.row_offsets[1:], strict=True))
    pieces = list(zip(packed.piece_offsets[:-1], packed.piece_offsets[1:], strict=True))
    return (
        [packed.gather_all([np.asarray(flat)])[0][a:b].tolist() for a, b in spans],
        [labels[a:b].tolist() for a, b in spans],
        [packed.lengths[a:b].tolist() for a, b in pieces],
        packed,
    )


# Three documents: 10 11 12 | 20 21 | 30 31 32 33 34
FLAT, OFFSETS = [10, 11, 12, 20, 21, 30, 31, 32, 33, 34], [0, 3, 5, 10]


def test_concat_by_hand():
    rows, labels, lengths, packed = rows_of(FLAT, OFFSETS, 4, strategy="concat")
    assert rows == [[10, 11, 12, 20], [21, 30, 31, 32], [33, 34]]
    # Nothing predicts the first token of a row, and no document's first token is a target.
    assert labels == [[IGNORE, 11, 12, IGNORE], [IGNORE, IGNORE, 31, 32], [IGNORE, 34]]
    assert lengths == [[3, 1], [1, 3], [2]] and packed.documents.tolist() == [0, 1, 1, 2, 2]
    assert packed.dropped.tolist() == [0, 0, 0]


def test_best_fit_by_hand():
    rows, labels, lengths, _ = rows_of(FLAT, OFFSETS, 5)
    assert rows == [[10, 11, 12, 20, 21], [30, 31, 32, 33, 34]]
    assert labels == [[IGNORE, 11, 12, IGNORE, 21], [IGNORE, 31, 32, 33, 34]]
    assert lengths == [[3, 2], [5]]


@pytest.mark.parametrize(
    ("overflow", "rows", "dropped"),
    [
        ("truncate", [[10, 11, 12], [20, 21], [30, 31, 32]], [0, 0, 2]),
        ("drop", [[10, 11, 12], [20, 21]], [0, 0, 5]),
        ("split", [[10, 11, 12], [20, 21], [30, 31, 32], [33, 34]], [0, 0, 0]),
    ],
)
def test_overflow_by_hand(overflow, rows, dropped):
    made, labels, _, packed = rows_of(FLAT, OFFSETS, 3, overflow=overflow)
    assert made == rows and packed.dropped.tolist() == dropped
    assert all(row[0] == IGNORE for row in labels)


documents = st.lists(st.integers(0, 30), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(
    documents,
    st.integers(2, 20),
    st.sampled_from(["best_fit", "first_fit", "concat"]),
    st.sampled_from(["truncate", "split", "drop"]),
)
def test_every_token_is_in_a_row_or_dropped_with_its_document(sizes, max_length, strategy, overflow):
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    packed = pack_rows(offsets, max_length, strategy=strategy, overflow=overflow)
    index = packed.gather_all([np.arange(offsets[-1])])[0]  # every token a number of its own
    assert len(index) + packed.dropped.sum() == offsets[-1]
    assert len(set(index.tolist())) == len(index)
    assert np.diff(packed.row_offsets).max(initial=0) <= max_length
    assert packed.lengths.sum() == len(index)
    if strategy == "concat" or overflow == "split":
        assert packed.dropped.sum() == 0
    if strategy == "concat":
        assert index.tolist() == list(range(offsets[-1]))
    else:
        for document, size in enumerate(sizes):
            pieces = packed.lengths[packed.documents == document].tolist()
            if size <= max_length:
                assert pieces == [size]
    # Each piece is a run of its own document.
    for length, document, end in zip(packed.lengths, packed.documents, np.cumsum(packed.lengths), strict=True):
        run = index[end - length : end]
        assert np.all(np.diff(run) == 1)
        assert np.all((run >= offsets[document]) & (run < offsets[document + 1]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "bfd"}, "strategy is 'bfd'; expected one of best_fit, first_fit, concat"),
        ({"overflow": "cut"}, "overflow is 'cut'; expected one of truncate, split, drop"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_bad_row_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        pack_rows([0, 1], options.pop("max_length", 4), **options)
