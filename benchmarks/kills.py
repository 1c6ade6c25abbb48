"""Kill runs at random moments, resume them, and hold their losses against runs that nobody killed.

    python benchmarks/kills.py --runs 40 --seed 1

Each life of a run is a process of its own, forked before any thread is started. It is killed by SIGKILL up to 100 ms after it
began a save (in it, or in the steps after it), or up to 300 ms after its first step where it saves nothing yet. It is resumed
and killed again, up to `--kills` times, until it ends. A kill counts only where the run had not ended. Losses of all steps,
weights and random states are compared to the bit. Kinds: see `KINDS`; "ranks" are two processes, of which one is
killed alone or both are; "prepare" makes shards, and its files are compared. `save_total_limit` is 1, 2 or none.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_objectives import demo
from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.errors import CheckpointError
from hf_objectives.mixture import build_mixture
from hf_objectives.preparation import CorpusConfig, load_prepared, prepare_corpus

# A process with threads cannot be forked safely: one of them may hold a lock.
torch.set_num_threads(1)
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))
dpo_worlds, ppo_worlds, reward_worlds, small = (
    importlib.import_module(f"tests.support.{name}")
    for name in ("dpo_worlds", "ppo_worlds", "reward_worlds", "language_models")
)
STEPS = 12
KINDS = ("language", "packed", "stream", "prepared", "reward", "dpo", "dpo padding_free", "ppo", "ranks", "prepare")


def make(kind: str, folder: Path, limit: int | None) -> Any:
    """The trainer of a kind."""
    options: dict[str, Any] = {
        "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": limit, "learning_rate": 1e-2,
        "warmup_steps": 3,
    }  # fmt: skip
    if kind == "ppo":
        return ppo_worlds.ppo(
            folder, per_device_train_batch_size=2, steps_per_generation=2, num_iterations=2, **options
        )
    if kind == "reward":
        return reward_worlds.trainer(folder, train_sampling_strategy="random", optim="adamw_torch", **options)
    model = small.llama(attention_dropout=0.1)
    if kind.startswith("dpo"):
        pairs = Dataset.from_list(demo.preferences(23))
        model, reference = (demo.build_model(dpo_worlds.TOKENIZER, hidden_size=32, num_layers=2) for _ in range(2))
        return dpo_worlds.ours(
            model, folder, rows=pairs, trainer={"ref_model": reference}, padding_free="padding" in kind, **options
        )
    collator = rows = None
    if kind == "packed":
        collator = DataCollatorWithEosPacking(small.TOKENIZER, max_length=200)
    if kind == "stream":
        sources = {name: {"weight": weight, "dataset": small.chats(23)} for name, weight in (("a", 2), ("b", 1))}
        rows = build_mixture({"sources": sources}, tokenizer=small.TOKENIZER)
    if kind == "prepared":
        rows = load_prepared(folder.parent / "corpus", streaming=True)
        collator = DataCollatorWithEosPacking(small.TOKENIZER, max_length=64, train_on="all")
    return small.trainer(folder, model=model, collator=collator, rows=rows, **options)


def train(kind: str, folder: Path, limit: int | None) -> None:
    """One life of a run: it goes on from its last whole checkpoint, and writes its losses at the end."""
    run = make(kind, folder, limit)
    try:
        run.train(resume_from_checkpoint=True)
    except CheckpointError as error:
        if (folder / "saved").exists():  # killed before its first checkpoint it has none; later that is a loss
            raise SystemExit(f"LOST: {error}") from error
        run = make(kind, folder, limit)
        run.train()
    state = run.model.state_dict() | (run.critic.state_dict() if getattr(run, "critic", None) else {})
    bytes_of = b"".join(
        value.contiguous().view(torch.uint8).numpy().tobytes() for value in state.values() if value.numel()
    )
    losses = [[log["step"], log["loss"]] for log in run.state.log_history if "loss" in log]
    drawn = [torch.rand(1).item(), random.random()]
    found = [losses, hashlib.sha256(bytes_of).hexdigest(), drawn]
    (folder / f"losses-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


def prepare(folder: Path) -> None:
    """Prepare a corpus of many small shards, going on where an earlier life stopped."""
    texts = folder.parent / "texts.jsonl"
    made = prepare_corpus(
        {"texts": str(texts)}, small.TOKENIZER, folder / "out", CorpusConfig(128, shard_bytes=8_000, num_proc=1)
    )
    found = [[shard.path, shard.sha256] for shard in made.shards]
    (folder / "losses-0.json").write_text(json.dumps([found, made.num_tokens]))


def born(kind: str, folder: Path, limit: int | None, rank: int, port: int) -> int:
    """Fork a life; returns its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.dump_traceback_later(300, exit=True)  # a life that hangs is an error
        random.seed(rank)  # Python gives a forked process another state
        if kind == "ranks":
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}  # fmt: skip
        if kind == "prepare":
            prepare(folder)
        else:
            train(kind, folder, limit)
        code = 0
    except BaseException as error:
        import traceback

        traceback.print_exc()
        code = 3 if str(error).startswith("LOST") else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def progress(kind: str, folder: Path) -> set[Path]:
    """What a run has begun to write."""
    if kind == "prepare":
        return {*folder.glob("out/**/*.parquet"), *folder.glob("out/.progress/*")}
    return {*folder.glob("_tmp-checkpoint-*")}


