"""The journal of blocks: the process that trains finds what loader workers have read."""

from __future__ import annotations

import json

import pytest
from torch.utils.data import DataLoader

from tests.support.mixtures import mixture, name_of, of_kind, taken


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streams", "streams across"])
def test_a_trainer_finds_every_row_that_workers_have_read(kind):
    """Blocks may be shorter than what the workers take between them, so that none of their rows is the first worker's."""
    made = of_kind(kind)
    made.batch_rows = 64
    loader = iter(DataLoader(made, batch_size=64, num_workers=4, collate_fn=list))
    expected, seen = taken(of_kind(kind), 900), []
    for _ in range(12):
        seen += [name_of(row) for row in next(loader)]
        resumed = of_kind(kind)
        resumed.load_state_dict(json.loads(json.dumps(made.state_dict(len(seen)))))
        assert taken(resumed, 3) == expected[len(seen) : len(seen) + 3]
    assert seen == expected[: len(seen)]


@pytest.mark.slow
def test_every_worker_leaves_its_blocks_and_old_ones_go_by_age(monkeypatch):
    monkeypatch.setattr("hf_objectives.mixture.blocks._KEPT", 3)
    made = mixture({"unit": "examples"}, streams=True)
    monkeypatch.setattr("torch.utils.data.get_worker_info", lambda: None)
    taken(made, 2_000)
    assert made.state_dict(1_990)["order"]["row"] <= 1_990
    fresh = mixture({"unit": "examples"}, streams=True)
    made.load_state_dict(fresh.state_dict(0))  # from the begin again: what is written now stays
    taken(made, 300)
    resumed = mixture({"unit": "examples"}, streams=True)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(270))))
    assert taken(resumed, 20) == taken(mixture({"unit": "examples"}, streams=True), 290)[270:]
