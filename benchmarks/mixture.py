"""Three sources as one: DatasetMixture against `datasets.interleave_datasets`, interleaved.

    python benchmarks/mixture.py [--rounds 5]

Sources of 50,000, 20,000 and 5,000 rows of 20 to 200 token ids, weights 0.6, 0.3 and 0.1.

Streaming: the same `IterableDataset`s to both; theirs by `probabilities` and "all_exhausted", ours by `unit="examples"`, both
20,000 rows from the beginning of a fresh stream a round; ours also by tokens, and over mapped datasets. Deviation: the
largest distance of a source from its share after any of 100,000 draws. Map-style: the seconds until an index of 1,000,000
draws is there (theirs builds it when called; ours orders blocks as they are read), and the peak of the memory that Python
and numpy allocate meanwhile. Resume: the seconds from a state to the first row after 1, 1,000 and 1,000,000 rows, and the
size of the state of ten sources.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable

import numpy as np
from _machine import describe, table
from datasets import Dataset, disable_progress_bars, interleave_datasets

from hf_objectives import build_mixture

WEIGHTS = (0.6, 0.3, 0.1)
SIZES = (50_000, 20_000, 5_000)
ROWS, DRAWS = 20_000, 100_000


def make_sources() -> list[Dataset]:
    """Rows of token ids, `of` the number of the source."""
    rng = np.random.default_rng(0)
    made = []
    for number, size in enumerate(SIZES):
        ids = [rng.integers(0, 50_000, length).tolist() for length in rng.integers(20, 200, size)]
        made.append(Dataset.from_dict({"input_ids": ids, "of": [number] * size}))
    return made


def ours(datasets: Iterable, unit: str = "examples", copies: int = 1) -> object:
    """A mixture of the sources."""
    named = [
        (f"{i}-{copy}", d, w) for copy in range(copies) for i, (d, w) in enumerate(zip(datasets, WEIGHTS, strict=True))
    ]
    return build_mixture({"sources": {n: {"dataset": d, "weight": w / copies} for n, d, w in named}, "unit": unit})


def theirs(datasets: Iterable) -> object:
    """Theirs, which takes no zero weight and draws at random."""
    return interleave_datasets(list(datasets), probabilities=list(WEIGHTS), seed=0, stopping_strategy="all_exhausted")


def rate(make: Callable[[], Iterable]) -> float:
    """Rows a second, from a fresh stream."""
    stream = make()
    begin = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(stream, ROWS))
    assert taken == ROWS
    return ROWS / (time.perf_counter() - begin)


def deviation(rows: Iterable) -> float:
    """The largest distance of a source from its share, in draws."""
    of = np.array([row["of"] for row in itertools.islice(rows, DRAWS)])
    counts = np.cumsum(of[:, None] == np.arange(len(WEIGHTS)), axis=0)
    return float(np.abs(counts - np.arange(1, len(of) + 1)[:, None] * np.array(WEIGHTS)).max())


def measured(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and in another run the MiB that were allocated at most."""
    begin = time.perf_counter()
    act()
    seconds = time.perf_counter() - begin
    tracemalloc.start()
    act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 2**20


def order(mixture: object, draws: int) -> None:
    """Order so many draws without reading a row."""
    mixture.report(draws)  # type: ignore[attr-defined]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    mapped = make_sources()
    streams = [dataset.to_iterable_dataset() for dataset in mapped]
    print(describe(), f"\n\n{options.rounds} rounds in turn, medians\n")

    ways: dict[str, Callable[[], Iterable]] = {
        "interleave_datasets, streams": lambda: theirs(streams),  # type: ignore[return-value,dict-item]
        "DatasetMixture, the same streams": lambda: ours(streams),  # type: ignore[return-value,dict-item]
        "DatasetMixture, the same streams, by tokens": lambda: ours(streams, "tokens"),  # type: ignore[return-value,dict-item]
        "DatasetMixture, mapped": lambda: ours(mapped),  # type: ignore[return-value,dict-item]
        "DatasetMixture, mapped, by tokens": lambda: ours(mapped, "tokens"),  # type: ignore[return-value,dict-item]
    }
    rounds = [[rate(make) for make in ways.values()] for _ in range(options.rounds)]
    lines = []
    for i, name in enumerate(ways):
        ratios = [rates[i] / rates[0] for rates in rounds]
        off = f"{deviation(ways[name]()):,.1f}" if "tokens" not in name else ""
        lines.append(
            [name, f"{statistics.median(rates[i] for rates in rounds):,.0f}",
             f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})", off]
        )  # fmt: skip
    print(table(["", "rows/s", "ratio", "largest deviation, draws"], lines), "\n")

    lines = []
    for draws in (200_000, 1_000_000):
        # Theirs ends when all are exhausted: larger sources for more draws.
        large = [Dataset.from_dict({"of": np.zeros(int(draws * weight), np.int8)}) for weight in WEIGHTS]
        both = [
            (measured(lambda large=large: theirs(large)), measured(lambda large=large, n=draws: order(ours(large), n)))  # type: ignore[misc]
            for _ in range(options.rounds)
        ]
        for name, side in (("interleave_datasets", 0), ("DatasetMixture", 1)):
            seconds = statistics.median(pair[side][0] for pair in both)
            lines.append(
                [f"{draws:,}", name, f"{seconds:.2f}", f"{statistics.median(pair[side][1] for pair in both):.1f}"]
            )
    print(table(["draws", "index", "seconds", "peak, MiB"], lines), "\n")

    ten = lambda: ours(mapped, "tokens", copies=4)  # noqa: E731
    mixture, lines = ten(), []
    for row in (1, 1_000, 1_000_000):
        state = json.dumps(mixture.state_dict(row))  # type: ignore[attr-defined]
        seconds = []
        for _ in range(options.rounds):
            fresh = ten()
            begin = time.perf_counter()
            fresh.load_state_dict(json.loads(state))  # type: ignore[attr-defined]
            next(iter(fresh))  # type: ignore[call-overload]
            seconds.append(time.perf_counter() - begin)
        lines.append([f"{row:,}", f"{statistics.median(seconds) * 1e3:.1f}", f"{len(state):,}"])
    print(table(["rows before", "to the next row, ms", "state of twelve sources, bytes"], lines))


if __name__ == "__main__":
    main()
