"""Log lines into curves: names, numbers, and steps that go back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_objectives.diagnostics.log_table import LogTable, tables_by_run


def curves(lines):
    table = LogTable()
    for line in lines:
        table.add(line)
    return table.curves()


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
    # Evaluation did not go back.
    assert series["eval_loss"].steps.tolist() == [40]


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


# -- order: decided for each curve ---------------------------------------------------------------------------------


def lines_of(key, steps, value=1.0):
    return [{"step": step, key: value} for step in steps]


def late_evaluations():
    for step in range(1, 101):
        yield {"step": step, "loss": 1.0}
        if step > 3 and (step - 3) % 10 == 0:
            yield {"step": step - 3, "eval_loss": 2.0}
            yield {"step": step - 3, "eval_accuracy": 0.5}


@pytest.mark.parametrize(
    ("lines", "evaluated"),
    [
        (lines_of("loss", range(1, 101)) + lines_of("eval_loss", range(10, 101, 10)), range(10, 101, 10)),
        (list(late_evaluations()), range(10, 91, 10)),
        (lines_of("loss", range(1, 101)) + lines_of("eval_loss", [60]), [60]),
        # The best checkpoint is evaluated once more at the end: training did not go back, so nothing was resumed.
        (lines_of("loss", range(1, 101)) + lines_of("eval_loss", [20, 40, 60, 80, 100, 60]), [20, 40, 60, 80, 100]),
    ],
    ids=["blocks", "late", "one trailing", "the best again"],
)
def test_evaluations_behind_training_are_no_resumed_run(lines, evaluated):
    series, notes, seams = curves(lines)
    assert series["loss"].steps.tolist() == list(range(1, 101))
    assert series["eval_loss"].steps.tolist() == list(evaluated)
    assert not notes and not seams


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=60))
def test_curves_that_rise_lose_nothing_however_they_are_mixed(increments):
    steps, lines = [0, 0, 0], []
    for which, more in increments:
        steps[which] += more
        lines.append({"step": steps[which], ("loss", "eval_loss", "grad_norm")[which]: float(steps[which])})
    series, notes, seams = curves(lines)
    for key in ("loss", "eval_loss", "grad_norm"):
        written = [line[key] for line in lines if key in line]
        assert (series[key].values.tolist() if written else []) == written
    assert not notes and not seams


def test_one_resume_gives_one_seam_and_one_note():
    lines = [
        line
        for steps in (range(10, 101, 10), range(60, 121, 10))
        for step in steps
        for line in ({"step": step, "loss": 1.0}, {"step": step, "eval_loss": 1.0}, {"step": step, "eval_acc": 0.5})
    ]
    series, notes, seams = curves(lines)
    assert seams == [60] and series["eval_acc"].steps.tolist() == list(range(10, 121, 10))
    assert len(notes) == 1 and "1 resumed run; 15 lines" in notes[0]  # 60 to 100 of each of three


def test_where_there_is_no_loss_the_longest_curve_shows_the_resume():
    lines = lines_of("eval_loss", [10, 20, 30, 20, 30, 40]) + lines_of("eval_acc", [20, 10])
    assert curves(lines)[2] == [20]


def test_lines_of_unlike_keys_keep_their_order():
    """At one step the later line counts, whatever else the lines hold."""
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0, "epoch": 1.0}, {"step": 2, "loss": 3.0}]
    lines += [{"step": 3, "loss": 4.0, "epoch": 1.0}, {"step": 4, "loss": 5.0}]
    series, notes, _ = curves(lines)
    assert series["loss"].values.tolist() == [1.0, 3.0, 4.0, 5.0] and not notes


# -- whose loss it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["train_runtime", "train/train_runtime", "x/train_runtime"])
def test_the_summary_is_told_by_its_neighbour(word):
    series, _, _ = curves([{"step": 1, "loss": 3.0}, {"step": 1, word: 4.0, "train_loss": 9.0}])
    assert series["loss"].values.tolist() == [3.0]


def test_the_summary_of_a_tracker_keeps_its_own_name():
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": 2.0}, {"step": 2, "train/train_loss": 9.0}]
    series, notes, _ = curves(lines)
    assert series["loss"].values.tolist() == [3.0, 2.0] and series["train_loss"].values.tolist() == [9.0] and not notes
    assert list(curves(lines[2:])[0]) == ["train_loss"]  # one point is a mean over the run
    series, _, _ = curves([{"step": step, "train/train_loss": 9.0} for step in (1, 2)])
    assert series["loss"].steps.tolist() == [1, 2]


@pytest.mark.parametrize("column", ["split", "phase", "mode", "Split"])
@pytest.mark.parametrize("value", ["eval", "val", "valid", "Validation", "test", "dev"])
def test_a_column_says_whose_loss_it_is(column, value):
    lines = []
    for step in (1, 2):
        lines += [
            {"step": step, column: "train", "loss": 2.0, "epoch": 0.1},
            {"step": step, column: value, "loss": 9.0, "epoch": 0.2},
            {"step": step, column: "wiki", "loss": 5.0},
        ]
    series, notes, _ = curves(lines)
    assert {name: one.values[0] for name, one in series.items()} == {
        "loss": 2.0,
        "epoch": 0.2,
        "eval_loss": 9.0,
        "eval_wiki_loss": 5.0,
    }
    assert not notes


def test_test_and_validation_stay_apart():
    lines = [
        {"step": step, "split": split, "loss": 1.0} for step in (1, 2) for split in ("val", "test", None, 3, "3", " ")
    ]
    assert sorted(curves(lines)[0]) == ["eval_loss", "loss", "test_loss"]


@pytest.mark.parametrize("key", ["run", "run_name"])
def test_a_column_of_runs_gives_several_tables(key):
    lines = [{"step": 0, "loss": 0.5}]
    lines += [{key: name, "step": step, "loss": loss} for step in (1, 2) for name, loss in (("a", 1.0), ("b", 2.0))]
    tables = tables_by_run([*lines, {"step": 3, "loss": 3.0}])
    found = {name: table.curves()[0]["loss"].values.tolist() for name, table in tables.items()}
    # What names no run belongs to the run that was named last.
    assert found == {"a": [0.5, 1.0, 1.0], "b": [2.0, 2.0, 3.0]}
    assert list(tables_by_run(line for line in lines if line.get(key) != "b")) == ["a"]
    assert list(tables_by_run(lines[:1])) == list(tables_by_run([])) == [""]


# -- odd values and keys -------------------------------------------------------------------------------------------


def test_arrays_are_no_numbers():
    series, notes, _ = curves([{"step": i, "loss": 2.0, "ids": [1, i], "grad_norm": [2.5]} for i in (1, 2)])
    assert list(series) == ["loss"] and series["loss"].values.shape == (2,)
    assert notes == [
        "ids: 2 values that are no numbers were left out, the first [1, 1]",
        "grad_norm: 2 values that are no numbers were left out, the first [2.5]",
    ]
    series, notes, _ = curves([{"step": [1], "loss": 2.0}, {"step": 2, "loss": [2.0, 1.0]}])
    assert not series and any(note.startswith("1 lines have a step that is no number") for note in notes)


def test_keys_that_are_no_words_are_told():
    series, notes, _ = curves([{1: 2, "step": 1, "loss": 2.4, None: 3}, {"step": 2, "loss": 2.4}])
    assert list(series) == ["loss"] and notes == ["keys that are no text were left out: 1, None"]


@pytest.mark.parametrize("key", ["", " ", "Unnamed: 0"])
def test_an_index_is_no_curve(key):
    assert list(curves([{key: 0, "step": 1, "loss": 2.0}])[0]) == ["loss"]
