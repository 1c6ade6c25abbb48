"""hf-objectives diagnose, as a user types it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_objectives.cli import main


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