def life(kind: str, folder: Path, limit: int | None, saves: int | None, delay: float, alone: bool) -> bool:
    """Start a run, and kill it so many seconds after it began so many saves; returns whether it ended by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before, begun = progress(kind, folder), set[Path]()
    alive = {born(kind, folder, limit, rank, port): rank for rank in range(2 if kind == "ranks" else 1)}
    codes, hit, stop_at = [], False, None
    while alive:
        begun |= progress(kind, folder) - before
        if saves is not None and not hit and len(begun) >= saves:
            time.sleep(delay)
            hit = True
            for process in random.sample(sorted(alive), 1) if alone else [*alive]:
                os.kill(process, signal.SIGKILL)
        for process in [*alive]:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes.append(os.waitstatus_to_exitcode(status))
                del alive[process]
                if codes[-1] and stop_at is None:  # a launcher ends the others: SIGTERM, and SIGKILL in the end
                    stop_at = time.time() + 5
                    for other in alive:
                        os.kill(other, signal.SIGTERM)
        if stop_at is not None and time.time() > stop_at:
            for other in alive:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.0005)
    if [*folder.glob("checkpoint-*/manifest.json")]:
        (folder / "saved").touch()
    if 3 in codes or (not hit and any(codes)):
        raise SystemExit(f"{kind} ended with {codes}: " + (folder / "output-0.txt").read_text()[-3000:])
    return not any(codes)


def outcome(folder: Path) -> list[Any]:
    """What a run wrote at its end, of all ranks."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("losses-*.json"))]


def set_up(place: Path) -> None:
    """Write what kinds read."""
    (place / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo.texts(3_000)))
    texts = Dataset.from_list(demo.texts(200))
    prepare_corpus({"texts": texts}, small.TOKENIZER, place / "corpus", CorpusConfig(64, num_proc=1))


def measure(kinds: list[str], runs: int, kills: int, seed: int) -> None:
    """Kill and resume; prints a line a run."""
    draws = random.Random(seed)
    killed = half_written = ranks_killed = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if not (process := os.fork()):  # so that this process keeps a single thread, and can be forked
            set_up(place)
            os._exit(0)
        os.waitpid(process, 0)
        expected = {}
        for kind in kinds:
            folder = place / f"whole {kind}"
            folder.mkdir()
            life(kind, folder, None, None, 0, False)
            expected[kind] = outcome(folder)
        for number in range(runs):
            kind, limit = kinds[number % len(kinds)], draws.choice([1, 2, None])
            folder = place / f"run-{number}"
            folder.mkdir()
            own, moments = 0, []
            while True:
                saves = draws.choice([1, 2, 3, 5] if kind != "prepare" else [1, 2, 7, 20]) if own < kills else None
                alone = kind == "ranks" and draws.random() < 0.5
                if life(kind, folder, limit, saves, draws.uniform(0, 0.1), alone):
                    break
                own += 1
                ranks_killed += alone
                staged = sorted(path.name for path in progress(kind, folder) if path.name.startswith("_tmp"))
                half_written += bool(staged)
                newest = max((int(p.name[11:]) for p in folder.glob("checkpoint-*")), default=0)
                moments.append(f"{newest}{' in ' + staged[-1][5:] if staged else ''}")
            if outcome(folder) != expected[kind]:
                raise SystemExit(f"run {number} ({kind}, save_total_limit {limit}): other results after {own} kills")
            killed += own
            print(f"run {number:3}: {kind:16} save_total_limit {limit!s:4} {own:2} kills (after steps {', '.join(moments)}):"
                  " the same to the bit", flush=True)  # fmt: skip
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
    print(
        f"{runs} runs, {killed} kills, {half_written} of them in the middle of a save, {ranks_killed} of one rank alone: "
        "no checkpoint lost, all equal"
    )


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=4, help="the most of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    measure(options.kinds, options.runs, options.kills, options.seed)


if __name__ == "__main__":
    main()
