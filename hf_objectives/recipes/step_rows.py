"""Which rows made a step of a recipe's run, found again from its settings and its checkpoints. No model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import islice, zip_longest
from operator import mul
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import AutoTokenizer, TrainerState

from hf_objectives.diagnostics import marked_text
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.inspection import ENVIRONMENT
from hf_objectives.preparation import OrderedStream
from hf_objectives.recipes.launch import Launches, LaunchRecord, state_of
from hf_objectives.recipes.models import load_tokenizer
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import OrderedStreamCallback
from hf_objectives.types import check_one_of, parse_json

_RECIPES = ("sft", "pretrain", "dpo", "reward")
_STATE = "trainer_state.json"
_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True, slots=True)
class StepRow:
    """A document that a step was trained on; a packed row has several, and a long document stands in several rows.

    `row` is its number in the source, from 0. `tokens` are those that the step read. `text` has trained parts in ⟦ and ⟧; it
    is empty unless it was asked for.
    """

    source: str | None
    row: int | None
    tokens: int
    text: str


def rows_of_step(run: str | Path, step: int, *, text: bool = False) -> list[StepRow]:
    """Find the rows that a step of a run was trained on, on all ranks, in the order in which they were read.

    The order of the rows follows from what each launch wrote into `environment.json` (see `LaunchRecord`) and the state of
    the checkpoint before the step. So the data has to be where it was, as it was. Conversations and pairs are encoded again.

    Args:
        run: the output folder of a recipe, or one of its checkpoints.
        step: the number of the step, from 1, as logs have it.
        text: decode the documents as well.

    Raises:
        ConfigError: a step that the run does not have, data that has changed since, or an order that cannot be told.
        FileFormatError: the folder has no `environment.json` of a recipe.
    """
    folder = Path(run)
    folder = folder.parent if folder.name.startswith("checkpoint-") else folder
    settings = _read(folder, run)
    launches = settings["launches"]
    if folder != Path(run) and state_of(Path(run) / _STATE, launches) is None:
        raise ConfigError(f"{run} is no checkpoint of the last run in {folder}; give the folder, or one that is")
    if not 1 <= step <= launches[-1]["max_steps"]:
        raise ConfigError(f"step is {step}; the run in {folder} has steps 1 to {launches[-1]['max_steps']}")
    if step <= launches[0]["begin"]:
        raise ConfigError(
            f"step {step} came before the checkpoint of step {launches[0]['begin']}, which does not say how it was made"
        )
    states = _states(folder, launches)
    recipe, tokenizer = _load(folder, settings, states)
    if isinstance(recipe.train_rows, OrderedStream):
        before = max((done for done in states if done < step), default=0)
        _check_rows(folder, recipe, [launch for launch, steps in _steps(launches, before, step) if steps])
        rows = _streamed(recipe.train_rows, step, launches, before, states.get(before))
    else:
        launch = next(launch for launch, steps in _steps(launches, step - 1, step) if steps)
        _check_rows(folder, recipe, [launch])
        rows = _mapped(recipe.train_rows, step, launch)
    return [document for row in rows for document in _documents(row, tokenizer if text else None)]


def _read(folder: Path, asked: str | Path) -> dict[str, Any]:
    """The settings of the last launch, and what all launches wrote down."""
    try:
        settings = parse_json((folder / ENVIRONMENT).read_bytes())["settings"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileFormatError(
            f"no {ENVIRONMENT} can be read in {asked}; expected the output folder of a recipe"
        ) from error
    if "recipe" not in settings or not settings.get(LaunchRecord.state_name):
        raise FileFormatError(
            f"{folder / ENVIRONMENT} names no recipe and its launches; expected one that a recipe of this version wrote"
        )
    check_one_of("recipe", settings["recipe"], _RECIPES)
    return settings


def _states(folder: Path, launches: Launches) -> dict[int, TrainerState]:
    """The states that these launches wrote, by step."""
    found = (state_of(path, launches) for path in [*folder.glob(f"checkpoint-*/{_STATE}"), folder / _STATE])
    return {state.global_step: state for state in found if state is not None}


def _steps(launches: Launches, done: int, last: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Each launch with the number of steps that it made after step `done`, up to step `last`."""
    ends = [*(launch["begin"] for launch in launches[1:]), last]
    for launch, end in zip(launches, ends, strict=True):
        yield launch, max(0, min(end, last) - max(launch["begin"], done))


def _check_rows(folder: Path, recipe: Recipe, launches: Launches) -> None:
    if any(launch["rows_digest"] != recipe.rows_digest for launch in launches):
        raise ConfigError(
            f"the rows are not those that {folder} was trained on; the data, the tokenizer, a setting of the mixture, or a "
            "package that prepares rows has changed since, or the run was resumed with other rows"
        )


