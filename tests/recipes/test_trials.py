"""Jobs in processes of their own: results are kept, and what fails is named."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hf_objectives.errors import ConfigError, WorkerError
from hf_objectives.recipes.trials import Job, run_jobs


def jobs(folder: Path, **changed) -> list[Job]:
    return [
        Job(str(folder / "trials" / f"{i:03d}"), [], {}, (1, 1), {}, {"weights": {"a": i}, **changed}, 1, True)
        for i in range(4)
    ]


def train(job: Job) -> None:
    number = job.settings["weights"]["a"]
    job.write_result({"test": number / 2}, {"process": os.getpid()})


def fail_at_3(job: Job) -> None:
    train(job) if job.name != "trials/003" else Path(job.folder).read_text()


def die_at_2(job: Job) -> None:
    """As the kernel kills a process where memory runs out."""
    train(job) if job.name != "trials/002" else os.kill(os.getpid(), signal.SIGKILL)


def run(given: list[Job], function=train, engine: str = "local") -> list[dict]:
    return run_jobs(given, function, engine, 2, Console())


@pytest.mark.slow
def test_results_come_in_order_and_are_not_made_again(tmp_path, capsys):
    results = run(jobs(tmp_path))
    assert [result["losses"] for result in results] == [{"test": i / 2} for i in range(4)]
    assert len({result["given"]["process"] for result in results} | {os.getpid()}) == 5
    assert run(jobs(tmp_path)) == results
    printed = capsys.readouterr().out
    assert "trials/003: test 1.5000" in printed and "4 of 4 runs were there already" in printed
    with pytest.raises(ConfigError, match="trials/000 was trained otherwise. .*rate: .*3 asked for"):
        run(jobs(tmp_path, rate=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (fail_at_3, r"1 of 4 runs failed: trials/003 \(IsADirectoryError.*003/log.txt"),
        (die_at_2, r"1 of 4 runs failed: trials/002 \(killed by signal 9; see "),
    ],
)
def test_a_job_that_fails_is_named_and_the_others_kept(tmp_path, function, words):
    with pytest.raises(WorkerError, match=words) as failed:
        run(jobs(tmp_path), function)
    assert "run again to train what is missing" in str(failed.value)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/result.json")}
    assert len(there) == 3
    if function is fail_at_3:
        assert "Traceback" in (tmp_path / "trials/003/log.txt").read_text()
    assert len(run(jobs(tmp_path))) == 4
    assert all(path.stat().st_mtime_ns == written for path, written in there.items())


def test_ray_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf-objectives\[ray\]'"):
        run(jobs(tmp_path), engine="ray")
