"""Write what a run's report shows beside its log: a few rows with their trained tokens marked, versions and settings."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_objectives.distributed import world_size
from hf_objectives.errors import DataError
from hf_objectives.inspection.token_texts import MASKS, marked_runs
from hf_objectives.types import IGNORE_INDEX

LABELS, ENVIRONMENT = "labels.json", "environment.json"
PACKAGES = ("hf_objectives", "torch", "transformers", "trl", "datasets", "accelerate", "peft")
# `max_tokens` and `label_keys` are no secrets, nor are the tokens of a vocabulary, such as `eos_token`.
_SECRET = re.compile(
    r"token$|key$|(?:^|[_\-. ])auth(?:$|[_\-. ]|orization|entication)"
    r"|bearer|pass(?:word|wd|phrase)|secret|credential",
    re.I,
)
_VOCABULARY = re.compile(r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask|stop|eot|eom|think|image|audio|video)_token$", re.I)
_SECRET_TEXTS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "(left out)"),
    (re.compile(r"\bBearer\s+\S+", re.I), "Bearer (left out)"),
    (re.compile(r"(?<=://)[^/\s?#]*@"), ""),  # user and password of an address
)


def save_label_preview(tokenizer: Any, rows: Iterable[Mapping[str, Any]], path: str | Path, most: int = 8) -> Path:
    """Write the first rows (`most`) as text, trained and untrained pieces apart. A report looks for `labels.json`.

    A row has `input_ids` and `labels` ([length], unshifted) or a mask of trained tokens, and `source` where known.

    Raises:
        DataError: a row has neither labels nor a mask, or not as many as tokens.
    """
    content = []
    for row in itertools.islice(rows, most):
        ids, labels = list(row["input_ids"]), _labels(row)
        if len(ids) != len(labels):
            raise DataError(f"a row has {len(ids)} input_ids and {len(labels)} labels; expected as many of both")
        content.append({"source": row.get("source"), "pieces": marked_runs(tokenizer, ids, labels)})
    return _write(path, content)


def _labels(row: Mapping[str, Any]) -> list[int]:
    """The labels of a row; where it has a mask instead, 1 for a trained token."""
    if row.get("labels") is not None:
        return [int(label) for label in row["labels"]]
    for name in MASKS:
        if row.get(name) is not None:
            return [1 if flag else IGNORE_INDEX for flag in row[name]]
    raise DataError(f"a row has the columns {sorted(row)}; expected labels or one of {', '.join(MASKS)}")


def save_environment(path: str | Path, args: Any = ()) -> Path:
    """Write versions, device, number of processes and settings as JSON, without secrets (`environment.json` for a report).

    Settings whose name says that they are secret (`hub_token`, `wandb_key`, `Authorization`), tokens of the Hub, and user
    and password in addresses are left out. `args` is a dataclass of settings, or several.
    """
    several = args if isinstance(args, Sequence) else [args]
    settings: dict[str, Any] = {}
    for config in several:
        settings |= without_secrets(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    content = {"versions": versions, "device": device, "world_size": world_size(), "settings": settings}
    return _write(path, content)


def without_secrets(value: Any) -> Any:
    """A setting as a JSON value without secrets, see `save_environment`; what JSON does not have becomes text."""
    if isinstance(value, enum.Enum):
        return without_secrets(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): without_secrets(inner) for key, inner in value.items() if not _is_secret(str(key))}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [without_secrets(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    for pattern, instead in _SECRET_TEXTS:
        text = pattern.sub(instead, text)
    return text


def _is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None and _VOCABULARY.search(name) is None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _write(path: str | Path, content: Any) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")  # ASCII, so that any text can be written
    return path
