"""Does anything grow? Ten million rows through a mixture and packing with workers, and thousands of steps of training.

    python benchmarks/soak.py [--rows 10_000_000] [--steps 4000] [--parts rows training]

Rows: three mapped sources of short rows, mixed by tokens and packed, through a DataLoader with two workers and the packing
collator. Training: a tiny Llama on conversations, with an evaluation and a checkpoint every 200 steps, two kept, and the
monitor, in one process.

Twenty times at equal distances it takes the memory of the process and its workers (proportional set size, MiB), open
descriptors, threads, and the rate since the last time. Growth is that of the median of the last quarter over that of the
second one, so that the first quarter warms up.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _machine import describe, table
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_objectives import DataCollatorWithEosPacking, build_mixture
from hf_objectives.diagnostics import DiagnosticsCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
small = importlib.import_module("tests.support.language_models")
LOOKS, BATCH = 20, 256


class Looks:
    """What a process and its children hold, time after time."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []
        self._last = (time.perf_counter(), 0)

    def take(self, done: int) -> None:
        """Look, after so many rows or steps."""
        own = psutil.Process()
        family = [own, *own.children(recursive=True)]
        now = time.perf_counter()
        self.lines.append(
            {
                "done": done,
                "MiB": sum(process.memory_full_info().pss for process in family) / 2**20,
                "descriptors": sum(process.num_fds() for process in family),
                "threads": sum(process.num_threads() for process in family),
                "a second": (done - self._last[1]) / (now - self._last[0]),
            }
        )
        self._last = now, done
        print({name: round(value, 1) for name, value in self.lines[-1].items()}, flush=True)

    def row(self, name: str) -> list[str]:
        """A line of the table."""

        def median(column: str, part: slice) -> float:
            return statistics.median(line[column] for line in self.lines[part])

        count = len(self.lines)
        second, last = slice(count // 4, count // 2), slice(3 * count // 4, count)
        growth = {column: median(column, last) / median(column, second) for column in ("MiB", "a second")}
        fds = [f"{median('descriptors', part):.0f}" for part in (second, last)]
        threads = [f"{median('threads', part):.0f}" for part in (second, last)]
        return [
            name,
            f"{self.lines[-1]['done']:,}",
            f"{median('MiB', second):.1f} to {median('MiB', last):.1f} ({100 * (growth['MiB'] - 1):+.2f} %)",
            " to ".join(fds),
            " to ".join(threads),
            f"{median('a second', second):,.1f} to {median('a second', last):,.1f} ({growth['a second']:.2f})",
        ]


def rows(count: int) -> Looks:
    """Read so many rows."""
    rng, sources = np.random.default_rng(0), {}
    for number, size in enumerate((60_000, 30_000, 10_000)):
        ids = [rng.integers(0, 255, length).tolist() for length in rng.integers(4, 12, size)]
        sources[f"source {number}"] = {
            "dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
            "weight": 1 + number,
        }
    mixture = build_mixture({"sources": sources, "unit": "tokens"})
    mixture.batch_rows = BATCH
    collator = DataCollatorWithEosPacking(small.TOKENIZER, max_length=1024, train_on="all")
    looks, read = Looks(), 0
    for _ in DataLoader(mixture, batch_size=BATCH, num_workers=2, collate_fn=collator):
        read += BATCH
        if read // (count // LOOKS) > len(looks.lines):
            looks.take(read)
        if read >= count:
            break
    return looks


class Watch(TrainerCallback):
    """Looks at a run."""

    def __init__(self, steps: int) -> None:
        self.looks, self.every = Looks(), steps // LOOKS

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look."""
        if state.global_step % self.every == 0:
            self.looks.take(state.global_step)


def training(steps: int) -> Looks:
    """Train so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = small.trainer(
            folder, max_steps=steps, logging_steps=10, eval_strategy="steps", eval_steps=200, save_strategy="steps",
            save_steps=200, save_total_limit=2, learning_rate=1e-4,
        )  # fmt: skip
        watch = Watch(steps)
        run.add_callback(DiagnosticsCallback(run))
        run.add_callback(watch)
        run.train()
        return watch.looks


def main() -> None:
    """Run the parts, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--parts", nargs="+", choices=("rows", "training"), default=["rows", "training"])
    options = parser.parse_args()
    begin, lines = time.time(), []
    for part in options.parts:
        looks = rows(options.rows) if part == "rows" else training(options.steps)
        lines.append(looks.row("rows" if part == "rows" else "steps of training"))
    print(f"\n{describe()}; {(time.time() - begin) / 60:.0f} minutes\n")
    header = ["", "number", "memory, second quarter to last, MiB", "descriptors", "threads", "a second"]
    print(table(header, lines))


if __name__ == "__main__":
    main()
