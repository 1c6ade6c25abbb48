"""Workers: run one function over many items, on the cores of this machine or on a Ray cluster."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import pyarrow as pa

from hf_objectives.errors import ConfigError, HFObjectivesError, WorkerError
from hf_objectives.types import check_one_of

Function = Callable[[Any], Any]


def count_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_local(function: Function, items: Iterable[Any], num_proc: int | None) -> Iterator[Any]:
    """Run in forked processes, which inherit the function, or in this process where one is enough.

    Results come in any order. Items are read one by one and only a few are in flight, so memory stays flat. Without
    `num_proc` there is a process for every core.

    Raises:
        WorkerError: a process died.
    """
    cores = count_cores()
    workers = num_proc or cores
    if isinstance(items, Sized):
        workers = min(workers, len(items))
    if workers <= 1 or not hasattr(os, "fork"):
        yield from map(function, items)
        return
    initial = (function, max(1, cores // workers))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _adopt, initial) as pool:
        try:
            pending: set[Future] = set()
            for item in items:
                pending.add(pool.submit(_run_adopted, item))
                if len(pending) > 2 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of {workers} worker processes died; if memory ran out, use fewer (num_proc)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_adopted: Function | None = None


def _adopt(function: Function, threads: int) -> None:
    global _adopted
    _adopted = function
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizers' own threads would compete for the same cores
    pa.set_cpu_count(threads)
    # Rows are made by the ten thousand and have no cycles: the collector would walk them over and over. What was inherited
    # is never garbage here: a walk through it after each item took a fifth of the item's time.
    gc.disable()
    gc.freeze()


def _run_adopted(item: Any) -> Any:
    assert _adopted is not None  # set by _adopt in every worker
    try:
        return _adopted(item)
    finally:
        gc.collect()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("engine='ray' needs Ray: pip install 'hf-objectives[ray]'") from error
    return ray


def run_ray(function: Function, items: Iterable[Any], num_proc: int | None) -> Iterator[Any]:
    """Run with Ray Data's `map_batches`, on the cluster that `ray.init` finds, or a local one of `num_proc` CPUs.

    Ray runs an item again when its worker or machine is lost, so the function must give the same result again. All
    machines need the same file system.
    """
    ray = _import_ray()
    if not ray.is_initialized():
        own = None if "RAY_ADDRESS" in os.environ else num_proc  # a cluster knows its own number of CPUs
        ray.init(num_cpus=own, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shared = ray.put(pickle.dumps(function))
    table = pa.table({"item": pa.array([pickle.dumps(item) for item in items], pa.binary())})

    def run_batch(batch: pa.Table) -> pa.Table:
        work, results = _unpickle(ray.get(shared)), []
        for item in batch["item"].to_pylist():
            try:
                results.append(pickle.dumps(work(pickle.loads(item))))
            except HFObjectivesError as error:  # Ray would wrap it in errors of its own
                results.append(pickle.dumps(error))
        return pa.table({"result": pa.array(results, pa.binary())})

    dataset = ray.data.from_arrow([table.slice(i, 1) for i in range(len(table))])
    for row in dataset.map_batches(run_batch, batch_format="pyarrow", batch_size=1).iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, HFObjectivesError):
            raise result
        yield result


@lru_cache(maxsize=1)
def _unpickle(text: bytes) -> Function:
    """The function, made once a process: building its tokenizer takes longer than planning a segment."""
    return pickle.loads(text)


#: The engines, by name.
ENGINES: dict[str, Callable[[Function, Iterable[Any], int | None], Iterator[Any]]] = {
    "local": run_local,
    "ray": run_ray,
}


def check_engine(engine: str) -> None:
    """Raise a ConfigError, before anything is written or deleted, where an engine is unknown or not installed."""
    check_one_of("engine", engine, ENGINES)
    if engine == "ray":
        _import_ray()
