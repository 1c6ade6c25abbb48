"""Every example runs as it stands, in a folder of its own."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "diagnose_a_log": "spike_sustained",
    "generation_template": "<|im_end|>",
    "mixture": "chats",
    "perplexity_module": "bits_per_byte",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert PRINTED.get(name, "\n") in capsys.readouterr().out


NOTEBOOK = json.loads((EXAMPLES / "tutorial.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_the_code_of_the_tutorial():
    page = (EXAMPLES.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```|((?:^    [^\n]*\n)+)", page, re.M | re.S)
    assert [
        python.strip("\n") if python else "\n".join(f"!{line.strip()}" for line in shell.strip().splitlines())
        for python, shell in found
    ] == CELLS


@pytest.mark.long
def test_the_notebook_runs(tmp_path, monkeypatch):
    """With fewer steps, and without the push, which needs an account."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names: dict = {}
    for cell in CELLS:
        if not cell.startswith("!"):
            exec(compile(cell, "tutorial.ipynb", "exec"), names)
            continue
        for line in cell.splitlines():
            command = line.removeprefix("!")
            if "push" in command:
                continue
            few = {
                "quickstart": "--max_steps 40 --logging_steps 5 --built_in_rows 600",
                "dpo_quickstart": "--max_steps 2",
            }
            name = re.search(r"--config (\w+)", command)
            command = f"{command} {few[name[1]]}" if name else command.replace("--step 120", "--step 12")
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
