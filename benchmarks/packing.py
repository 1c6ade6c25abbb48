"""Packing: hf_objectives against TRL's best-fit decreasing on the same lengths and the same tokens, interleaved.

    python benchmarks/packing.py [--rounds 5] [--documents 200000]

Lengths are lognormal with a mean of about 390, cut at 2,048. TRL packs a table of lists, so its time for "lengths" is that of
`trl.pack_dataset` on documents of one byte a token in a single batch of all rows; how its bins are found is not timed apart
from how its rows are built, which is why the search alone is timed as well, by TRL's own `_pack_bfd` on the Arrow table. Ours
is `pack_lengths`. "Rows" is end to end, from a `Dataset` with `input_ids` to a packed one, on both sides, TRL once as it
comes (batches of 1,000 rows) and once over the whole set.

Each is called twice in a row: on a virtual machine that gives idle memory back to its host, the first call of a turn mostly
waits for pages (300 MB of fresh memory took 0.6 s here, 0.03 s when just used), the second one shows the code.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from _machine import describe, table
from datasets import Dataset, disable_caching, disable_progress_bars
from trl import pack_dataset as trl_pack_dataset
from trl.data_utils import _pack_bfd

from hf_objectives import pack_dataset, pack_lengths

CAPACITY = 2048


def lognormal(count: int, seed: int = 0) -> np.ndarray:
    """Document lengths, int64 [count]."""
    return np.clip(np.random.default_rng(seed).lognormal(5.5, 0.95, count).astype(np.int64), 1, CAPACITY)


def documents(lengths: np.ndarray) -> Dataset:
    """Documents of these lengths, of random ids."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.random.default_rng(1).integers(0, 49_152, offsets[-1]).astype(np.int32)
    return Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids))}))


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what came of it."""
    begin = time.perf_counter()
    made = run()
    return time.perf_counter() - begin, made


def compare(name: str, ways: dict[str, Callable[[], object]], rounds: int, size: Callable[[object], str]) -> None:
    """Run all ways in turn, each twice in a row, and print a table; the last way is ours."""
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    made: dict[str, object] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            first, _ = timed(run)
            again, made[way] = timed(run)
            seconds[way].append((first, again))
    ours = list(ways)[-1]
    lines = []
    for way, taken in seconds.items():
        line = [way, size(made[way])]
        for call in (0, 1):
            ratios = [theirs[call] / mine[call] for theirs, mine in zip(taken, seconds[ours], strict=True)]
            line.append(f"{statistics.median(one[call] for one in taken):.3f}")
            line.append(
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if way != ours else ""
            )
        lines.append(line)
    print(f"**{name}**, {rounds} rounds in turn, medians\n")
    print(table(["", "rows", "seconds, first call", "times ours", "seconds, called again", "times ours"], lines), "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=200_000)
    options = parser.parse_args()
    disable_caching()
    disable_progress_bars()
    print(describe(), "\n")

    lengths = lognormal(options.documents)
    of_lengths = documents(lengths).with_format("arrow")[:]
    compare(
        f"Bins for {options.documents:,} documents, mean {lengths.mean():.0f} tokens",
        {
            "TRL, whole set": lambda: len(_pack_bfd(of_lengths, CAPACITY)),
            "hf_objectives": lambda: pack_lengths(lengths, CAPACITY).num_bins,
        },
        options.rounds,
        lambda bins: f"{bins:,}",
    )

    ids = documents(lengths)
    both = Dataset(ids.data.table.append_column("labels", ids.data.table["input_ids"]))
    for what, rows in (("ids alone (ours adds labels)", ids), ("ids and labels", both)):
        compare(
            f"Rows from {len(rows):,} documents, {lengths.sum() / 1e6:.0f} million tokens, {what}, end to end",
            {
                "TRL, batches of 1,000": lambda rows=rows: trl_pack_dataset(rows, CAPACITY, "bfd"),
                "TRL, whole set": lambda rows=rows: trl_pack_dataset(
                    rows, CAPACITY, "bfd", map_kwargs={"batch_size": len(rows)}
                ),
                "hf_objectives": lambda rows=rows: pack_dataset(rows, CAPACITY),
            },
            options.rounds,
            lambda made: f"{len(made):,}",  # type: ignore[arg-type]
        )

    lines = []
    for count in (1_000_000, 20_000_000):
        counted = lognormal(count)
        taken, packing = timed(lambda counted=counted: pack_lengths(counted, CAPACITY))
        lines.append([f"{count:,}", f"{taken:.2f}", f"{packing.num_bins:,}", f"{packing.fill:.4%}"])  # type: ignore
    print("**One core, hf_objectives alone**\n")
    print(table(["documents", "seconds", "bins", "full"], lines), "\n")


if __name__ == "__main__":
    main()
