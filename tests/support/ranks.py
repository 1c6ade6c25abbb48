"""Ranks of a launch without a launcher: forked from one process that has imported everything, where torchrun would have
each of them import it again, which takes longer than what most tests do in them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
# The package and its libraries alone: what tests make of them may depend on the number of processes.
_CONTEXT.set_forkserver_preload(
    [f"hf_objectives.recipes.{name}" for name in ("pretrain", "sft", "dpo", "reward", "ppo", "distill")]
    + ["torch.distributed.fsdp", "torch.distributed.tensor.experimental"]
)


def run_ranks(program: str | Path, words: list[str], processes: int = 2) -> subprocess.CompletedProcess:
    """Run a program on several ranks, with the environment that torchrun gives them; as `subprocess.run` with the text of
    all ranks captured. Where one fails the others are ended, and the return code is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), processes)
        group = {**os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
        environments = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        ranks = [_CONTEXT.Process(target=_rank, args=(program, words, outputs, given)) for given in environments]
        for rank in ranks:
            rank.start()
        running = ranks
        while running and not any(rank.exitcode for rank in ranks):
            if not wait([rank.sentinel for rank in running], timeout=600):
                break
            running = [rank for rank in running if rank.exitcode is None]
        for rank in running:
            rank.kill()
            rank.join()
        codes = [rank.exitcode for rank in ranks]
        texts = [path.read_text() if path.exists() else "" for path in outputs]
    return subprocess.CompletedProcess([str(program), *words], next(filter(None, codes), 0), *texts)


def _rank(program: str | Path, words: list[str], outputs: tuple[Path, Path], environment: dict) -> None:
    gc.freeze()
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = [str(program), *words]
    runpy.run_path(str(program), run_name="__main__")
