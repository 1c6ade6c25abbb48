"""The script for a GPU runs on a CPU, so that a GPU is not where it is debugged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
ON_CUDA_ALONE = {"liger", "cut_cross_entropy"}


@pytest.fixture
def script(monkeypatch):
    """The script as a module, without the attentions that a CPU lacks or compiles for a minute."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_ATTENTION", ("sdpa", "eager"))
    monkeypatch.setattr(module, "_TINY", {kind: module._TINY[kind] for kind in ("llama", "bert")})
    return module


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["machine", "head", "sft", "dpo", "evaluation", "settings", "ppo", "numbers", "leaks", "resume"]
)
def test_every_trial_of_a_stage_has_figures(script, tmp_path, stage):
    lab = script.Lab(small=True, end=time.time() + 600)
    lab.run(script.STAGES[stage][0](lab), tmp_path / "figures.jsonl")
    lines = lines_of(tmp_path / "figures.jsonl")
    failed = {line.get("head"): line["note"] for line in lines if "note" in line}
    assert len(lines) > len(failed) and set(failed) <= ON_CUDA_ALONE, failed
    if stage == "numbers":
        losses = [
            line[name] for line in lines if line["dtype"] == "float32" for name in ("batch 1", "batch 8", "packed")
        ]
        assert max(losses) - min(losses) < 1e-5


def test_no_trial_begins_without_time(script, tmp_path):
    lab = script.Lab(small=True, end=time.time() - 1)
    lab.run(iter([({"trial": 1}, lambda: 1 / 0)]), tmp_path / "figures.jsonl")
    assert lines_of(tmp_path / "figures.jsonl") == [{"trial": 1, "note": "left out: no time"}]


@pytest.mark.long
@pytest.mark.distributed
def test_stages_are_processes_whose_figures_are_joined(tmp_path):
    words = ["--small", "--minutes", "30", "--stages", "fsdp2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = lines_of(tmp_path / "fsdp2.jsonl")
    assert "note" not in line, (tmp_path / "fsdp2.log").read_text()[-2000:]
    assert "### fsdp2" in (tmp_path / "results.md").read_text() and str(line["tokens/s"]) in done.stdout
