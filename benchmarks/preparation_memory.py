"""Memory and rate of fine-tuning's preparation over ten times the rows.

    python benchmarks/preparation_memory.py [--rows 20000] [--times 10] [--num_proc 1]

Chats of the built-in corpus, with a longer answer each, are written as JSON lines. `recipes.data.prepare` reads, splits,
encodes and packs them in a process of its own, once for some of the rows and once for all. Memory is what the kernel cannot
take back (`RssAnon` of the process and its workers, read every 10 ms). Pages of mapped files are left out: they are dropped
when memory is short. With `--pairs` the pairs of DPO are encoded instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from _machine import describe

from hf_objectives import demo

_TOKENS, _CHATS = 256, 2_000


def write_rows(path: Path, count: int, pairs: bool) -> None:
    """Chats, or pairs, of about 200 tokens; no two are alike."""
    rng = random.Random(0)
    made = demo.preferences(_CHATS) if pairs else demo.chats(_CHATS)
    words = " ".join(row["answer"] if pairs else row["messages"][-1]["content"] for row in made).split()
    with path.open("w") as file:
        for i in range(count):
            more = f" {' '.join(rng.choices(words, k=40))} {i}"
            if pairs:
                row = {"prompt": f"Go on, {i}.", "chosen": f"Yes,{more}", "rejected": f"No,{more}"}
            else:
                turns = made[i % _CHATS]["messages"]
                row = {"messages": [*turns[:-1], {**turns[-1], "content": str(turns[-1]["content"]) + more}]}
            file.write(json.dumps(row) + "\n")


def anonymous_memory() -> int:
    """Bytes of this process and its children that no file backs."""
    pids = [os.getpid()]
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(OSError):
            pids += map(int, (task / "children").read_text().split())
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
    return total


def measure(path: str, num_proc: int, pairs: bool) -> None:
    """Prepare a file, and print a line of JSON."""
    from types import SimpleNamespace

    from hf_objectives.recipes.data import prepare
    from hf_objectives.recipes.data_arguments import DataArguments
    from hf_objectives.recipes.dpo import Dpo, DpoData

    tokenizer = demo.build_tokenizer()
    begin, before, peak, done = time.perf_counter(), anonymous_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        if pairs:
            values = {"seed": 0, "max_length": _TOKENS, "train_on": "assistant", "control_tokens": "plain"}
            recipe = Dpo(
                None,
                DpoData(dataset_name=path),
                SimpleNamespace(**values, device=SimpleNamespace(type="cpu"), output_dir=folder),
                {},
            )
            recipe.load_rows(tokenizer)
            count = len(recipe.train_rows)
        else:
            data = DataArguments(dataset_name=path, max_length=_TOKENS, num_proc=num_proc)
            count = len(prepare(data, tokenizer, seed=0, output_dir=folder).train)
        seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    print(json.dumps({"peak": (peak - before) / 2**20, "before": before / 2**20, "seconds": seconds, "packed": count}))


def main() -> None:
    """Measure both sizes and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.num_proc, options.pairs)
        return
    print(describe())
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (options.rows, options.rows * options.times):
            path = Path(folder) / f"{count}.jsonl"
            write_rows(path, count, options.pairs)
            command = [sys.executable, __file__, "--measure", str(path), "--num_proc", str(options.num_proc)]
            command += ["--pairs"] * options.pairs
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            peaks.append(found["before"] + found["peak"])
            size, rate = path.stat().st_size >> 20, count / found["seconds"]
            memory = f"{found['before']:.0f} MiB before, {found['peak']:.0f} MiB more at the peak"
            print(f"{count:>9,} rows, {size} MiB: {memory}, {found['seconds']:.1f} s, {rate:,.0f} rows/s", flush=True)
    print(f"the whole process at its peak: {peaks[1] / peaks[0]:.2f} times over {options.times} times the rows")


if __name__ == "__main__":
    main()
