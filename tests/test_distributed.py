"""Collectives are their own answer in a single process; with several, see `tests/invariant`."""

from __future__ import annotations

import torch

from hf_objectives import distributed


def test_a_single_process():
    values = [1.5, 2.0**53]
    assert distributed.sum_over_ranks(values) == values and distributed.sum_over_ranks(values) is not values
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.gather_objects("a") == ["a"]
    parameter = torch.nn.Parameter(torch.zeros(2))
    distributed.average_gradients([parameter])
    assert parameter.grad is None
    distributed.leave_group()  # there is none
