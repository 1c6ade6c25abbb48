"""The rows of distillation: a prompt for the student to answer, and the ids and labels of the answers that a row has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from hf_objectives.errors import ConfigError, DataError, FormatError
from hf_objectives.labels import Kind, encode_row, to_example, to_prompt
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


def has_answer(row: Row, *, source: str | None = None) -> bool:
    """Whether a row holds what the student is to say: a text, a completion, an assistant's turn, or ids."""
    for name in ("image", "images"):  # columns that TRL reads beside a prompt
        if row.get(name) is not None:
            raise FormatError(f"column {name!r}: rows with pictures are not supported, text only", source=source, row=0)
    if row.get("prompt") is not None and all(row.get(name) is None for name in ("completion", "chosen", "rejected")):
        return False
    try:
        example = to_example(row)
    except DataError as error:
        raise error.at(source=source, row=0) from None
    is_chat = example.kind is not Kind.TOKENS and not example.is_plain
    return not is_chat or any(turn.get("role") == "assistant" for turn in example.messages)


def read_rows(dataset: Any, name: str, tokenizer: Any, args: Any) -> Any:
    """Read rows of any format: to `prompt` and `row`, and to `input_ids` and `labels` where they have answers.

    Args:
        dataset: a Dataset, an IterableDataset, a list of rows, or a mapping of names to these; None stays None.
        name: what errors call it.
        tokenizer: the student's.
        args: a `PerplexityDistillationConfig`.

    Raises:
        ConfigError: no rows, or rows without the answers that `lmbda` asks for.
        DataError: a row that cannot be used; names dataset and row. Rows with and without answers in one dataset.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {key: read_rows(rows, f"{name} {key}", tokenizer, args) for key, rows in dataset.items()}
    if isinstance(dataset, str) or not hasattr(dataset, "__iter__"):
        raise ConfigError(
            f"{name} is {type(dataset).__name__}; expected a Dataset, an IterableDataset or a list of rows"
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ConfigError(f"{name} has no rows; expected prompts, chats or texts")
    answered = has_answer(first, source=name)
    if not answered and args.lmbda < 1:
        raise ConfigError(
            f"lmbda is {args.lmbda} and the first row of {name} is a prompt without an answer; expected rows with answers, "
            "or lmbda=1"
        )
    options = {
        "tokenizer": tokenizer,
        "asks": str if args.lmbda and isinstance(to_prompt(first, source=name, row_index=0), str) else bool(args.lmbda),
        "answered": answered,
        "source": name,
        "encoding": {
            "max_length": args.max_length,
            "train_on": args.train_on,
            "control_tokens": args.control_tokens,
            "template_kwargs": args.chat_template_kwargs,
        },
    }
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return Dataset.from_list([_read(row, i, **options) for i, row in enumerate(dataset)])
    with args.main_process_first(desc=f"encoding {name}"):
        return dataset.map(_read, with_indices=True, fn_kwargs=options, remove_columns=list(first))


def _read(
    row: Row, index: int, *, tokenizer: Any, asks: Any, answered: bool, source: str, encoding: Mapping[str, Any]
) -> dict[str, Any]:
    made: dict[str, Any] = {"row": index}
    if asks:
        prompt = to_prompt(row, source=source, row_index=index)
        if isinstance(prompt, str) != (asks is str):
            kinds = ("text", "a conversation") if isinstance(prompt, str) else ("a conversation", "text")
            raise FormatError(f"the prompt is {kinds[0]} among prompts that are {kinds[1]}", source=source, row=index)
        made["prompt"] = prompt
    if answered:
        if not has_answer(row, source=source):
            raise FormatError(
                "the row has no answer, and the first row has; expected one kind", source=source, row=index
            )
        made |= encode_row(tokenizer, row, source=source, row_index=index, **encoding)
    return made
