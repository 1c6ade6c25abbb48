"""What a run keeps for its report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_objectives.errors import DataError
from hf_objectives.inspection.label_preview import save_environment, save_label_preview


class Letters:
    """A tokenizer of letters: token 0 is a."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize(
    "given", [{"labels": [-100, -100, 2, 3, -100]}, {"completion_mask": [0, 0, 1, 1, 0]}], ids=["labels", "mask"]
)
def test_pieces_change_where_training_begins_and_ends(tmp_path: Path, given: dict[str, Any]) -> None:
    row = {"input_ids": [0, 1, 2, 3, 4], "source": "x", **given}
    path = save_label_preview(Letters(), [row] * 9, tmp_path / "labels.json", most=2)
    pieces = [["ab", False], ["cd", True], ["e", False]]
    assert json.loads(path.read_text()) == [{"source": "x", "pieces": pieces}] * 2


def test_tensors_are_taken(tmp_path: Path) -> None:
    row = {"input_ids": torch.tensor([0, 1]), "labels": torch.tensor([-100, 1])}
    path = save_label_preview(Letters(), [row], tmp_path / "labels.json")
    assert json.loads(path.read_text())[0]["pieces"] == [["a", False], ["b", True]]


def test_rows_without_labels_or_with_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected labels or one of completion_mask"):
        save_label_preview(Letters(), [{"input_ids": [1]}], tmp_path / "labels.json")
    with pytest.raises(DataError, match="2 input_ids and 1 labels"):
        save_label_preview(Letters(), [{"input_ids": [1, 2], "labels": [1]}], tmp_path / "labels.json")


@dataclass
class Settings:
    """Some that JSON has, some that it has not, and secrets."""

    rate: float = 0.5
    folder: Path = Path("runs")
    hub_token: str = "hunter2"
    hf_token: str = "hunter2"
    huggingface_token: str = "hunter2"
    wandb_key: str = "hunter2"
    aws_access_key: str = "hunter2"
    private_key: str = "hunter2"
    bearer: str = "hunter2"
    eos_token: str = "<end>"
    max_tokens: int = 7
    label_keys: tuple[str, ...] = ("labels",)
    author: str = "someone"
    dataset: str = "s3://user:hunter2@host/data"
    command: str = "push --with hf_" + "hunter2" * 3
    nested: dict[str, Any] = field(
        default_factory=lambda: {
            "api_key": "hunter2",
            "kept": (1, None),
            "headers": {"Authorization": "hunter2", "X-Api-Key": "hunter2", "Accept": "text"},
            "proxy": ["Bearer hunter2"],
        }
    )


def test_the_environment_has_versions_and_settings_but_no_secrets(tmp_path: Path) -> None:
    path = save_environment(tmp_path / "new" / "environment.json", [Settings()])
    assert "hunter2" not in path.read_text()
    content = json.loads(path.read_text())
    assert content["settings"] == {
        "rate": 0.5,
        "folder": "runs",
        "eos_token": "<end>",
        "max_tokens": 7,
        "label_keys": ["labels"],
        "author": "someone",
        "dataset": "s3://host/data",
        "command": "push --with (left out)",
        "nested": {"kept": [1, None], "headers": {"Accept": "text"}, "proxy": ["Bearer (left out)"]},
    }
    assert content["versions"]["torch"] == version("torch") and content["world_size"] == 1
