"""A run that is killed while it saves goes on as if nothing had happened, wherever the save was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "killed_saves.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["language", pytest.param("ppo", marks=pytest.mark.long)])
def test_killed_at_every_file_of_a_save(tmp_path, kind):
    """With `save_total_limit=1`: the second checkpoint is saved, and the first one is removed."""
    done = subprocess.run([sys.executable, str(PROGRAM), str(tmp_path), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())[kind]
    assert "lost" not in found and "other bytes" not in found, found
    # Killed at a change, and so with the file before cut in two: at least twice for each of twelve files.
    assert len(found["chosen"]) > 48 and {*found["chosen"]} == {2, 4}
    assert found["chosen"][:2] == [2, 2] and found["chosen"][-1] == 4
    assert found["chosen"][::2] == sorted(found["chosen"][::2]), "an older checkpoint after a newer one was whole"
    assert len(found["losses"]) == 6 and {*found["resumed"]} == {"2", "4"}
    for step, resumed in found["resumed"].items():
        assert resumed == {"losses": found["losses"], "weights": True}, step
