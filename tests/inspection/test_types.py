"""Warnings in words."""

from __future__ import annotations

from hf_objectives.inspection.types import LabelWarning


def test_places_in_words():
    rows = tuple(("data", i) for i in range(1, 9))
    assert LabelWarning("duplicates", "warning", "", "", rows).places == "data 1, 2, 3, 4, 5 and 3 more"
    assert LabelWarning("duplicates", "warning", "", "", (("a", 3), ("a", 17), ("b", 4))).places == "a 3, 17; b 4"
