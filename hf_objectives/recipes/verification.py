"""Measure the figures of a published model again, and say of each whether it holds."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from hf_objectives.errors import ConfigError
from hf_objectives.publishing import card_figures, card_table, figure_of_card
from hf_objectives.recipes.arguments import parse_config
from hf_objectives.recipes.evaluated import checksums, read_evaluated, rows_checksum, sha256
from hf_objectives.trainers import CARD, CARD_FILES, MODEL_FILES, reason_of
from hf_objectives.types import parse_json

_EXACT, _ROUNDED = 1e-6, 1e-2  # relative; the second for runs in half precision
#: Settings beside those of the data that a figure may follow from. A stranger wrote them: none of these runs code, logs in,
#: pushes, or writes anywhere.
_TRAINING = (
    "seed data_seed bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu dtype max_length train_on control_tokens max_steps "
    "max_tokens num_train_epochs per_device_eval_batch_size per_device_train_batch_size beta loss_type label_smoothing "
    "padding_free center_rewards_coefficient"
).split()
#: Of the data: what the saved tokenizer has by now, tasks, which may run code of their folder, and where rows are prepared.
_NOT_READ = ("chat_template eval_tasks eval_tasks_folder eval_tasks_steps eval_tasks_limit prepared_dir engine").split()
_NOT_MEASURED = "not measured"
_PATHS = ("dataset_name", "mixture", "sources", "lm_datasets", "prepared")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: of a figure or a file.
        published: what the model says of itself.
        found: what was found.
        holds: whether they are the same, up to rounding.
    """

    name: str
    published: Any
    found: Any
    holds: bool


def verify(
    where: str,
    *,
    revision: str | None = None,
    data_dir: str | None = None,
    use_cpu: bool | None = None,
    trust_remote_code: bool = False,
) -> list[Check]:
    """Check weights, template and held-out rows against their checksums, and measure every published figure again.

    The figures of the card's metadata and of its table are compared with the run's. In float32 the run's have to agree with
    those measured now to 1e-6 of their size, in half precision to 1e-2. One that cannot be measured again does not hold.

    Args:
        where: the folder of a run, or a repository of the Hub.
        revision: branch, tag or commit of a repository.
        data_dir: where the local files lie that the run was evaluated on.
        use_cpu: whether to measure on the CPU; None as the run was.
        trust_remote_code: whether to run code of the repository; its own settings do not decide that.

    Raises:
        ConfigError: there is nothing to verify, or the held-out rows cannot be made again.
    """
    folder = _folder(where, revision)
    try:
        facts = read_evaluated(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    sums, template = checksums(folder), sha256(str(_tokenizer(folder, trust_remote_code).chat_template))
    checks = [_same(f"file {name}", digest, sums.get(name, "missing")) for name, digest in facts["weights"].items()]
    checks.append(_same("chat template", facts["chat_template"], template))
    if (folder / CARD).is_file():  # which shows the figures of the run
        shown = card_figures(folder / CARD)
        for name, cell in card_table(folder / CARD).items():
            figure = figure_of_card(facts["figures"].get(name))
            checks.append(Check(f"card's table, {name}", cell, figure, cell == figure))
        checks += [
            _close(f"card, {name}", value, facts["figures"].get(name, math.nan), 1e-9) for name, value in shown.items()
        ]
    options = {"trust_remote_code": trust_remote_code, **({} if use_cpu is None else {"use_cpu": use_cpu})}
    recipe = _recipe(str(facts["recipe"]))
    measured, rows = _measure(recipe, folder, facts["settings"], data_dir, options)
    if facts["rows"] is not None:
        checks.append(_same("held-out rows", facts["rows"], str(rows)))
    bound = _EXACT if facts["mixed_precision"] == "no" else _ROUNDED
    for name, figure in facts["figures"].items():
        if name in measured:
            checks.append(_close(name, figure, measured[name], bound))
        elif re.fullmatch(recipe.of_model_alone, name):
            checks.append(Check(name, figure, _NOT_MEASURED, holds=False))
    return checks


def _same(name: str, published: str, found: str) -> Check:
    return Check(name, published[:12], found[:12], published == found)


def _close(name: str, published: float, found: float, bound: float) -> Check:
    return Check(name, published, found, math.isclose(published, found, rel_tol=bound, abs_tol=1e-9))


def _folder(where: str, revision: str | None) -> Path:
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, revision=revision, allow_patterns=[*MODEL_FILES, *CARD_FILES, "*.py"]))
    except Exception as error:
        raise ConfigError(f"{where} is no folder, and cannot be loaded from the Hub ({reason_of(error)})") from error


def _measure(
    recipe: Any, folder: Path, given: Mapping[str, Any], data_dir: str | None, options: Mapping[str, Any]
) -> tuple[dict[str, float], Any]:
    """The figures of the model as it is now, those that follow from it alone; and the checksum of its held-out rows."""
    known = {*_TRAINING, *(option.name for option in fields(recipe.arguments[1]))} - {*_NOT_READ}
    settings = {name: value for name, value in given.items() if name in known}
    settings |= {"model_name_or_path": str(folder), "report_to": "none", "eval_strategy": "no", **options}
    _check_base(folder)
    for name in _PATHS:
        if name in settings:
            settings[name] = _found_data(settings[name], Path(data_dir or "."))
    with tempfile.TemporaryDirectory() as scratch:
        # As a file, in which no value can pose as another option.
        config = Path(scratch) / "settings.yaml"
        config.write_text(yaml.safe_dump({**settings, "output_dir": scratch}), encoding="utf-8")
        configs, origin = parse_config(recipe.arguments, ["--config", str(config)])
        run = recipe(*configs, origin)
        trainer = run.build_trainer()
        measured = run.evaluate(trainer)
        rows = rows_checksum(trainer.eval_dataset)
    alone = re.compile(recipe.of_model_alone)
    return {name: value for name, value in measured.items() if alone.fullmatch(name)}, rows


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {folder} ({reason_of(error)})") from error


def _check_base(folder: Path) -> None:
    """Refuse an adapter without the model that it was trained on."""
    path = folder / "adapter_config.json"
    if path.is_file() and not parse_json(path.read_bytes()).get("base_model_name_or_path"):
        raise ConfigError(
            f"{path} names no base model, so that nobody can load the adapter; train it on a model of the Hub, or of a folder"
        )


def _recipe(name: str) -> Any:
    try:
        recipe = import_module(f"hf_objectives.recipes.{name}").main.__self__
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the model was trained by {name!r}, which is no recipe of this release") from error
    if not recipe.of_model_alone:
        raise ConfigError(
            f"figures of {name} are of sampled answers, or of a second model; they cannot be measured from this one alone"
        )
    return recipe


def _found_data(value: Any, folder: Path) -> Any:
    """A setting that names data, with its local files where they lie now."""
    if isinstance(value, Mapping):
        return {name: _found_data(inner, folder) for name, inner in value.items()}
    return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value
