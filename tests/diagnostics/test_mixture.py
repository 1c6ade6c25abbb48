"""The picture of a mixture, from reports and from a run's log."""

from __future__ import annotations

import json
import os

import pytest

from hf_objectives.diagnostics.mixture import plot_mixture, report_of_log
from hf_objectives.errors import FileFormatError
from hf_objectives.mixture.report import MixtureReport, SourceReport


def report(row: int) -> MixtureReport:
    sources = [
        SourceReport("web", 0.8, 0.79, 79 * row, row, row / 10),
        SourceReport("a/b", 0.2, 0.21, 21 * row, 1, 0.5),
    ]
    return MixtureReport(row, "tokens", sources)


LOG = [{"step": row, "loss": 1.0, **report(row).metrics()} for row in (1, 2, 3)] + [{"step": 3, "train_runtime": 1.0}]


@pytest.mark.slow
def test_draws_reports_logs_and_folders(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    pictures = [
        plot_mixture(log, tmp_path / "pictures" / f"{i}.svg").read_text()
        for i, log in enumerate(([report(row) for row in (5, 9)], LOG, tmp_path))
    ]
    for words in ("Epochs of each source", "a/b", "web"):
        assert all(f"<!-- {words} -->" in picture for picture in pictures)
    drawn = "Share of what was drawn{}, dashed as asked"
    assert drawn.format(" (tokens)") in pictures[0] and drawn.format("") in pictures[1]


def test_the_last_log_is_a_report():
    last = report_of_log(LOG)
    assert last.sources == report(3).sources and last.row == 3 and "after 3 steps" in str(last)


def test_the_run_is_that_of_the_newest_checkpoint_whichever_file_was_touched_last(tmp_path):
    for step in (100, 1000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": step, "loss": 1.0, **report(step).metrics()}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": step}))
    os.utime(tmp_path / "checkpoint-100" / "trainer_state.json", (2e9, 2e9))
    assert report_of_log(tmp_path).row == 1000


def test_json_lines_are_a_log_too(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LOG))
    last = report_of_log(tmp_path / "log.jsonl")
    assert last.sources == report(3).sources and all(isinstance(one.tokens, int) for one in last)


def test_a_source_keeps_what_was_said_of_it_last():
    ended = [*LOG, {"step": 4, **{key: value for key, value in report(4).metrics().items() if "/web/" in key}}]
    last = report_of_log(ended)
    assert last.row == 4 and [last["web"], last["a/b"]] == [report(4)["web"], report(3)["a/b"]]


def test_a_figure_that_is_missing_is_named():
    log = [{"step": 1, "mixture/web/share": 1.0}]
    with pytest.raises(FileFormatError, match="no 'mixture/web/asked'; expected asked, share, tokens"):
        report_of_log(log)


def test_a_log_without_a_mixture_is_named():
    for read in (report_of_log, plot_mixture):
        with pytest.raises(FileFormatError, match="not of a run on a mixture"):
            read([{"step": 1, "loss": 2.0}])
