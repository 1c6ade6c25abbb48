"""Which answers each step of PPO has: every epoch over a batch of answers deals them anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hf_objectives.distributed import sum_over_ranks

_TOKENS = "step_tokens"


def rows_of_steps(numbers: Tensor, steps: int, key: tuple[int, int, int]) -> Tensor:
    """Deal the answers of this process to the steps of an epoch.

    Each block of `steps` consecutive numbers gives one answer to each step, by a permutation that depends on `key` and block.
    A process holds whole blocks. So a step has the same answers however many processes there are.

    Args:
        numbers: int64 [answers], their numbers in the batch over all processes, in any order.
        steps: number of steps.
        key: seed, number of the batch of answers, epoch; each 0 or more.

    Returns:
        int64 [steps, answers / steps], places in `numbers`.
    """
    blocks = torch.argsort(numbers).view(-1, steps)
    first = numbers[blocks[:, 0]].tolist()
    orders = np.stack([np.random.default_rng((*key, number // steps)).permutation(steps) for number in first])
    return blocks.gather(1, torch.from_numpy(orders).to(blocks.device)).T


def deal(
    batches: Sequence[Mapping[str, Tensor]], accumulation: int, key: tuple[int, int, int]
) -> list[dict[str, Tensor]]:
    """Deal a batch of answers to the micro-batches of an epoch; each learns how many tokens its whole step has.

    Args:
        batches: micro-batches of this process, as they were made or as the epoch before had them, tensors [rows, ...] with
            `number` [rows] and `loss_mask` [rows, length].
        accumulation: micro-batches of a step.
        key: see `rows_of_steps`.

    Returns:
        As many micro-batches, with `step_tokens`: the tokens of the step over all its micro-batches and ranks, 1 at least.
    """
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != _TOKENS}
    rows = rows_of_steps(whole["number"], len(batches) // accumulation, key)
    tokens = whole["loss_mask"].sum(dim=1)[rows].sum(dim=1).tolist()
    totals = torch.tensor(sum_over_ranks([float(one) for one in tokens]), device=rows.device).clamp(min=1)
    return [
        {**{name: value[own] for name, value in whole.items()}, _TOKENS: totals[i // accumulation]}
        for i, own in enumerate(rows.reshape(len(batches), -1))
    ]
