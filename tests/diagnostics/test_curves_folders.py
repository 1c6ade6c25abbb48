"""Which file of a folder is the log of the run."""

from __future__ import annotations

import json
import os

from hf_objectives.diagnostics.curves import candidates, contents, read_curves
from tests.diagnostics.test_curves import state


def test_a_folder_gives_its_own_log_or_that_of_a_later_checkpoint(tmp_path):
    state(tmp_path / "checkpoint-9", [1.0], when=1_000)
    state(tmp_path / "checkpoint-10", [1.0, 2.0], when=1_001)
    assert len(read_curves(tmp_path).get("loss").steps) == 2  # 10 comes after 9
    state(tmp_path, [1.0, 2.0, 3.0], when=2_000)
    assert len(read_curves(tmp_path).get("loss").steps) == 3
    state(tmp_path / "checkpoint-20", [1.0] * 4, when=3_000)  # the run went on
    assert len(read_curves(tmp_path).get("loss").steps) == 4


def test_the_state_of_more_steps_counts_where_times_are_lost(tmp_path):
    for folder, steps, when in ((tmp_path, 100, 1_000), (tmp_path / "checkpoint-50", 50, 2_000)):
        path = state(folder, [1.0] * steps)
        history = json.loads(path.read_text())["log_history"]
        content = {"best_global_step": 7, "epoch": 1.0, "global_step": steps, "log_history": history}
        path.write_text(json.dumps(content, indent=2))
        os.utime(path, (when, when))
    assert len(read_curves(tmp_path).get("loss").steps) == 100
    newer = state(tmp_path / "checkpoint-150", [1.0] * 150)
    newer.write_text(newer.read_text().replace('{"log', '{"global_step": 150, "log', 1))
    os.utime(newer, (500, 500))
    assert len(read_curves(tmp_path).get("loss").steps) == 150
    # A state that does not say its step: a key of a log line is none, and the times decide.
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 1.0, "global_step": 900}]}')
    os.utime(tmp_path / "trainer_state.json", (100, 100))
    assert len(read_curves(tmp_path).get("loss").steps) == 150


def test_files_are_grouped_by_run_the_likeliest_first(tmp_path):
    (tmp_path / "logs").mkdir()
    names = (
        "a-tag-loss.csv",
        "a-tag-lr.csv",
        "b.csv",
        "events.out.tfevents.1",
        "events.out.tfevents.2",
        "logs/x.jsonl",
    )
    for name in names:
        (tmp_path / name).touch()
    groups = [{run: [file.name for file in files] for run, files in group.items()} for group in candidates(tmp_path)]
    assert groups == [
        {"x": ["x.jsonl"]},
        {"a": ["a-tag-loss.csv", "a-tag-lr.csv"], "b": ["b.csv"]},
        {"events.out.tfevents.*": ["events.out.tfevents.1", "events.out.tfevents.2"]},
    ]
    assert (
        contents(tmp_path)
        == "a-tag-loss.csv, a-tag-lr.csv, b.csv, events.out.tfevents.1, events.out.tfevents.2 and 1 more"
    )
