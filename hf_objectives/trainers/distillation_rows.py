"""The rows of distillation: a prompt for the student to answer, and the ids and labels of the answers that a row has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from hf_objectives.errors import ConfigError, DataError, FormatError
from hf_objectives.labels import encode_row, to_example, to_prompt
from hf_objectives.types import IGNORE_INDEX, Row


class Parts(NamedTuple):
    """Ids of a row in the two parts that TRL's batches have.

    Attributes:
        prompt: the ids before the first trained token, at least one.
        completion: those up to the last trained token.
        trained: 0 or 1 for each id of the completion.
    """

    prompt: list[int]
    completion: list[int]
    trained: list[int]


def parts_of(input_ids: list[int], labels: list[int]) -> Parts:
    """Split an encoded row before its first trained token, and leave out what follows the last one.

    The first id of a row is predicted from nothing, so that it is prompt. Of a row that trains nothing the last id is an
    untrained completion.
    """
    places = [i for i, label in enumerate(labels) if label != IGNORE_INDEX and i] or [max(1, len(labels) - 1)]
    begin, end = places[0], places[-1] + 1
    return Parts(input_ids[:begin], input_ids[begin:end], [int(label != IGNORE_INDEX) for label in labels[begin:end]])


def without_nulls(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without the null keys that an Arrow table gives each of its messages, tool calls included."""
    messages: Any = to_prompt({"prompt": prompt})
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def has_answer(row: Row, *, source: str | None = None, row_index: int | None = None) -> bool:
    """Whether a row holds what the student is to say: a text, a completion, an assistant's turn, or ids."""
    if row.get("input_ids") is not None:
        return True
    for name in ("image", "images"):  # columns that TRL reads beside a prompt
        if row.get(name) is not None:
            raise FormatError(f"column {name!r}: pictures are not supported, text only", source=source, row=row_index)
    if row.get("prompt") is not None and all(row.get(name) is None for name in ("completion", "chosen", "rejected")):
        return False
    try:
        example = to_example(row)
    except DataError as error:
        raise error.at(source=source, row=row_index) from None
    return example.is_plain or any(turn.get("role") == "assistant" for turn in example.messages)


def encode_distillation_row(
    tokenizer: Any, row: Row, *, lmbda: float, source: str | None = None, row_index: int | None = None, **options: Any
) -> dict[str, Any]:
    """One row of any format as `PerplexityDistillationTrainer` takes it; a row that it made stays as it is.

    Args:
        tokenizer: a fast transformers tokenizer, the student's.
        row: a mapping of column names to values.
        lmbda: share of steps on the student's own answers.
        source, row_index: name and number of the row, for errors.
        options: see `encode_row`.

    Returns:
        `prompt`, text or messages, unless `lmbda` is 0; `input_ids` and `labels` where the row has an answer.

    Raises:
        DataError: a row without the prompt or the answer that `lmbda` asks for, or that cannot be used; names source and row.
    """
    made: dict[str, Any] = {}
    if lmbda:
        made["prompt"] = to_prompt(row, source=source, row_index=row_index)
    if has_answer(row, source=source, row_index=row_index):
        made |= encode_row(tokenizer, row, source=source, row_index=row_index, **options)
    elif lmbda < 1:
        raise FormatError(
            f"the row is a prompt without an answer, and lmbda is {lmbda}; expected rows with answers, or lmbda=1",
            source=source,
            row=row_index,
        )
    return made


def read_rows(dataset: Any, name: str, tokenizer: Any, args: Any) -> Any:
    """Encode rows by `encode_distillation_row`, and number them in `row`.

    Args:
        dataset: a Dataset, an IterableDataset, a list of rows, or a mapping of names to these; None stays None.
        name: what errors call it.
        tokenizer: the student's.
        args: a `PerplexityDistillationConfig`.

    Raises:
        ConfigError: no rows.
        DataError: see `encode_distillation_row`; or rows of two kinds.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {key: read_rows(rows, f"{name} {key}", tokenizer, args) for key, rows in dataset.items()}
    if isinstance(dataset, str) or not hasattr(dataset, "__iter__"):
        raise ConfigError(
            f"{name} is {type(dataset).__name__}; expected a Dataset, an IterableDataset or a list of rows"
        )
    if isinstance(dataset, Dataset) and _is_read(dataset, tokenizer, args.lmbda):
        return dataset
    first = next(iter(dataset), None)
    if first is None:
        raise ConfigError(f"{name} has no rows; expected prompts, chats or texts")
    options = {
        "lmbda": args.lmbda,
        "source": name,
        "max_length": args.max_length,
        "train_on": args.train_on,
        "control_tokens": args.control_tokens,
        "template_kwargs": args.chat_template_kwargs,
    }
    kind = _kind(encode_distillation_row(tokenizer, first, row_index=0, **options))
    settings = {"tokenizer": tokenizer, "kind": kind, "options": options}
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return Dataset.from_list([_read(row, i, **settings) for i, row in enumerate(dataset)])
    with args.main_process_first(desc=f"encoding {name}"):
        return dataset.map(_read, with_indices=True, fn_kwargs=settings, remove_columns=list(first))


def _is_read(dataset: Dataset, tokenizer: Any, lmbda: float) -> bool:
    """Whether a dataset is one of rows that were read, with ids of this tokenizer."""
    made = {
        "row",
        *(["prompt"] if lmbda else []),
        *(["input_ids", "labels"] if "input_ids" in dataset.features else []),
    }
    if {*dataset.features} - {"source"} != made or (lmbda < 1 and "input_ids" not in made) or not len(dataset):
        return False
    ids = dataset.data.column("input_ids") if "input_ids" in made else None
    return ids is None or (pc.max(pc.list_flatten(ids)).as_py() or 0) < len(tokenizer)


def _read(row: Row, index: int, *, tokenizer: Any, kind: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    made = encode_distillation_row(tokenizer, row, row_index=index, **options)
    if (found := _kind(made)) != kind:
        raise FormatError(
            f"the row gives {' and '.join(found)} among rows that give {' and '.join(kind)}; expected rows of one kind",
            source=options["source"],
            row=index,
        )
    return {**made, "row": row.get("row", index)}


def _kind(made: Row) -> list[str]:
    prompt = ["a prompt of text" if isinstance(made["prompt"], str) else "a conversation"] if "prompt" in made else []
    return [*prompt, *(["an answer"] if "input_ids" in made else ["no answer"])]
