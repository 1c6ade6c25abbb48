"""JSON arrays are read in steps of any size, and what is wrong with one is named with its line."""

from __future__ import annotations

import io
import json
import random

import pytest

from hf_objectives.errors import FileFormatError
from hf_objectives.preparation.json_array import elements


def read(text: str, read_chars: int = 7) -> list:
    return [value for values in elements(io.BytesIO(text.encode()), "a.json", read_chars) for value in values]


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_are_read_in_steps(indent):
    rng = random.Random(0)
    rows = [{"n": rng.randrange(10**9), "text": "]},[{" * rng.randrange(4)} for _ in range(50)]
    for read_chars in (1, 7, 1 << 20):
        assert read(" \n" + json.dumps(rows, indent=indent) + "\n", read_chars) == rows
        assert read("[12, 345 ,6]", read_chars) == [12, 345, 6]  # a number may go on in what is not read yet
        assert read("[ ]", read_chars) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1},\n{"b": 2}\n{"c": 3}]', "a.json, line 3: not valid JSON .expected a comma"),
        ('[{"a": 1},\n{"b": 2},\n{"c": 3', "a.json, line 3: not valid JSON"),
        ('[{"a": 1},\n {"b": }]', "a.json, line 2: not valid JSON"),
        ('[{"a": 1}\n', "a.json, line 2: not valid JSON .expected a comma"),
        ("", "a.json, line 1: not valid JSON"),
        ("[1, \n", "a.json, line 2: not valid JSON"),
    ],
)
def test_broken_arrays_are_named_with_the_line(text, words):
    for read_chars in (3, 1 << 20):
        with pytest.raises(FileFormatError, match=words):
            read(text, read_chars)


def test_what_is_no_array_or_no_text():
    with pytest.raises(FileFormatError, match="a.json holds dict; expected a list of objects"):
        read('{"a": 1}', 100)
    with pytest.raises(FileFormatError, match="a.json: not UTF-8 .byte 0xff at 1"):
        list(elements(io.BytesIO(b"[\xff]"), "a.json", 7))
