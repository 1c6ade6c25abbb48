"""YAML files of options: where they are, and the line of each key."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_objectives.errors import ConfigError
from hf_objectives.recipes.config_files import LAUNCH_CONFIGS, ConfigFile, find_config


def test_a_config_is_a_file_or_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config("quickstart")
    assert shipped.is_file() and shipped.name == "quickstart.yaml"
    Path("quickstart").mkdir()  # a folder is no config
    assert find_config("quickstart") == shipped
    Path("mine.yaml").write_text("seed: 1")
    assert find_config("mine.yaml") == Path("mine.yaml")
    with pytest.raises(ConfigError, match=r"no such file; shipped are .*; did you mean 'quickstart'"):
        find_config("quikstart")
    assert find_config("fsdp2", LAUNCH_CONFIGS).is_file()


def test_every_key_has_its_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# first\nrate: 1\nnested:\n  - 1\n  - 2\n3: x\n")
    file = ConfigFile.read(path)
    assert dict(file.values) == {"rate": 1, "nested": [1, 2], "3": "x"}
    assert [file.place(key) for key in file.values] == [f"{path}, line {line}" for line in (2, 3, 6)]
