"""Generated answers to held-out prompts, held against the answers that the rows have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from torch import nn

from hf_objectives.distributed import gather_objects, rank, world_size
from hf_objectives.errors import ConfigError, DataError
from hf_objectives.types import IGNORE_INDEX, check_one_of

MODULES = Path(__file__).parent / "modules"  # of `evaluate`, shipped so that they load offline


@dataclass(frozen=True)
class Asked:
    """A prompt, the ids up to where an answer begins, and the ids of the answer, its stop token left out."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Answered:
    """What was said to a prompt, and what the row has there; texts."""

    prompt: str
    said: str
    expected: str


def module_path(name: str) -> str:
    """The folder of a module of ours, `exact_match` or `perplexity`, as `evaluate.load` takes it; no network is needed.

    Raises:
        ConfigError: there is no such module.
    """
    check_one_of(
        "module", name, sorted(path.name for path in MODULES.iterdir() if path.is_dir() and path.name[0] != "_")
    )
    return str(MODULES / name)


def find_answers(rows: Any, count: int, stop_ids: Sequence[int]) -> list[Asked]:
    """The last answer of encoded rows, evenly spread; of packed rows that of their first document with one.

    Args:
        rows: a mapped dataset of rows with `input_ids` and `labels`, and `seq_lengths` where they are packed.
        count: the number of rows, at most.
        stop_ids: tokens that end an answer.

    Raises:
        DataError: no row has an answer after a prompt.
    """
    found = []
    for i in (k * len(rows) // count for k in range(count)) if count < len(rows) else range(len(rows)):
        asked = _of_row(rows[i], {*stop_ids})
        found += [asked] if asked else []
    if not found:
        raise DataError("no held-out row has an answer after a prompt; leave eval_answers out")
    return found


def _of_row(row: Mapping[str, Any], stops: set[int]) -> Asked | None:
    begin = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        ids, labels = (list(row[name][begin : begin + length]) for name in ("input_ids", "labels"))
        begin += length
        trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
        if not trained.size or not trained[0]:
            continue  # nothing is trained, or a text from its first token on
        start = int(trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]])  # of the last run of trained tokens
        answer = ids[start : int(trained[-1]) + 1]
        return Asked(ids[:start], answer[:-1] if answer[-1] in stops else answer)
    return None


@torch.no_grad()
def answer_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """Answer greedily, several prompts at a time, padded on the left.

    Args:
        model: a causal language model; its mode and the random states stay as they were.
        prompts: the ids of each.
        max_new_tokens: where an answer is cut.
        stop_ids: tokens that end an answer; they are left out.
        pad_id: any id; padding is masked.
        batch_size: prompts at a time.

    Returns:
        The ids of each answer.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    said: list[list[int]] = []
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=pad_id,
        )
        said += [_until(row[width:].tolist(), {*stop_ids}) for row in out]
    model.train(was_training)
    return said


def _until(ids: list[int], stops: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def evaluate_answers(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[Asked],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 16,
) -> tuple[dict[str, float], list[Answered]]:
    """Answer the prompts, each rank its share, and score the answers by `evaluate`'s module `exact_match`.

    Texts are compared without white space at their ends.

    Returns:
        `answers_exact_match` with its 95 % interval (`_low`, `_high`) and `answers_cut`, the share that reached
        `max_new_tokens`; and the prompts with their answers, in the order of `asked`, the same on every rank.
    """
    own = list(asked[rank() :: world_size()])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts = [one.prompt for one in own]
    said = answer_prompts(
        model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=pad, batch_size=batch_size
    )
    texts = [
        (
            Answered(*(tokenizer.decode(ids).strip() for ids in (one.prompt, ids, one.answer))),
            len(ids) >= max_new_tokens,
        )
        for one, ids in zip(own, said, strict=True)
    ]
    parts = gather_objects(texts)
    together = [parts[i % world_size()][i // world_size()] for i in range(len(asked))]
    answers = [answer for answer, _ in together]
    module = evaluate.load(module_path("exact_match"))
    figures = module.compute(predictions=[a.said for a in answers], references=[a.expected for a in answers])
    figures["cut"] = sum(cut for _, cut in together) / len(together)
    return {f"answers_{name}": value for name, value in figures.items()}, answers


def check_answers(count: int, max_new_tokens: int) -> None:
    """Check the settings of generated answers.

    Raises:
        ConfigError: a negative number, or no room for a token.
    """
    if count < 0 or max_new_tokens < 1:
        raise ConfigError(
            f"eval_answers is {count} and eval_max_new_tokens {max_new_tokens}; expected at least 0 and 1"
        )
