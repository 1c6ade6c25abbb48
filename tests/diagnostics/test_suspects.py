"""Which rows are blocked, on losses made by hand."""

from __future__ import annotations

import json
import math

import pytest

from hf_objectives.diagnostics.suspects import Suspects, write_blocklist
from hf_objectives.errors import FileFormatError


def examples(*losses, source="web", first=0):
    return [
        {"source": source, "row": first + i, "loss": loss, "tokens": 9, "text": ""} for i, loss in enumerate(losses)
    ]


def step(suspects, *losses, event=False, first=0, limit=math.inf):
    suspects.settle(event)
    whole = examples(*losses, first=first)
    found = suspects.judge(whole, limit)
    suspects.take(found, len(whole))
    return [one["row"] for one in found]


def test_a_row_that_stands_out_is_blocked_when_the_next_step_is_quiet():
    suspects = Suspects()
    assert step(suspects, 2.0, 2.1, 1.9, 2.05, 2.0, 1.95) == []
    assert step(suspects, 2.0, 2.1, 9.0, event=True, first=10) == [12] and not suspects.blocked
    assert suspects.settle(False) and suspects.blocked == {"web": {12}}


def test_rows_of_a_run_that_has_gone_wrong_are_innocent():
    suspects = Suspects()
    step(suspects, 2.0, 2.1, 1.9, 2.05, 2.0, 1.95)
    for k in range(10):
        assert step(suspects, math.nan, math.nan, event=True, first=20 + 2 * k) == [20 + 2 * k, 21 + 2 * k]
    assert not suspects.settle(False) and not suspects.blocked


def test_where_training_ends_only_those_that_stood_apart_are_blocked():
    for losses, blocked in (((2.0, math.nan), {"web": {1}}), ((math.nan, math.nan), {})):
        suspects = Suspects()
        step(suspects, *losses, event=True)
        assert suspects.finish() == bool(blocked) and suspects.blocked == blocked


def test_each_source_has_its_own_usual_loss():
    suspects = Suspects()
    hard = examples(*[6.0 + 0.1 * i for i in range(6)], source="code")
    easy = examples(*[1.0 + 0.01 * i for i in range(6)])
    assert suspects.judge(hard + easy) == []
    (found,) = suspects.judge(examples(6.2, source="web"))
    assert found["source"] == "web" and found["deviations"] > 6
    assert suspects.judge(examples(6.2, source="code")) == []


def test_a_row_without_a_trained_token_is_no_suspect():
    suspects = Suspects()
    assert suspects.judge(examples(None, 2.0)) == []


def test_a_blocklist_that_is_there_is_kept_and_ranks_are_joined(tmp_path):
    path = tmp_path / "diagnostics" / "blocklist.json"
    write_blocklist(path, [{"web": {3, 1}}, {"web": {2}, "code": {7}}])
    assert json.loads(path.read_text()) == {"web": [1, 2, 3], "code": [7]}
    suspects = Suspects()
    suspects.read(path)
    assert not path.with_suffix(".tmp").exists()
    path.write_text('{"web": [-1, 2]}')
    suspects.read(path)
    suspects.read(tmp_path / "none.json")
    assert suspects.blocked == {"web": {1, 2, 3}, "code": {7}}
    for damaged in ("{", "[3]", '{"web": 3}', '{"web": ["x"]}'):
        path.write_text(damaged)
        with pytest.raises(FileFormatError, match="is no blocklist"):
            suspects.read(path)
    write_blocklist(tmp_path / "empty.json", [{}])
    assert not (tmp_path / "empty.json").exists()
