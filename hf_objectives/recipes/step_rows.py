"""Which rows made a step of a recipe's run, found again from its settings and its checkpoints. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import islice
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
from hf_objectives.recipes.models import load_tokenizer
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import OrderedStreamCallback
from hf_objectives.types import check_one_of

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

    The order of the rows follows from the seed, the settings in `environment.json` and the state of the checkpoint before
    the step. So the data has to be where it was, as it was. Conversations and pairs are encoded again.

    Args:
        run: the output folder of a recipe, or one of its checkpoints.
        step: the number of the step, from 1, as logs have it.
        text: decode the documents as well.

    Raises:
        ConfigError: a step that the run does not have, data that has changed since, or an order that cannot be told.
        FileFormatError: the folder has no `environment.json` of a recipe.
    """
    folder = Path(run)
    folder = folder if (folder / ENVIRONMENT).exists() else folder.parent
    environment = _read(folder, run)
    states = {state.global_step: state for state in _states(folder)}
    last = max(states, default=0)
    most = states[last].max_steps if states else step
    if not 1 <= step <= most:
        raise ConfigError(f"step is {step}; the run in {folder} has steps 1 to {most}")
    recipe, tokenizer = _load(folder, environment["settings"], states)
    order = _streamed if isinstance(recipe.train_rows, OrderedStream) else _mapped
    rows = order(recipe.train_rows, step, environment, states)
    return [document for row in rows for document in _documents(row, tokenizer if text else None)]


def _read(folder: Path, asked: str | Path) -> dict[str, Any]:
    try:
        environment = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"no {ENVIRONMENT} can be read in {asked}; expected the output folder of a recipe"
        ) from error
    if "recipe" not in environment.get("settings", {}):
        raise FileFormatError(
            f"{folder / ENVIRONMENT} names no recipe; expected one that a recipe of this version wrote"
        )
    check_one_of("recipe", environment["settings"]["recipe"], _RECIPES)
    environment["world_size"] //= environment["settings"]["copies_of_rows"]  # those that read rows of their own
    return environment


def _states(folder: Path) -> Iterator[TrainerState]:
    for path in [*folder.glob(f"checkpoint-*/{_STATE}"), folder / _STATE]:
        if path.exists():
            yield TrainerState.load_from_json(str(path))


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
    if recipe.rows_digest != settings["rows_digest"]:
        raise ConfigError(
            f"the rows are not those that {folder} was trained on; the data, the tokenizer, or a package that prepares rows "
            "has changed since"
        )
    return recipe, tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").exists()


def _streamed(
    stream: OrderedStream, step: int, environment: Mapping[str, Any], states: Mapping[int, Any]
) -> Iterator[Mapping[str, Any]]:
    """The rows of a step of a stream, from the state of the checkpoint before it."""
    settings = environment["settings"]
    places = {0: stream.state_dict(0)}
    for done in sorted(states):
        place = states[done].stateful_callbacks.get(OrderedStreamCallback.state_name)
        if place is None:
            raise ConfigError(f"the state of step {done} does not say where its stream stood")
        stream.load_state_dict(place)  # refuses the state of another mixture
        places[done] = place
    before = max(done for done in places if done < step)
    after = min((done for done in places if done >= step), default=None)
    together = (
        settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * environment["world_size"]
    )
    if after is not None:
        together, rest = divmod(places[after]["row"] - places[before]["row"], after - before)
        if rest:
            raise ConfigError(
                f"steps {before + 1} to {after} took different numbers of rows; the run was resumed with another batch size"
            )
    stream.load_state_dict(places[before])
    begin = places[before]["row"] + (step - 1 - before) * together
    return stream.rows(begin, begin + together)


def _mapped(
    rows: Any, step: int, environment: Mapping[str, Any], states: Mapping[int, Any]
) -> Iterator[Mapping[str, Any]]:
    """The rows of a step of a dataset, in the order of the Trainer's sampler."""
    settings, world = environment["settings"], environment["world_size"]
    batch_size = next((s.train_batch_size for s in states.values() if s.train_batch_size), None)
    loaders = [
        _loader(len(rows), batch_size or settings["per_device_train_batch_size"], settings, world, rank)
        for rank in range(world)
    ]
    accumulated, length = settings["gradient_accumulation_steps"], len(loaders[0])
    steps = max(1, -(-length // accumulated))  # of an epoch; its last one may have fewer batches
    for done, state in states.items():
        epoch, within = divmod(done, steps)
        expected = epoch + min(within * accumulated, length) / length
        if state.epoch is not None and abs(state.epoch - expected) > 1e-6:
            raise ConfigError(
                f"the checkpoint of step {done} is at epoch {state.epoch:.6g}, and batches of the last launch would be at "
                f"{expected:.6g}; the run was resumed with another batch size or number of processes"
            )
    epoch, within = divmod(step - 1, steps)
    batches = []
    for loader in loaders:
        loader.set_epoch(epoch)
        batches.append(list(islice(loader.batch_sampler, within * accumulated, (within + 1) * accumulated)))
    numbers = [number for at_once in zip(*batches, strict=True) for batch in at_once for number in batch]
    return (rows[number] for number in numbers)


def _loader(count: int, batch_size: int, settings: Mapping[str, Any], world: int, rank: int) -> Any:
    """The loader of one rank as the Trainer makes it, over row numbers."""
    strategy, config = settings["train_sampling_strategy"], settings["accelerator_config"]
    if strategy not in ("random", "sequential") or not config["use_seedable_sampler"] or settings["ignore_data_skip"]:
        raise ConfigError(
            f"train_sampling_strategy={strategy!r}, use_seedable_sampler={config['use_seedable_sampler']}, ignore_data_skip="
            f"{settings['ignore_data_skip']}: the order of such a run depends on more than its seed and step, so that it "
            "cannot be told afterwards"
        )
    numbers: Any = range(count)
    sampler = RandomSampler(numbers) if strategy == "random" else SequentialSampler(numbers)
    seed = settings["seed"] if settings["data_seed"] is None else settings["data_seed"]
    return prepare_data_loader(
        DataLoader(numbers, batch_size, sampler=sampler, drop_last=settings["dataloader_drop_last"]),
        *(torch.device("cpu"), world, rank),
        split_batches=config["split_batches"],
        even_batches=config["even_batches"],
        dispatch_batches=False,
        use_seedable_sampler=True,
        data_seed=seed,
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
