"""Packed rows of a mixture: every document whole, rows full, shares kept."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.build import build_mixture
from tests.support.mixtures import LENGTHS, mixture, name_of, of_kind, source, taken


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["within", "across", "streams within", "streams across"])
def test_packed_rows_hold_every_document_whole(kind):
    documents = Counter()
    made = of_kind(kind)
    rows = 400
    if "across" in kind:  # documents that are packed together
        order = made._order()
        rows = sum(order.block().num_rows for _ in range(2))
    for row in itertools.islice(made, rows):
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 64
        begin = 0
        for name, number, length in name_of(row):
            piece = row["input_ids"][begin : begin + length]
            assert (piece == 1_000 * ord(name) + number).all()
            assert row["labels"][begin] == -100 and (row["labels"][begin + 1 : begin + length] == piece[1:]).all()
            documents[name, number] += length
            begin += length
    if "across" not in kind:
        assert all(len(set(row["sources"])) == 1 for row in itertools.islice(made, 100))
    # As many tokens of each as of the others, to within a pass.
    for name, (size, *_) in LENGTHS.items():
        lengths = {number: len(row["input_ids"]) for number, row in enumerate(source(name))}
        seen = [documents[name, number] / lengths[number] for number in range(size)]
        assert max(seen) - min(seen) <= 2 and min(seen) > 0


def test_rows_packed_across_sources_are_full():
    rows = list(itertools.islice(mixture({"packing": "across", "max_length": 256}), 250))
    assert np.mean([len(row["input_ids"]) for row in rows]) > 0.97 * 256
    tokens = Counter()
    for row in rows:
        for name, _, length in name_of(row):
            tokens[name] += length
        # Nor does a source with short documents, which fill gaps, come first.
        assert all(abs(tokens[n] - w * tokens.total()) <= 2 * 256 for n, w in zip("abc", (0.6, 0.3, 0.1), strict=True))


def test_documents_that_are_too_long_are_cut_or_left_out_with_a_line(caplog):
    config = {"sources": {"b": source("b")}, "packing": "across", "max_length": 64}
    long = {n for n, ids in enumerate(source("b")["input_ids"]) if len(ids) > 64}
    dropped = build_mixture({**config, "overflow": "drop"})
    assert f"source 'b': {len(long)} of 25 documents are longer than 64 and left out" in caplog.text
    assert {piece[1] for row in taken(dropped, 100) for piece in row} == set(range(25)) - long
    with pytest.raises(ConfigError, match="source 'b': it is a stream, of which overflow='drop' would drop unseen"):
        stream = {"b": {"dataset": source("b").to_iterable_dataset(), "weight": 1}}
        build_mixture({**config, "sources": stream, "overflow": "drop"})
    cut = build_mixture({**config, "overflow": "truncate"})
    assert {piece[2] for row in taken(cut, 100) for piece in row if piece[1] in long} == {64}
