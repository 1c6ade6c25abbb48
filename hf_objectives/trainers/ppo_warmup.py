"""The first steps of PPO, in which the critic learns alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CriticWarmup:
    """Keeps gradients off the policy in the first steps (value pretraining, Yuan et al. 2025, arXiv 2503.01491).

    A parameter without a gradient is passed over by an optimizer of torch: its weights and moments stay.

    Args:
        steps: number of optimizer steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.in_pass = False  # whether a forward pass of a resting policy is running

    def covers(self, step: int) -> bool:
        """Whether the policy rests in the step after `step` steps."""
        return step < self.steps

    @contextmanager
    def resting(self, rests: bool) -> Iterator[None]:
        """Within it, forward passes of the policy keep no graph if it rests; a shared critic's head keeps its own."""
        self.in_pass = rests
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not rests):
                yield
        finally:
            self.in_pass = False
