"""Rows a second of chat preparation in one process, under four chat templates, for two checkouts of the package.

    python benchmarks/chat_templates.py --tokenizer FOLDER_OR_ID --alpaca FILE.json --tools FILE.json
        [--against CHECKOUT] [--count 2000] [--rounds 5]

The rows: Alpaca rows (`prepare_dataset`), ShareGPT rows with tool calls (`prepare_dataset`), and generated conversations of
2 to 20 messages (`encode_chats`). A first pass over the rows warms encoder and tokenizer. The clock is process CPU time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import trl
from _machine import describe, table
from _sides import clocked, measure, median, report

TEMPLATES = {"SmolLM2": None, "Qwen2.5": "qwen2_5", "Qwen3": "qwen3", "Llama 3.1": "llama3_1"}
KINDS = ("alpaca", "tool calls", "conversations")


def conversations(count: int) -> list[list[dict]]:
    """Conversations of several turns, some with a system message."""
    words = "the model reads every token of a row and learns to write the next one".split()
    rng = random.Random(0)
    made = []
    for _ in range(count):
        chat = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
        for i in range(2 * rng.randint(1, 10)):
            text = " ".join(rng.choices(words, k=rng.randint(4, 40)))
            chat.append({"role": ("user", "assistant")[i % 2], "content": text})
        made.append(chat)
    return made


def side(options: argparse.Namespace) -> None:
    """Measure the package on the path."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import AutoTokenizer

    from hf_objectives import encode_chats, prepare_dataset
    from hf_objectives.errors import DataError

    disable_caching()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    own = tokenizer.chat_template
    chats = conversations(options.count)
    rows = {}
    for kind, path in (("alpaca", options.alpaca), ("tool calls", options.tools)):
        read = json.loads(Path(path).read_text())
        rows[kind] = Dataset.from_list([read[i % len(read)] for i in range(options.count)])
    numbers = {}
    for label, name in TEMPLATES.items():
        folder = Path(trl.__file__).parent / "chat_templates"
        tokenizer.chat_template = own if name is None else (folder / f"{name}.jinja").read_text()
        for kind in KINDS:
            if kind == "conversations":
                encode_chats(tokenizer, chats)
                seconds = clocked(lambda: encode_chats(tokenizer, chats), time.process_time)
            else:

                def prepare(data, kind=kind):
                    prepare_dataset(data, tokenizer, max_length=100_000, packing=False, num_proc=1)

                try:
                    prepare(rows[kind])
                except DataError:  # the template refuses such rows
                    continue
                seconds = clocked(lambda p=prepare, k=kind: p(rows[k]), time.process_time)
            numbers[f"{label}|{kind}"] = options.count / seconds
    report(numbers)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--alpaca", required=True)
    parser.add_argument("--tools", required=True)
    parser.add_argument("--against")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return side(options)
    arguments = ["--tokenizer", options.tokenizer, "--alpaca", options.alpaca, "--tools", options.tools]
    sides = measure(__file__, [*arguments, "--count", str(options.count)], options.against, options.rounds)
    print(describe(), "\n")
    print(f"{options.count:,} rows, {options.rounds} rounds, medians, rows a second of CPU time\n")
    lines = []
    for key in sides[0]:
        rates = [median(numbers, key) for numbers in sides[::-1]]
        lines.append([*key.split("|"), *(f"{rate:,.0f}" for rate in rates), f"{rates[-1] / rates[0]:.2f}"])
    heads = ["before", "now", "ratio"] if options.against else ["now", "ratio"]
    print(table(["template", "rows", *heads], lines))


if __name__ == "__main__":
    main()
