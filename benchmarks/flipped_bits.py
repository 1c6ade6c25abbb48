"""Change one bit of a prepared shard, load it, and count what comes of it: refused, the same rows, or other rows.

    python benchmarks/flipped_bits.py [--draws 1500] [--seed 1]

For Parquet and Arrow, mapped and as a stream: every byte of the last 1,600 (with the footer of Parquet), and bytes drawn from
the whole file, a bit drawn in each.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path

from _machine import describe, table
from datasets import Dataset, disable_progress_bars

from hf_objectives import CorpusConfig, demo, load_prepared, prepare_corpus
from hf_objectives.errors import PreparedDataError

END = 1_600


def outcomes(folder: Path, file_format: str, streaming: bool, draws: int, draw: random.Random) -> Counter[str]:
    """How many changed files were refused, gave the rows that were written, or gave others."""
    config = CorpusConfig(128, file_format=file_format, num_proc=1)
    made = prepare_corpus({"a": Dataset.from_list(demo.texts(60))}, demo.build_tokenizer(), folder, config)
    (shard,), file = made.shards, folder / made.shards[0].path

    def rows() -> list[str]:
        found = load_prepared(folder, streaming=streaming)
        return list(map(repr, found.rows(0, shard.rows) if streaming else found))

    written, whole, found = rows(), file.read_bytes(), Counter[str]()
    for place in [*range(max(0, len(whole) - END), len(whole)), *draw.choices(range(len(whole)), k=draws)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            found["the same rows" if rows() == written else "OTHER ROWS"] += 1
        except PreparedDataError:
            found["refused"] += 1
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1_500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    disable_progress_bars()
    lines, draw = [], random.Random(options.seed)
    for file_format in ("parquet", "arrow"):
        for streaming in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                found = outcomes(Path(folder), file_format, streaming, options.draws, draw)
            counts = [found[name] for name in ("refused", "the same rows", "OTHER ROWS")]
            lines.append([f"{file_format}, {'stream' if streaming else 'mapped'}", *map(str, (sum(counts), *counts))])
    print(describe(), "\n")
    print(table(["", "bits changed, one at a time", "refused", "the same rows", "other rows"], lines))


if __name__ == "__main__":
    main()
