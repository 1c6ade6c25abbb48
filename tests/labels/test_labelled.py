"""Labels of encoded texts: which tokens lie in a span, and what a cut leaves of them."""

from __future__ import annotations

import numpy as np

from hf_objectives.labels.labelled import cut, label_spans
from hf_objectives.labels.spans import Rendered
from hf_objectives.labels.tokenization import Encoded


def labelled():
    """Two texts of one token a character: `abcd` with `bc` trained, `é x` with `é` trained (two bytes)."""
    encoded = Encoded(
        np.arange(7, dtype=np.int32),
        np.array([0, 4, 7]),
        np.array([0, 1, 2, 3, 0, 2, 3]),
        np.array([1, 2, 3, 4, 2, 3, 4]),
        np.array([True, True]),
    )
    return label_spans(encoded, [Rendered("abcd", [(1, 3)]), Rendered("é x", [(0, 1)])])


def test_tokens_in_a_span_are_trained():
    rows = labelled()
    assert rows.labels.tolist() == [-100, 1, 2, -100, 4, -100, -100]
    assert rows.spans.tolist() == [[1, 3], [4, 5]] and rows.span_rows.tolist() == [0, 1]
    assert rows.row(1) == {"input_ids": [4, 5, 6], "labels": [4, -100, -100]}
    assert rows.to_table().to_pylist() == [rows.row(0), rows.row(1)]


def test_a_span_that_the_cut_goes_through_is_not_trained():
    rows = cut(labelled(), 2)
    assert rows.ids.tolist() == [0, 1, 4, 5] and rows.labels.tolist() == [-100, -100, 4, -100]
