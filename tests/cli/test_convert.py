"""hf-objectives convert, as a user types it."""

from __future__ import annotations

import json

import pytest
import yaml

from hf_objectives.cli.main import main


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "axolotl.yaml"
    path.write_text("base_model: org/base\nmicro_batch_size: 2\ndatasets:\n  - path: chats.jsonl\nwandb_project: x\n")
    return path


def test_ours_is_printed_or_written_and_the_rest_is_named(theirs, tmp_path, capsys):
    main(["convert", str(theirs)])
    printed = capsys.readouterr()
    expected = {"model_name_or_path": "org/base", "per_device_train_batch_size": 2, "dataset_name": "chats.jsonl"}
    expected |= {"packing": False, "eval_share": 0}
    assert yaml.safe_load(printed.out) == expected and printed.out.startswith(
        "# axolotl, as hf-objectives sft --config"
    )
    assert printed.err == f"{theirs}, line 5: wandb_project: has no match here\n"
    main(["convert", str(theirs), "--output", str(tmp_path / "ours.yaml")])
    assert yaml.safe_load((tmp_path / "ours.yaml").read_text()) == expected and capsys.readouterr().out == ""


def test_json(theirs, capsys):
    main(["convert", str(theirs), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tool"] == "axolotl" and {*found["rest"]} == {"wandb_project"}


def test_a_config_of_trl_needs_no_conversion(tmp_path, refused):
    (tmp_path / "trl.yaml").write_text("dataset_name: x\n")
    with refused("ConfigError: .* one of TRL's runs as it is: hf-objectives sft --config"):
        main(["convert", str(tmp_path / "trl.yaml")])
    with refused("ConfigError: cannot read the config nowhere"):
        main(["convert", "nowhere"])
