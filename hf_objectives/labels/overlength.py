"""Make several rows of one conversation: one per user turn, or as few of whole user turns as fit; put rows in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_objectives.labels.chat import Labelled
from hf_objectives.labels.conversation import Message, num_leading, role_of


def expand(messages: Sequence[Message]) -> list[list[Message]]:
    """One conversation per user turn: the assistant's answers to it are trained, all that comes before is context.

    For templates that drop the reasoning of earlier turns (Qwen3, DeepSeek, gpt-oss): each row's prompt is then exactly
    what the model sees at inference, and each answer keeps its reasoning. User turns without an answer give no row.
    Example: user A, assistant B, user C, assistant D becomes A B and A B C D; the second row trains D only.
    """
    asks = [i for i, message in enumerate(messages) if role_of(message) == "user"]
    if not asks:
        return [list(messages)]
    rows = []
    # What stands before the first question (a greeting of the assistant) belongs to the first row.
    for begin, end in itertools.pairwise([0, *asks[1:], len(messages)]):
        turn = messages[begin:end]
        if _answered(turn):
            context = [{**old, "train": False} if role_of(old) == "assistant" else old for old in messages[:begin]]
            rows.append([*context, *turn])
    return rows


def fitting_turns(
    messages: Sequence[Message], size: Callable[[list[Message]], int], max_length: int
) -> list[list[Message]]:
    """Conversations of whole user turns, as many as `size`, the tokens of a conversation, allows.

    Each begins with the system messages. One user turn alone may have more than `max_length` tokens.
    """
    n = num_leading(messages)
    head, body = list(messages[:n]), list(messages[n:])
    asks = [i for i, message in enumerate(body) if role_of(message) == "user"]
    rows: list[list[Message]] = []
    for begin, end in itertools.pairwise([0, *asks[1:], len(body)]):
        turn = body[begin:end]
        if not _answered(turn):
            continue  # a question without an answer trains nothing
        if rows and size([*rows[-1], *turn]) <= max_length:
            rows[-1] = [*rows[-1], *turn]
        else:
            rows.append([*head, *turn])
    return rows


def _answered(turn: Sequence[Message]) -> bool:
    return any(role_of(message) == "assistant" for message in turn)


def concatenate(parts: Sequence[Labelled]) -> Labelled:
    """Several batches as one, in order."""
    tokens = np.cumsum([0, *(len(part.ids) for part in parts)])
    rows = np.cumsum([0, *(len(part.offsets) - 1 for part in parts)])
    return Labelled(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + shift for part, shift in zip(parts, tokens, strict=False))]),
        np.concatenate([part.spans + shift for part, shift in zip(parts, tokens, strict=False)]),
        np.concatenate([part.span_rows + shift for part, shift in zip(parts, rows, strict=False)]),
    )


def select(labelled: Labelled, rows: NDArray[np.int64]) -> Labelled:
    """Some rows of a batch, each once, in a new order: int64 [new rows], the number of the row that comes first and so on."""
    sizes = np.diff(labelled.offsets)[rows]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    moved = labelled.offsets[rows] - offsets[:-1]
    tokens = np.arange(offsets[-1]) + np.repeat(moved, sizes)
    new_row = np.full(len(labelled.offsets) - 1, -1)
    new_row[rows] = np.arange(len(rows))
    span_rows = new_row[labelled.span_rows]
    spans, span_rows = labelled.spans[span_rows >= 0], span_rows[span_rows >= 0]
    return Labelled(labelled.ids[tokens], labelled.labels[tokens], offsets, spans - moved[span_rows, None], span_rows)
