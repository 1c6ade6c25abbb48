"""What training logs report beside the Trainer's own figures: nats, tokens and their rate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_objectives.distributed import sum_over_ranks
from hf_objectives.evaluation import TokenCount


class Tally:
    """What training logs report of the steps since the last log."""

    def __init__(self) -> None:
        self.start(0, 0)

    def start(self, total_supervised: int, total_seen: int) -> None:
        """Count from these totals."""
        self.total_supervised, self.total_seen = total_supervised, total_seen
        self._sums: Tensor | None = None
        self._since = time.perf_counter()

    def add(self, nll: Tensor, positions: Tensor, inputs: Mapping[str, Any], sources: Tensor | None) -> None:
        """Add a micro-batch: nats, supervised tokens, real tokens and places in the batch, on the device.

        Packed rows have no mask; their padding is told by the source of each place, -1, where rows name sources.
        """
        mask = inputs.get("attention_mask")
        places = positions.numel()
        real = nll.new_tensor(places)
        if mask is not None:
            real = mask.sum()
        elif sources is not None:
            real = (sources >= 0).sum()
        step = torch.stack([nll.double(), positions.sum().double(), real.double(), nll.new_tensor(places).double()])
        self._sums = step if self._sums is None else self._sums + step

    def take(self) -> dict[str, float]:
        """The figures over all ranks, and a fresh start."""
        own = [0.0] * 4 if self._sums is None else self._sums.tolist()
        nats, supervised, real, places = sum_over_ranks(own)
        seconds = time.perf_counter() - self._since
        self.start(self.total_supervised + int(supervised), self.total_seen + int(real))
        if not supervised:
            return {}
        return {
            "perplexity": TokenCount(nats, int(supervised)).perplexity,
            "num_supervised_tokens": self.total_supervised,
            "num_tokens_seen": self.total_seen,
            "tokens_per_second": real / max(seconds, 1e-9),
            "padding_share": 1 - real / places,
        }
