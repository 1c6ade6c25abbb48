"""Text from data does not steer the terminal."""

from __future__ import annotations

from hf_objectives.inspection.safe_text import visible


def test_control_characters_are_shown():
    assert visible("a\x1b[31mb\x07\x9b1m\u202ec\x7f") == "a␛[31mb␇\ufffd1m\ufffdc␡"
    assert visible("line\n\tüber 語") == "line\n\tüber 語"
