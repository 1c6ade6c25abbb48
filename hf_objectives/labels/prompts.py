"""Find the prompt of a row of any format: what a policy answers when it is trained by reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from hf_objectives.errors import ConfigError, DataError, FormatError
from hf_objectives.labels.conversation import Message, common_turns, role_of
from hf_objectives.labels.formats import Kind, to_example
from hf_objectives.types import Row

_ASKING = ("user", "tool")


def to_prompt(row: Row, *, source: str | None = None, row_index: int | None = None) -> str | list[Message]:
    """The prompt of a row: text, or a conversation that waits for an answer.

    Of a row with `prompt`, that; of a conversation (`messages`, ShareGPT, Alpaca), what comes before its last answer; of a
    preference row, what both sides have in common; of a plain prompt and completion, the prompt.

    Args:
        row: a mapping of column names to values.
        source, row_index: name and number of the row, for errors.

    Raises:
        FormatError: no prompt in the row, an empty one, one that waits for no answer, or tools, which TRL's RLOOTrainer
            does not hand to the template.
        ConversationError: a malformed conversation.
    """
    try:
        prompt = _read(row)
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise FormatError("the prompt is empty; expected text, or messages up to the turn that is to be answered")
        if not isinstance(prompt, str):
            _check_turns(prompt)
    except DataError as error:
        raise error.at(source=source, row=row_index) from None
    return prompt


def _read(row: Row) -> str | list[Message]:
    if row.get("tools"):
        raise FormatError("tools are not supported here: generation does not hand them to the chat template")
    prompt = row.get("prompt")
    if prompt is not None and row.get("chosen") is None and row.get("completion") is None:
        return prompt if isinstance(prompt, str) else to_example({"messages": prompt}, format="messages").messages
    example = to_example(row)
    if example.kind is Kind.TEXT or example.kind is Kind.TOKENS:
        raise FormatError(f"a row of {example.kind} has no prompt; expected prompt, or a conversation")
    if example.is_plain:
        return example.text[: example.prompt_chars]
    if example.kind is Kind.PREFERENCE:
        end = common_turns(example.messages, example.rejected)
    else:
        end = 1 + max((i for i, turn in enumerate(example.messages) if role_of(turn) in _ASKING), default=-1)
    return [_without_training(turn) for turn in example.messages[:end]]


def _without_training(turn: Any) -> Any:
    return {k: v for k, v in turn.items() if k not in ("train", "weight")} if isinstance(turn, Mapping) else turn


def _check_turns(prompt: list[Message]) -> None:
    for turn, message in enumerate(prompt):
        if not isinstance(role_of(message), str):
            raise FormatError(f"message {turn} of the prompt is {message!r:.80}; expected role and content")
    if prompt[-1]["role"] not in _ASKING:
        raise FormatError(
            f"the prompt ends with a turn of {prompt[-1]['role']}; expected one of {' or '.join(_ASKING)}"
        )


def with_prompts(dataset: Any, name: str) -> Any:
    """Add each row's prompt in a column `prompt`, all text or all conversations, and its number in a column `row`.

    Args:
        dataset: a Dataset, an IterableDataset, a list of rows, or a mapping of names to these; None stays None.
        name: what errors call it.

    Raises:
        ConfigError: no dataset.
        FormatError: see `to_prompt`; or text among conversations.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping):
        return {key: with_prompts(rows, f"{name} {key}") for key, rows in dataset.items()}
    if not isinstance(dataset, (Dataset, IterableDataset)):
        if isinstance(dataset, str) or not hasattr(dataset, "__iter__"):
            raise ConfigError(
                f"{name} is {type(dataset).__name__}; expected a Dataset, an IterableDataset or a list of rows"
            )
        rows = [dict(row) for row in dataset]
        columns = list(dict.fromkeys(key for row in rows for key in row))  # from_list knows those of the first row only
        dataset = Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])
    kinds: list[str] = []

    def read(row: dict[str, Any], i: int) -> dict[str, Any]:
        prompt = to_prompt(row, source=name, row_index=i)
        kinds.append("text" if isinstance(prompt, str) else "a conversation")
        if kinds[-1] != kinds[0]:
            raise FormatError(f"the prompt is {kinds[-1]} among prompts that are {kinds[0]}", source=name, row=i)
        del kinds[1:]
        return {"prompt": prompt, "row": row.get("row", i)}

    return dataset.map(read, with_indices=True)
