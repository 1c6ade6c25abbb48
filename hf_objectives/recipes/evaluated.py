"""What a run writes so that anyone can measure its figures again: settings, figures, and checksums of what they rest on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_objectives import __version__
from hf_objectives.recipes.data import digest
from hf_objectives.trainers import EVALUATED, listed_files
from hf_objectives.types import parse_json

_WEIGHTS = ("*.safetensors",)
_KEYS = ("recipe", "settings", "figures", "weights", "chat_template", "rows", "mixed_precision")


def write_evaluated(
    folder: Path, recipe: str, settings: Mapping[str, Any], trainer: Any, after: Mapping[str, Any]
) -> None:
    """Write `evaluated.json` into the folder of a run.

    Args:
        folder: where the model was saved.
        recipe: the command's name.
        settings: those that were given, see `settings_to_show`.
        trainer: gives the held-out rows, whose checksum is written, and the tokenizer.
        after: the metrics of the trained model.
    """
    figures = {name: value for name, value in after.items() if isinstance(value, (int, float))}
    facts = {
        "version": __version__,
        **{"recipe": recipe, "settings": dict(settings), "figures": figures, "weights": checksums(folder)},
        "chat_template": sha256(str(trainer.processing_class.chat_template)),
        "rows": rows_checksum(trainer.eval_dataset),
        "mixed_precision": trainer.accelerator.mixed_precision,  # TRL's configs and accelerate's set it too
    }
    (folder / EVALUATED).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read_evaluated(folder: Path) -> dict[str, Any]:
    """What `write_evaluated` wrote.

    Raises:
        ValueError: it is not there, or is damaged.
    """
    path = folder / EVALUATED
    if not path.is_file():
        raise ValueError(f"{folder} has no {EVALUATED}; expected a model that a recipe has trained")
    facts = parse_json(path.read_bytes())
    if not isinstance(facts, dict) or not all(key in facts for key in _KEYS):
        raise ValueError(f"{path} is damaged; expected the keys {', '.join(_KEYS)}")
    return facts


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    found = {}
    for name in listed_files(folder, _WEIGHTS):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def rows_checksum(rows: Any) -> str | None:
    """A checksum of the held-out rows; None where they are no mapped dataset."""
    return digest(rows) if isinstance(rows, Dataset) else None


def sha256(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
