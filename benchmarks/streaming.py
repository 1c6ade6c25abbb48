"""Rows of a prepared folder as a shuffled stream: PreparedStream against the stream of `datasets`, interleaved.

    python benchmarks/streaming.py --tokenizer FOLDER_OR_ID --texts FILE [FILE ...] [--megabytes 100] [--rounds 5]

The same shards, made from texts over and over with one word in twenty changed, packed to 2,048 tokens. Theirs is
`load_dataset(..., streaming=True).shuffle(buffer_size=1000)`, ours mixes windows of eight row groups. A round takes 2,000
rows from the beginning of a fresh stream, opening included; then the seconds to the first row after a million others, which
theirs would read.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _corpus import write_corpus
from _machine import describe, table
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer

from hf_objectives import CorpusSettings, load_prepared, prepare_corpus

ROWS = 2_000


def rate(stream: Callable) -> float:
    """Rows a second."""
    begin = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(stream(), ROWS))
    assert taken == ROWS
    return ROWS / (time.perf_counter() - begin)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    disable_progress_bars()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(options.texts, folder, options.megabytes)
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        for kind in ("arrow", "parquet"):
            settings = CorpusSettings(2048, file_format=kind)
            made = prepare_corpus({"c": str(corpus)}, tokenizer, folder / kind, settings)
            files = [str(folder / kind / shard.path) for shard in made.shards]

            def theirs(kind: str = kind, files: list[str] = files) -> object:
                rows = load_dataset(kind, data_files=files, split="train", streaming=True)
                return rows.shuffle(seed=0, buffer_size=1_000)

            def ours(kind: str = kind) -> object:
                return load_prepared(folder / kind, streaming=True)

            rates = [(rate(theirs), rate(ours)) for _ in range(options.rounds)]
            begin = time.perf_counter()
            next(ours().rows(1_000_000, 1_000_001))  # type: ignore[attr-defined]
            seek = time.perf_counter() - begin
            ratios = [mine / other for other, mine in rates]
            lines.append(
                [kind, *(f"{statistics.median(of):,.0f}" for of in zip(*rates, strict=True)),
                 f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})", f"{seek:.3f}"]
            )  # fmt: skip
    print(describe(), f"\n\n{options.rounds} rounds in turn, medians\n")
    print(table(["shards", "datasets, rows/s", "hf_objectives, rows/s", "ratio", "to row 1,000,000, seconds"], lines))


if __name__ == "__main__":
    main()
