"""The only file that calls collectives. In a single process each function returns its own input."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.nn import Parameter

from hf_objectives.types import called_by

_LOADERS = "accelerate.data_loader"


def world_size() -> int:
    """Number of processes in the group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_dispatched() -> bool:
    """Whether accelerate reads this from one process and hands it out: `dispatch_batches`, its default for streams.

    It joins the batches of several processes and cuts every tensor to its share of the rows. A forked loader worker is told
    the truth as well, a spawned one is not: ask when it is pickled.
    """
    return called_by(_LOADERS, "DataLoaderDispatcher.__iter__")


def is_shared_out() -> bool:
    """Whether accelerate divides the rows that are read here among processes; see `is_dispatched`."""
    return called_by(_LOADERS, "IterableDatasetShard.__iter__") or (world_size() > 1 and is_dispatched())


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sum float64 values over all processes, each by itself. Counts stay exact up to 2^53."""
    if world_size() == 1:
        return list(values)
    # NCCL reduces on the accelerator only.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Replace each gradient by its mean over all processes. A missing gradient counts as 0."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return sum_over_ranks([float(flag)])[0] > 0


def gather_objects(value: object) -> list:
    """Return the values of all processes, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def leave_group() -> None:
    """End the process group at the end of a program: gloo's threads abort a process that exits with it."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a wrapped model in a reference cycle would keep the group and its threads
        dist.destroy_process_group()
