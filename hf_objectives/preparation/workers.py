"""Engines: one function over many items, on this machine's cores or on a Ray cluster; results as they come."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pyarrow as pa

from hf_objectives.errors import ConfigError, HFObjectivesError, WorkerError

Function = Callable[[Any], Any]


def run_local(function: Function, items: Sequence[Any], num_proc: int | None) -> Iterator[Any]:
    """Forked processes, one per core unless told otherwise; a single one is this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(num_proc or cores, len(items))
    if workers <= 1 or not hasattr(os, "fork"):
        yield from map(function, items)
        return
    threads = max(1, cores // workers)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _adopt, (function, threads)) as pool:
        try:
            for done in as_completed([pool.submit(_run_adopted, item) for item in items]):
                yield done.result()
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of {workers} worker processes died; if memory ran out, use fewer (num_proc). "
                "Run again: finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_adopted: Function | None = None


def _adopt(function: Function, threads: int) -> None:
    global _adopted
    _adopted = function
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizers' own threads would fight for the same cores
    pa.set_cpu_count(threads)
    # Rows are made by the ten thousand and have no cycles: the collector would walk them over and over. What was inherited
    # is never garbage here; a walk through it after each item took a fifth of the item's time.
    gc.disable()
    gc.freeze()


def _run_adopted(item: Any) -> Any:
    assert _adopted is not None  # set by _adopt in every worker
    try:
        return _adopted(item)
    finally:
        gc.collect()


def run_ray(function: Function, items: Sequence[Any], num_proc: int | None) -> Iterator[Any]:
    """Ray Data's `map_batches` over Arrow, on the cluster that `ray.init` finds, or a local one of `num_proc` CPUs.

    Ray runs an item again when its worker or machine is lost, so the function must give the same again; all machines
    need the same file system.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine='ray' needs Ray: pip install 'hf-objectives[ray]'") from error
    if not ray.is_initialized():
        own = None if "RAY_ADDRESS" in os.environ else num_proc  # a cluster says itself how many CPUs it has
        ray.init(num_cpus=own, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shared = ray.put(pickle.dumps(function))
    table = pa.table({"item": pa.array([pickle.dumps(item) for item in items], pa.binary())})

    def run_batch(batch: pa.Table) -> pa.Table:
        work = _unpickled(ray.get(shared))
        results = [pickle.dumps(_outcome(work, pickle.loads(item))) for item in batch["item"].to_pylist()]
        return pa.table({"result": pa.array(results, pa.binary())})

    dataset = ray.data.from_arrow([table.slice(i, 1) for i in range(len(table))])
    for row in dataset.map_batches(run_batch, batch_format="pyarrow", batch_size=1).iter_rows():
        outcome = pickle.loads(row["result"])
        if isinstance(outcome, HFObjectivesError):
            raise outcome
        yield outcome


def _outcome(function: Function, item: Any) -> Any:
    """A result, or an error of ours as one: Ray would wrap it in errors of its own."""
    try:
        return function(item)
    except HFObjectivesError as error:
        return error


_last: tuple[bytes, Function] | None = None


def _unpickled(text: bytes) -> Function:
    """The function, made once a process: its tokenizer takes longer to build than a segment to plan."""
    global _last
    if _last is None or _last[0] != text:
        _last = text, pickle.loads(text)
    return _last[1]


#: The engines, by name.
ENGINES: dict[str, Callable[[Function, Sequence[Any], int | None], Iterator[Any]]] = {
    "local": run_local,
    "ray": run_ray,
}
