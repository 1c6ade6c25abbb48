"""What the checks cost: tokens that are encoded twice, as a share of preparation; losses of sources, as a share of a step;
checksums of shards, as a share of reading them.

    python benchmarks/checks.py --model FOLDER_OR_ID [--rows alpaca.json] [--count 20000] [--rounds 5]

Each is timed inside the whole that it is a part of, so that a busy machine slows both. Preparation runs in one process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _machine import describe, table
from chat_preparation import LENGTH, MARKED, raw_rows
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_objectives import (
    CorpusConfig,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    demo,
    load_prepared,
    prepare_corpus,
    prepare_dataset,
)
from hf_objectives.labels.tokenization import TextEncoder
from hf_objectives.preparation import stream
from hf_objectives.trainers.metrics import SourceLosses

TOKENS = 1024


def timed(owner: Any, name: str) -> list[float]:
    """Time every call of a method or of a module's function; returns the list that the seconds are written to."""
    usual, seconds = getattr(owner, name), []

    def call(*args, **kwargs):
        begin = time.perf_counter()
        result = usual(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(owner, name, call)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "tokens encoded twice, of preparation": preparation(tokenizer, options),
            "losses of two sources, of a step": training(model, tokenizer, folder, options.rounds),
            "checksums, of a stream of Parquet": streaming(tokenizer, folder, "parquet", options),
            "checksums, of a stream of Arrow": streaming(tokenizer, folder, "arrow", options),
        }
    print(describe(), "\n")
    print(f"{options.count:,} rows to prepare, steps of {TOKENS:,} tokens; {options.rounds} rounds, medians\n")
    lines = []
    for name, rounds in found.items():
        whole, part = (statistics.median(round[i] for round in rounds) for i in (0, 1))
        share = statistics.median(part / whole for whole, part in rounds)
        lines.append([name, f"{whole:.2f}", f"{part:.4f}", f"{100 * share:.2f} %"])
    print(table(["", "the whole, s", "the part, s", "share"], lines))


def preparation(tokenizer, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of each round: of preparation, and of the check in it."""
    tokenizer.chat_template = MARKED
    rows = raw_rows(options.rows, options.count)
    seconds, rounds = timed(TextEncoder, "_check_sample"), []
    for _ in range(options.rounds):
        seconds.clear()
        begin = time.perf_counter()
        prepare_dataset(rows, tokenizer, max_length=LENGTH, num_proc=1)
        rounds.append((time.perf_counter() - begin, sum(seconds)))
    return rounds


def training(model, tokenizer, folder: str, count: int) -> list[tuple[float, float]]:
    """Seconds of each step of a run: of the step, and of the sums by source in it."""
    rows = [
        {"input_ids": ids.tolist(), "labels": [-100, *ids.tolist()[1:]], "source": f"source {i % 2}"}
        for i, ids in enumerate(torch.randint(1000, len(tokenizer), (2 * count + 2, TOKENS // 2)))
    ]
    arguments = PerplexityTrainingArguments(
        folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
        per_device_train_batch_size=2, max_steps=count + 1,
    )  # fmt: skip
    trainer = PerplexityTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    steps, adds, takes = (
        timed(owner, name)
        for owner, name in ((PerplexityTrainer, "training_step"), (SourceLosses, "add"), (SourceLosses, "take"))
    )
    trainer.train()
    return list(zip(steps, map(sum, zip(adds, takes, strict=False)), strict=False))[1:]  # the first one warms up


def streaming(tokenizer, folder: str, file_format: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Seconds of each round: of an epoch of prepared rows, and of their checksums in it."""
    work, rounds, seconds = Path(folder) / file_format, [], timed(stream, "checksum_of")
    rows = Dataset.from_list(demo.texts(options.count))
    prepare_corpus({"texts": rows}, tokenizer, work, CorpusConfig(TOKENS, file_format=file_format, num_proc=1))
    for _ in range(options.rounds):
        read = load_prepared(work, streaming=True)
        seconds.clear()
        begin = time.perf_counter()
        for _ in read.rows(0, read.num_rows):
            pass
        rounds.append((time.perf_counter() - begin, sum(seconds)))
    return rounds


if __name__ == "__main__":
    main()