def _load(folder: Path, settings: Mapping[str, Any], states: Mapping[int, Any]) -> tuple[Recipe, Any]:
    """The recipe with its rows, and the tokenizer."""
    name = settings["recipe"]
    recipe_class = getattr(import_module(f"hf_objectives.recipes.{name}"), name.capitalize())
    data_class = recipe_class.arguments[1]
    given = {f.name: settings[f.name] for f in fields(data_class) if f.init and f.name in settings}
    saved = [path for path in (folder, *(folder / f"checkpoint-{step}" for step in states)) if _has_tokenizer(path)]
    if saved:
        tokenizer = AutoTokenizer.from_pretrained(saved[0])
        given["chat_template"] = None  # it is in the tokenizer
    else:
        tokenizer = load_tokenizer(settings.get("tokenizer_name") or settings["model_name_or_path"])
    args = SimpleNamespace(**{**settings, "output_dir": str(folder), "device": torch.device("cpu")})
    recipe = recipe_class(None, data_class(**given), args, {})
    recipe.reads_again = True
    recipe.load_rows(tokenizer)
    return recipe, tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists()


def _streamed(
    stream: OrderedStream, step: int, launches: Launches, before: int, state: TrainerState | None
) -> Iterator[Mapping[str, Any]]:
    """The rows of a step of a stream, from the state of the checkpoint before it; None for the beginning."""
    if state is not None:
        places: Any = state.stateful_callbacks
        stream.load_state_dict(places[OrderedStreamCallback.state_name])
    sizes = [launch["batch_size"] * launch["accumulated"] * launch["readers"] for launch in launches]
    done = [steps for _, steps in _steps(launches, before, step - 1)]
    own = [steps for _, steps in _steps(launches, step - 1, step)]
    begin = stream.state_dict()["row"] + sum(map(mul, sizes, done))
    return stream.rows(begin, begin + sum(map(mul, sizes, own)))


def _mapped(rows: Any, step: int, launch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of a step of a dataset, in the order of the Trainer's sampler."""
    loaders = [_loader(len(rows), launch, rank) for rank in range(launch["readers"])]
    accumulated = launch["accumulated"]
    steps = max(1, -(-len(loaders[0]) // accumulated))  # of an epoch; its last one may have fewer batches
    epoch, within = divmod(step - 1, steps)
    batches = []
    for loader in loaders:
        loader.set_epoch(epoch)
        batches.append(list(islice(loader.batch_sampler, within * accumulated, (within + 1) * accumulated)))
    # Without even_batches a rank may have one less.
    numbers = [number for at_once in zip_longest(*batches, fillvalue=()) for batch in at_once for number in batch]
    return (rows[number] for number in numbers)


def _loader(count: int, launch: Mapping[str, Any], rank: int) -> Any:
    """The loader of one rank as the Trainer makes it, over row numbers."""
    strategy, seedable, no_skip = (launch[name] for name in ("sampling", "use_seedable_sampler", "ignore_data_skip"))
    if strategy not in ("random", "sequential") or not seedable or no_skip:
        raise ConfigError(
            f"train_sampling_strategy={strategy!r}, use_seedable_sampler={seedable}, ignore_data_skip={no_skip}: the order "
            "of such a run depends on more than its seed and step, so that it cannot be told afterwards"
        )
    numbers: Any = range(count)
    sampler = RandomSampler(numbers) if strategy == "random" else SequentialSampler(numbers)
    return prepare_data_loader(
        DataLoader(numbers, launch["batch_size"], sampler=sampler, drop_last=launch["drop_last"]),
        *(torch.device("cpu"), launch["readers"], rank),
        split_batches=launch["split_batches"],
        even_batches=launch["even_batches"],
        dispatch_batches=False,
        use_seedable_sampler=True,
        data_seed=launch["seed"],
    )


def _documents(row: Mapping[str, Any], tokenizer: Any) -> Iterator[StepRow]:
    """The documents of a row; without a tokenizer they have no text."""
    if "chosen_ids" in row:
        sides = {name: row[name] for name in _PAIR if name in row}
        texts = [f"{name[:-4]}: {tokenizer.decode(ids)}" for name, ids in sides.items()] if tokenizer else []
        yield StepRow(row["source"], row["row"], sum(map(len, sides.values())), "\n".join(texts))
        return
    ids = list(row["input_ids"])
    labels = ids if row.get("labels") is None else list(row["labels"])
    lengths = row.get("seq_lengths")
    lengths = [len(ids)] if lengths is None else list(lengths)
    sources = row.get("sources") or [row.get("source")] * len(lengths)
    numbers = row.get("rows") or [row.get("row")] * len(lengths)
    begin = 0
    for source, number, length in zip(sources, numbers, lengths, strict=True):
        part = slice(begin, begin + length)
        text = marked_text(tokenizer, ids[part], labels[part]) if tokenizer else ""
        yield StepRow(source, number, int(length), text)
        begin += length
