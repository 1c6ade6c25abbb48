"""Log lines into curves: names, numbers, and steps that go back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.diagnostics.log_table import LogTable, canonical


def curves(lines):
    table = LogTable()
    table.extend(lines)
    return table.curves()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train_loss", "loss"),
        ("train/loss", "loss"),
        ("val_loss", "eval_loss"),
        ("eval/loss", "eval_loss"),
        ("validation/loss", "eval_loss"),
        ("eval/web_perplexity", "eval_web_perplexity"),
        ("train/rewards/chosen", "rewards/chosen"),
        ("lr", "learning_rate"),
        ("mixture/web/share", "mixture/web/share"),
    ],
)
def test_names_are_the_trainers(key, name):
    assert canonical(key) == name


def test_lines_of_different_keys_become_columns():
    series, notes, seams = curves(
        [{"step": 1, "loss": 3.0, "epoch": 0.1}, {"step": 1, "eval_loss": 4}, {"step": 2, "loss": "2.5", "note": None}]
    )
    assert series["loss"].steps.tolist() == [1, 2] and series["loss"].values.tolist() == [3.0, 2.5]
    assert series["eval_loss"].values.tolist() == [4.0] and series["epoch"].steps.tolist() == [1]
    assert "note" not in series and not notes and not seams


def test_the_summary_of_a_run_is_no_point_of_its_loss():
    series, _, _ = curves([{"step": 1, "loss": 3.0}, {"step": 9, "train_runtime": 4.0, "train_loss": 2.9}])
    assert series["loss"].steps.tolist() == [1]


def test_nan_stays_and_words_are_told():
    series, notes, _ = curves(
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "NaN"}, {"step": 3, "loss": "high"}]
    )
    assert np.isnan(series["loss"].values).tolist() == [True, True]
    assert notes == ["loss: 1 values that are no numbers were left out, the first 'high'"]


def test_lines_without_a_step_are_counted():
    _, notes, _ = curves([{"loss": 1.0}, {"step": 2, "loss": 1.0}])
    assert notes[0].startswith("1 of 2 lines name no step")


def test_steps_that_are_no_numbers_from_zero_on_are_counted():
    series, notes, _ = curves([{"step": -1, "loss": 1.0}, {"step": "x", "loss": 2.0}, {"step": 4, "loss": 3.0}])
    assert series["loss"].steps.tolist() == [4]
    assert any(note.startswith("2 lines have a step that is no number from 0 on") for note in notes)


def test_a_resumed_run_replaces_what_it_wrote_again():
    lines = [{"step": step, "loss": float(step)} for step in (10, 20, 30, 40)]
    lines += [{"step": 40, "eval_loss": 7.0}] + [{"step": step, "loss": step + 0.5} for step in (30, 40, 50)]
    series, notes, seams = curves(lines)
    assert series["loss"].steps.tolist() == [10, 20, 30, 40, 50]
    assert series["loss"].values.tolist() == [10.0, 20.0, 30.5, 40.5, 50.5]
    assert seams == [30] and "1 resumed run; 2 lines" in notes[0]
    # At step 40 the run evaluated before it went back and not since: what is left of it is of the steps that count.
    assert series.get("eval_loss") is None or series["eval_loss"].steps.tolist() == []


def test_one_line_out_of_order_is_no_resumed_run():
    lines = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4, 1, 5, 6)]
    series, notes, seams = curves(lines)
    assert series["loss"].steps.tolist() == [1, 2, 3, 4, 5, 6] and series["loss"].values[0] == 1.0
    assert seams == [] and notes == ["1 lines with a step out of order were left out, the first at step 1"]


def test_two_names_of_one_curve_are_told():
    _, notes, _ = curves([{"step": 1, "loss": 1.0}, {"step": 2, "train_loss": 1.0}])
    assert notes == ["loss was read from loss and train_loss; at one step the later line counts"]


def test_a_trackers_counter_comes_after_the_trainers_step():
    series, _, _ = curves([{"train/global_step": 50, "_step": 3, "train/loss": 1.0}])
    assert series["loss"].steps.tolist() == [50]


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=30), min_size=1, max_size=4), st.data())
def test_after_any_resumes_each_step_has_the_value_written_last(increments, data):
    written, step, count = [], 0, 0
    for i, run in enumerate(increments):
        if i:
            step = data.draw(st.integers(0, max(step - 2, 0)))
        for more in run:
            step += more
            count += 1
            written.append((step, float(count)))
    # By hand: walk backwards, keep what lies below everything that was kept.
    kept, low = {}, float("inf")
    for at, value in reversed(written):
        if at < low:
            kept[at], low = value, at
    # A single line out of order is read as stray, which the reference above does not know.
    steps = [at for at, _ in written]
    stray = any(steps[i] < steps[i - 1] and steps[i + 1] > steps[i - 1] for i in range(1, len(steps) - 1))
    series, _, _ = curves({"step": at, "loss": value} for at, value in written)
    got = dict(zip(series["loss"].steps.tolist(), series["loss"].values.tolist(), strict=True))
    assert (np.diff(series["loss"].steps) > 0).all()
    if not stray:
        assert got == kept
