"""hf-objectives diagnose, plot and report, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hf_objectives.cli.main import main, run_command
from hf_objectives.diagnostics import plot as drawing
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.inspection.findings import Finding


@pytest.fixture
def logs(tmp_path):
    rng = np.random.default_rng(0)
    for name, leap in (("good", 0.0), ("bad", 3.0)):
        losses = 2 + 4 * np.arange(1, 201) ** -0.5 + rng.normal(0, 0.02, 200)
        losses[120:] += leap
        lines = [{"step": i + 1, "loss": loss, "epoch": 0.005 * i} for i, loss in enumerate(losses)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_good_run_and_a_bad_one(logs, capsys):
    main(["diagnose", str(logs / "good.jsonl"), str(logs / "bad.jsonl")])
    said = " ".join(capsys.readouterr().out.split())
    assert "good: 200 points of training loss" in said and "Nothing is wrong that a log can show." in said
    assert "error spike_sustained, steps 121 to 200: loss 2.3" in said and "Go back to the checkpoint before" in said


def test_json_and_exit_codes(logs, capsys):
    main(["diagnose", str(logs / "bad.jsonl"), "--json"])
    (run,) = json.loads(capsys.readouterr().out)
    assert run["run"] == "bad" and run["findings"][0]["kind"] == "spike_sustained"
    main(["diagnose", str(logs / "good.jsonl"), "--fail_on", "info"])
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", str(logs / "bad.jsonl"), "--fail_on", "error"])
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no log at"),
        ("", "is empty"),
        ('{"step": 1, "loss": 2.0}\n', "one point is no curve; expected at least two logged steps"),
        ('{"step": 1, "loss": "high"}\n', "no curve could be read"),
    ],
)
def test_what_cannot_be_read_is_a_line_and_exit_code_2(tmp_path, capsys, content, words):
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", str(path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and "Traceback" not in said


def test_a_run_that_cannot_be_judged_is_a_note(logs, capsys):
    (logs / "new.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    main(["diagnose", str(logs / "new.jsonl"), str(logs / "bad.jsonl")])
    said = " ".join(capsys.readouterr().out.split())
    assert "note: not judged: " in said and "one point is no curve" in said and "error spike_sustained" in said
    assert "Nothing is wrong" not in said
    main(["diagnose", str(logs), "--json"])
    runs = {run["run"]: run for run in json.loads(capsys.readouterr().out)}
    assert sorted(runs) == ["bad", "good", "new"] and "not judged" in runs["new"]["notes"][-1]
    assert runs["new"]["findings"] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": %d, "eval_loss": 2.0}', "the log has no training loss to judge."),
        ('{"step": %d, "loss": 2.0}', "too few points to judge most things (9; 20 are needed)"),
    ],
)
def test_what_was_not_judged_is_not_called_sound(tmp_path, capsys, line, words):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line % i + "\n" for i in range(1, 10)))
    main(["diagnose", str(path)])
    said = " ".join(capsys.readouterr().out.split())
    assert words in said and "Nothing is wrong" not in said


def test_keys_do_not_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    word = "\x1b[31mred\x1b]0;title\x07"
    lines = [
        {"step": i, "loss": 3 - i / 100, word: "x", f"mixture/{word}/share": 0.5, f"mixture/{word}/asked": 0.9}
        for i in range(1, 60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    main(["diagnose", str(path)])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "␛[31mred" in said and "mixture_drift" in said


def test_findings_do_not_steer_the_terminal(logs, capsys, monkeypatch):
    found = [Finding("plateau", 1, "info", "a\x1b[2J", "b\x1b[2J", 2)]
    monkeypatch.setattr("hf_objectives.diagnostics.diagnose", lambda run: found)
    main(["diagnose", str(logs / "good.jsonl")])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "a␛[2J" in said and "b␛[2J" in said


@pytest.fixture
def runs(tmp_path):
    for name, level in (("good", 2.0), ("bad", float("nan"))):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"step": i, "loss": 1 / i + level} for i in range(1, 31)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
    return tmp_path


def test_draws_several_runs_and_says_where(runs, capsys):
    picture = runs / "new" / "both.svg"
    run_command(["plot", str(runs / "good"), str(runs / "bad"), "--output", str(picture)])
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"<?xml")


def test_by_default_a_png_in_this_folder(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    run_command(["plot", "good"])
    assert capsys.readouterr().out == "training_curves.png\n"
    assert (runs / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_findings_can_be_left_out(runs, monkeypatch):
    marked = []
    monkeypatch.setattr(drawing, "mark_findings", lambda axes, found, **_: marked.append([one.kind for one in found]))
    run_command(["plot", str(runs / "bad"), "--output", str(runs / "a.png")])
    run_command(["plot", str(runs / "bad"), "--output", str(runs / "b.png"), "--no_findings"])
    assert marked[0] == ["non_finite"] and marked[1] == []


def test_errors_are_ours(runs):
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf; found 'gif'"):
        run_command(["plot", str(runs / "good"), "--output", str(runs / "curves.gif")])
    with pytest.raises(FileFormatError, match="no log at"):
        run_command(["plot", str(runs / "none")])
    assert not list(runs.glob("*.gif"))


def saved(folder: Path) -> str:
    folder.mkdir()
    history = [{"step": step, "loss": 3 - step / 50} for step in range(1, 41)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return str(folder)


def test_a_report_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.html"
    run_command(["report", saved(tmp_path / "a"), "--output", str(output), "--compare", saved(tmp_path / "b")])
    assert capsys.readouterr().out.strip() == str(output)
    assert "compared with <bdi>b</bdi>" in output.read_text(encoding="utf-8")


def test_a_folder_without_a_log_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no log in"):
        run_command(["report", str(tmp_path), "--output", str(tmp_path / "out.html")])
