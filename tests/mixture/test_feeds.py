"""Sources that are looked up: epochs, looking ahead, blocklists, other processes; prepared folders in test_sources."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
from datasets import Dataset

from hf_objectives.mixture.build import build_mixture
from hf_objectives.mixture.feeds import MappedFeed
from tests.support.mixtures import KINDS, LENGTHS, mixture, source, taken


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_source_of_few_rows_is_looked_ahead_for_many_epochs(size, monkeypatch):
    asked = []
    whole = MappedFeed.ahead
    monkeypatch.setattr(MappedFeed, "ahead", lambda self, *given: asked.append(1) or whole(self, *given))
    few = {"a": source("a"), "z": source("c").select(range(size))}
    weighed = {name: {"dataset": rows, "weight": 1} for name, rows in few.items()}
    made = build_mixture({"sources": weighed, "unit": "examples"})
    rows = taken(made, 130)
    assert len(asked) < 20 and Counter(name for name, _ in rows) == {"a": 65, "z": 65}
    numbers = [number for name, number in rows if name == "z"]
    assert all(sorted(numbers[i : i + size]) == list(range(size)) for i in range(0, 64 - size, size))


@pytest.mark.parametrize("streams", [False, True])
def test_every_epoch_of_a_source_is_a_new_order_of_all_its_rows(streams):
    rows = taken(mixture({"unit": "examples"}, streams=streams), 1_500)
    for name, (size, *_) in LENGTHS.items():
        mine = [number for source, number in rows if source == name]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert len(epochs) > 5 and all(sorted(one) == list(range(size)) for one in epochs)
        assert len({tuple(one) for one in epochs}) == len(epochs)


@pytest.mark.slow
def test_blocked_rows_are_never_drawn(kind):
    blocked = {"a": [0, 3, 39], "c": [6]}
    gone = {(name, number) for name, numbers in blocked.items() for number in numbers}
    made = mixture({**KINDS[kind], "blocklist": blocked}, streams=kind.startswith("streams"))
    rows = taken(made, 600)
    seen = {piece[:2] for row in rows for piece in (row if isinstance(row[0], tuple) else [row])}
    everything = {(name, n) for name, (size, *_) in LENGTHS.items() for n in range(size)}
    assert seen == everything - gone
    resumed = mixture({**KINDS[kind], "blocklist": blocked}, streams=kind.startswith("streams"))
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(411))))
    assert taken(resumed, 100) == rows[411:511]


@pytest.mark.parametrize("unit", ["tokens", "examples"])
def test_a_row_can_be_blocked_when_a_run_goes_on(unit):
    made = mixture({"unit": unit})
    rows = taken(made, 400)
    bad = rows[215]
    resumed = mixture({"unit": unit, "blocklist": {bad[0]: [bad[1]]}})
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(200))))
    after = taken(resumed, 180)
    assert bad not in after
    for name in "abc":  # each source goes on where it was, without that row
        was = [row for row in rows[200:] if row[0] == name and row != bad]
        now = [row for row in after if row[0] == name]
        shared = min(len(was), len(now))
        assert now[:shared] == was[:shared]


def test_a_mapped_file_goes_to_another_process_by_its_name(tmp_path):
    big = Dataset.from_dict({"input_ids": [list(range(500))] * 200})
    big.save_to_disk(str(tmp_path / "big"))
    made = build_mixture({"sources": {"big": Dataset.load_from_disk(str(tmp_path / "big"))}})
    assert len(pickle.dumps(made)) < 40_000
    assert next(iter(pickle.loads(pickle.dumps(made))))["input_ids"].tolist() == list(range(500))
