"""hf-objectives plot, as a user calls it; its errors are ours."""

from __future__ import annotations

import json

import pytest

from hf_objectives.cli.plot import plot
from hf_objectives.diagnostics import plot as drawing
from hf_objectives.errors import ConfigError, FileFormatError


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
    plot([str(runs / "good"), str(runs / "bad"), "--output", str(picture)])
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"<?xml")


def test_by_default_a_png_in_this_folder(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    plot(["good"])
    assert capsys.readouterr().out == "training_curves.png\n"
    assert (runs / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_findings_can_be_left_out(runs, monkeypatch):
    marked = []
    monkeypatch.setattr(drawing, "mark_findings", lambda axes, found, **_: marked.append([one.kind for one in found]))
    plot([str(runs / "bad"), "--output", str(runs / "a.png")])
    plot([str(runs / "bad"), "--output", str(runs / "b.png"), "--no_findings"])
    assert marked[0] == ["non_finite"] and marked[1] == []


def test_errors_are_ours(runs):
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf; found 'gif'"):
        plot([str(runs / "good"), "--output", str(runs / "curves.gif")])
    with pytest.raises(FileFormatError, match="no log at"):
        plot([str(runs / "none")])
    assert not list(runs.glob("*.gif"))


def test_a_run_is_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        plot([])
    assert stop.value.code == 2 and "RUN" in capsys.readouterr().err.upper()
