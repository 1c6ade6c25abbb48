"""Tokenisation with positions, with and without fastokens, against the bare calls of both backends on the same texts.

    python benchmarks/tokenization.py --tokenizer FOLDER_OR_ID --rows alpaca.json [--count 20000] [--rounds 5]

The texts are Alpaca rows under the tokenizer's chat template. `tokenizers` encodes a batch on all cores. The
clock is wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from _machine import describe, table
from transformers import AutoTokenizer

from hf_objectives.labels.tokenization import TextEncoder

BATCH = 2000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    rows = json.loads(Path(options.rows).read_text())
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    texts = [rendered[i % len(rendered)] for i in range(options.count)]
    with_fast, without = TextEncoder(tokenizer), TextEncoder(tokenizer)
    without._fast = None
    backend = without._slow
    ways = {
        "encode_batch_fast of tokenizers, ids alone": lambda part: backend.encode_batch_fast(
            part, add_special_tokens=False
        ),
        "ours without fastokens": without.encode_batch,
        f"ours with {with_fast.backend}": with_fast.encode_batch,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, encode in ways.items():
            begin = time.perf_counter()
            for i in range(0, len(texts), BATCH):
                encode(texts[i : i + BATCH])
            rates[name].append(len(texts) / (time.perf_counter() - begin))
    base = statistics.median(rates[next(iter(ways))])
    lines = []
    for name, found in rates.items():
        middle = statistics.median(found)
        lines.append([name, f"{middle:,.0f}", f"{min(found):,.0f} to {max(found):,.0f}", f"{middle / base:.2f}"])
    print(describe(), "\n")
    print(f"{options.count:,} texts, {options.rounds} rounds, medians\n")
    print(table(["", "texts/s", "range", "against encode_batch_fast"], lines))


if __name__ == "__main__":
    main()
