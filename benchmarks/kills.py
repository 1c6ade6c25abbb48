"""Kill runs at random moments, resume them, and hold their losses against runs that nobody killed.

    python benchmarks/kills.py --runs 10 --seed 1

Each run is a process of its own, killed by SIGKILL up to 100 ms after it began a save: in it or in the steps after it. It is
resumed and killed again, up to `--kills` times, until it ends. Kinds: conversations with dropout, a mixture as a stream,
PPO with a critic. `save_total_limit` is 1, 2 or none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("language", "stream", "ppo")
STEPS = 12


def make(kind: str, folder: Path, limit: int | None):
    """The trainer of a kind."""
    from hf_objectives.mixture import build_mixture
    from tests.support import language_models as small
    from tests.support import ppo_worlds

    options = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": limit, "learning_rate": 1e-2,
        "warmup_steps": 3,
    }  # fmt: skip
    if kind == "ppo":
        return ppo_worlds.ppo(
            folder, per_device_train_batch_size=2, steps_per_generation=2, num_iterations=2, **options
        )
    rows = None
    if kind == "stream":
        sources = {name: {"weight": weight, "dataset": small.chats(23)} for name, weight in (("a", 2), ("b", 1))}
        rows = build_mixture({"sources": sources}, tokenizer=small.TOKENIZER)
    return small.trainer(folder, model=small.llama(attention_dropout=0.1), rows=rows, **options)


def train(kind: str, folder: Path, limit: int | None) -> None:
    """One life of a run: it goes on from its last whole checkpoint, and writes its losses at the end."""
    import torch

    from hf_objectives.errors import CheckpointError

    torch.set_num_threads(1)
    run = make(kind, folder, limit)
    try:
        run.train(resume_from_checkpoint=True)
    except CheckpointError as error:
        saved = folder / "saved"
        if saved.exists():  # killed before its first checkpoint it has none; later that is a loss
            sys.exit(f"LOST: {error}")
        run = make(kind, folder, limit)
        run.train()
    weights = float(sum(value.double().sum() for value in run.model.state_dict().values()))
    losses = [[log["step"], log["loss"]] for log in run.state.log_history if "loss" in log]
    (folder / "losses.json").write_text(json.dumps([losses, weights]))


def life(kind: str, folder: Path, limit: int | None, saves: int | None, delay: float = 0.0) -> bool:
    """Start a run, and kill it so many seconds after it began so many saves; returns whether it ended by itself."""
    command = [sys.executable, __file__, "--life", kind, str(folder), str(limit or 0)]
    before, begun = {*folder.glob("_tmp-checkpoint-*")}, set()
    with (folder / "output.txt").open("ab") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output)
    while started.poll() is None:
        begun |= {*folder.glob("_tmp-checkpoint-*")} - before
        if saves is not None and len(begun) >= saves:
            time.sleep(delay)
            os.kill(started.pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    code = started.wait()
    if [*folder.glob("checkpoint-*/manifest.json")]:
        (folder / "saved").touch()
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"{kind} ended with {code}: " + (folder / "output.txt").read_text()[-3000:])
    return code == 0


def measure(runs: int, kills: int, seed: int) -> None:
    """Kill and resume; prints a line a run."""
    draws = random.Random(seed)
    killed = half_written = 0
    with tempfile.TemporaryDirectory() as place:
        expected = {}
        for kind in KINDS:
            folder = Path(place) / kind
            folder.mkdir()
            life(kind, folder, None, None)
            expected[kind] = json.loads((folder / "losses.json").read_text())
        for number in range(runs):
            kind, limit = KINDS[number % len(KINDS)], draws.choice([1, 2, None])
            folder = Path(place) / f"run-{number}"
            folder.mkdir()
            own = 0
            while not life(
                kind, folder, limit, draws.choice([1, 2, 3]) if own < kills else None, draws.uniform(0, 0.1)
            ):
                own += 1
                half_written += bool([*folder.glob("_tmp-checkpoint-*")])
            if json.loads((folder / "losses.json").read_text()) != expected[kind]:
                sys.exit(f"run {number} ({kind}, save_total_limit {limit}): other losses or weights after {own} kills")
            killed += own
            print(
                f"run {number:3}: {kind:8} save_total_limit {limit!s:4} {own:3} kills, the same to the bit", flush=True
            )
    print(f"{runs} runs, {killed} kills, {half_written} of them in the middle of a save: no checkpoint lost, all equal")


def main() -> None:
    """Read the arguments; one life of a run, or all."""
    if sys.argv[1:2] == ["--life"]:
        sys.path.insert(0, str(ROOT))
        train(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]) or None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=4, help="the most of a run")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    measure(arguments.runs, arguments.kills, arguments.seed)


if __name__ == "__main__":
    main()
