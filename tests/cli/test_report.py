"""`hf-objectives report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_objectives.cli.report import report
from hf_objectives.errors import FileFormatError


def saved(folder: Path) -> str:
    folder.mkdir()
    history = [{"step": step, "loss": 3 - step / 50} for step in range(1, 41)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return str(folder)


def test_a_report_is_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.html"
    report([saved(tmp_path / "a"), "--output", str(output), "--compare", saved(tmp_path / "b")])
    assert capsys.readouterr().out.strip() == str(output)
    assert "compared with <bdi>b</bdi>" in output.read_text(encoding="utf-8")


def test_a_folder_without_a_log_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no log in"):
        report([str(tmp_path), "--output", str(tmp_path / "out.html")])
