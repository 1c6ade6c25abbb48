"""Training runs in processes of their own: on this machine, or through Ray Tune."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_objectives.errors import ConfigError, WorkerError
from hf_objectives.preparation import difference

Place = tuple[str, str, list[str]]  # rows of some sources in a split of a prepared folder


@dataclass(frozen=True)
class Job:
    """A training run: its folder, arguments and evaluation sets by name, and in `settings` all that its result depends on."""

    folder: str
    argv: list[str]
    mixture: dict[str, Any]
    sample: tuple[int, int]  # rows of the mixture, and their tokens
    evaluation: dict[str, Place]
    settings: dict[str, Any]
    threads: int
    use_cpu: bool

    @property
    def name(self) -> str:
        """The last two parts of the folder."""
        return "/".join(Path(self.folder).parts[-2:])

    @property
    def log(self) -> Path:
        """The file that the run prints to."""
        return Path(self.folder) / "log.txt"

    def result(self) -> dict[str, Any] | None:
        """What the run has written at its end; None before."""
        path = Path(self.folder) / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_result(self, losses: dict[str, float], report: dict[str, Any]) -> None:
        """Write the losses by evaluation set, and what the sources gave; whole or not at all."""
        draft = Path(self.folder) / "result.draft"
        draft.write_text(json.dumps({"settings": self.settings, "losses": losses, "given": report}, indent=1))
        draft.replace(draft.with_suffix(".json"))


Train = Callable[[Job], None]


def run_local(jobs: Sequence[Job], train: Train, parallel: int, done: Callable[[Job], None]) -> None:
    """Run `parallel` jobs at a time, each in a process of its own; one that dies takes no other with it."""
    gpus = torch.cuda.device_count()
    context: Any = multiprocessing.get_context("spawn" if gpus else "forkserver")
    if not gpus:  # forked from one that has imported what takes seconds to import
        context.set_forkserver_preload(["trl", "hf_objectives.trainers", "hf_objectives.mixture.build"])
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(parallel):
        slots.put(slot)

    def run(job: Job) -> None:
        slot = slots.get()
        process = context.Process(target=_alone, args=(job, train, slot % gpus if gpus else None))
        process.start()
        process.join()
        slots.put(slot)
        if process.exitcode < 0:
            with job.log.open("a") as log:
                log.write(f"killed by signal {-process.exitcode}\n")
        done(job)

    threads = ThreadPoolExecutor(parallel)
    try:
        list(threads.map(run, jobs))
    finally:  # at once after Ctrl-C, which the processes have seen too
        threads.shutdown(wait=False, cancel_futures=True)


def _alone(job: Job, train: Train, gpu: int | None) -> None:
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if gpu is not None:  # of several a Trainer would take all
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    with job.log.open("a") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    train(job)


def _end_with(parent: Any) -> None:
    parent.join()  # or the jobs of a run that was killed train on, beside those of the next one
    os._exit(1)


def run_ray(jobs: Sequence[Job], train: Train, parallel: int, done: Callable[[Job], None]) -> None:
    """Run jobs as trials of Ray Tune, on the cluster that `ray.init` finds or a local one; all see the same files."""
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise ConfigError("engine='ray' needs Ray Tune: pip install 'hf-objectives[ray]' -c constraints.txt") from error
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths of the configuration are relative to where the run began
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpu = int(not jobs[0].use_cpu and "GPU" in ray.cluster_resources())
    results = tune.Tuner(
        tune.with_resources(lambda given: train(jobs[given["job"]]), {"cpu": jobs[0].threads, "gpu": gpu}),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=parallel),
        run_config=tune.RunConfig(storage_path=str(Path(jobs[0].folder).parents[1] / "ray"), verbose=0),
    ).fit()
    for result in (results[i] for i in range(len(results))):
        job = jobs[(result.config or {})["job"]]
        if result.error is not None:
            job.log.write_text(str(result.error))
        done(job)


ENGINES = {"local": run_local, "ray": run_ray}


def run_jobs(jobs: Sequence[Job], train: Train, engine: str, parallel: int, console: Console) -> list[dict[str, Any]]:
    """The results of jobs, in order; a job that has a result is not run again. Jobs that fail are told after all others."""
    for job in jobs:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        if (result := job.result()) and (different := difference(result["settings"], job.settings)):
            raise ConfigError(
                f"{job.name} was trained otherwise. {'; '.join(different)}. Choose another output_dir, or delete {job.folder}"
            )
    failed: dict[str, str] = {}

    def done(job: Job) -> None:
        if (result := job.result()) is not None:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in result["losses"].items())
            console.print(f"{job.name}: {losses}", highlight=False)
            return
        lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
        failed[job.name] = f"{job.name} ({lines[-1] if lines else 'no word'}; see {job.log})"

    if todo := [job for job in jobs if job.result() is None]:
        ENGINES[engine](todo, train, min(parallel, len(todo)), done)
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs were there already", highlight=False)
    if failed:
        raise WorkerError(
            f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed[name] for name in sorted(failed))}. The others "
            "are kept: run again to train what is missing"
        )
    return [result for job in jobs if (result := job.result()) is not None]
