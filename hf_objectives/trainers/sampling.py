"""Sampling whose noise belongs to an answer, not to the process and the batch that draw it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


class OwnNoise(LogitsProcessor):
    """Draws the next token of each row from the softmax of its scores by noise of the row's own.

    With q exponential, the argmax of softmax(x) / q is a draw from softmax(x) (Gumbel-max, Maddison et al. 2014, arXiv
    1411.0030). `torch.multinomial` draws so too, with one noise for the whole batch. Here a row's noise is a function of
    seed, round, answer and position. So neither padding, nor the rows beside it, nor the process that draws it change an
    answer.

    It stands last, after temperature and cuts such as top-k, and leaves one token of each row for `generate` to choose.

    Args:
        seed: the seed of the run, 0 or more.
        round: number of the batch of answers, 0 or more.
        answers: numbers of the answers of the rows within that batch, over all processes.
        device: where the scores are.
    """

    def __init__(self, seed: int, round: int, answers: Iterable[int], device: torch.device) -> None:
        keys = [np.random.SeedSequence((seed, round, answer)).generate_state(1, np.uint64)[0] for answer in answers]
        self._noise = [torch.Generator(device).manual_seed(int(key) >> 1) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the drawn token of each row: float [rows, vocabulary], -inf for all others."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._noise, strict=True):
            row.exponential_(generator=generator)
        noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()  # a 0 would draw what has been cut
        drawn = noise.neg_().add_(scores).argmax(dim=1, keepdim=True)
        # NaN counts as the largest, and stays: `generate` refuses it, as without this.
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, scores.gather(1, drawn))
