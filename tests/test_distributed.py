"""The collectives, in one process and in two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_objectives import distributed


def test_one_process_is_its_own_answer():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    distributed.average_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.sum_over_ranks([1.5, 2.0**53]) == [1.5, 2.0**53]
    assert distributed.gather_objects("row") == ["row"]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    distributed.leave_group()  # without a group, nothing


def _act(number: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    assert (distributed.rank(), distributed.world_size()) == (number, 2)
    # 2^53 + 2 has a float64 and no float32: counts stay exact.
    assert distributed.sum_over_ranks([float(number + 1), 2.0**52 + 1]) == [3.0, 2.0**53 + 2]
    assert distributed.gather_objects({"rank": number}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.any_rank(number == 1) and not distributed.any_rank(False)
    present, missing = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    present.grad = torch.tensor([4.0 * number])
    if number == 0:
        missing.grad = torch.tensor([6.0])
    distributed.average_gradients([present, missing])
    assert present.grad.tolist() == [2.0]
    assert missing.grad is not None and missing.grad.tolist() == [3.0]  # (6 + 0) / 2
    distributed.leave_group()
    assert not dist.is_initialized()


@pytest.mark.distributed
def test_two_processes(tmp_path):
    mp.spawn(_act, args=(str(tmp_path / "group"),), nprocs=2)  # raises what a process raises
