"""Perplexity of the same texts: compute_perplexity against evaluate's metric, interleaved; what the exact figures cost an
evaluation of preference pairs; and an evaluation of rows against bare forward passes over the same batches.

    python benchmarks/evaluation.py --model FOLDER_OR_ID [--rows alpaca.json] [--texts 24] [--rounds 5]
        [--metric perplexity.py]
    python benchmarks/evaluation.py --model FOLDER_OR_ID --dpo [--rows pairs.json] [--texts 64] [--rounds 5]
    python benchmarks/evaluation.py --model FOLDER_OR_ID --forward [--texts 16] [--rounds 5]    # one thread, CPU time

evaluate loads its metric from the Hub. `--metric` names a copy of it (metrics/perplexity/perplexity.py of
huggingface/evaluate), which is then run as it is; without one the metric is loaded by name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import evaluate
import torch
from _machine import describe, table
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import DPOConfig, DPOTrainer

from hf_objectives import (
    DataCollatorForPreferencePairs,
    PerplexityDPOConfig,
    PerplexityDPOTrainer,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    compute_perplexity,
    demo,
)
from hf_objectives.labels.pairs import encode_pair


def one_by_one(model, tokenizer, texts: list[str]) -> float:
    """The definition: each document alone, total nats over total tokens, in float64."""
    nats = tokens = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1].double()
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return nats / tokens


def preference_pairs(options: argparse.Namespace) -> None:
    """`evaluate` of PerplexityDPOTrainer and of trl.DPOTrainer on the same encoded pairs, in turn."""
    rows = json.loads(Path(options.rows).read_text()) if options.rows else demo.preferences(options.texts, split="test")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encoded = [encode_pair(tokenizer, row, max_length=256, row_index=i) for i, row in enumerate(rows[: options.texts])]
    pairs = Dataset.from_list([{**pair, "row": i} for i, pair in enumerate(encoded)])
    trainers: dict[str, Any] = {}
    for name, kind, config in (
        ("trl.DPOTrainer", DPOTrainer, DPOConfig),
        ("PerplexityDPOTrainer", PerplexityDPOTrainer, PerplexityDPOConfig),
    ):
        settings = config(
            tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=256,
            remove_unused_columns=False,  # the parent would take the masks off the rows
        )  # fmt: skip
        policy, reference = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2))
        trainers[name] = kind(
            policy,
            reference,
            settings,
            # Both are given the same rows and masks; the parent's own preparation is no part of an evaluation.
            data_collator=DataCollatorForPreferencePairs(tokenizer),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
        )
        trainers[name].eval_dataset = pairs
    times: dict[str, list[float]] = {name: [] for name in trainers}
    values: dict[str, float] = {}
    for turn in range(options.rounds + 1):  # the first warms up
        for name in [*trainers] if turn % 2 else [*trainers][::-1]:
            begin = time.perf_counter()
            values[name] = trainers[name].evaluate()["eval_loss"]
            if turn:
                times[name].append(time.perf_counter() - begin)
    theirs, ours = times.values()
    against = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(describe(), "\n")
    print(f"{len(pairs)} pairs, {options.rounds} rounds in turn, medians\n")
    lines = [
        [name, f"{statistics.median(t):.3f}", f"{min(t):.3f} to {max(t):.3f}", f"{values[name]:.6f}"]
        for name, t in times.items()
    ]
    print(table(["", "seconds", "range", "loss"], lines))
    print(f"\nPerplexityDPOTrainer / trl.DPOTrainer, round by round: median {statistics.median(against):.3f} "
          f"({min(against):.3f} to {max(against):.3f})")  # fmt: skip


def forward_passes(options: argparse.Namespace) -> None:
    """`PerplexityTrainer.evaluate` of rows of 64 to 320 tokens, all trained, against forward passes without a loss."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 321, (options.texts,), generator=chance).tolist()
    ids = [torch.randint(1000, len(tokenizer), (length,), generator=chance).tolist() for length in lengths]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    lines = []
    for size in (1, 4, 16):
        arguments = PerplexityTrainingArguments(
            tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=size
        )
        trainer = PerplexityTrainer(model, arguments, eval_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        batches = [
            {name: batch[name] for name in ("input_ids", "attention_mask")} for batch in trainer.get_eval_dataloader()
        ]
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for turn in range(options.rounds + 1):  # the first warms up
            for name in [*times] if turn % 2 else [*times][::-1]:
                begin = time.process_time()
                if name == "ours":
                    loss = trainer.evaluate()["eval_loss"]
                else:
                    with torch.no_grad():
                        for batch in batches:
                            model(**batch, use_cache=False)
                if turn:
                    times[name].append(time.process_time() - begin)
        against = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
        bare, ours = (statistics.median(times[name]) for name in ("bare", "ours"))
        ratio = f"{statistics.median(against):.2f} ({min(against):.2f} to {max(against):.2f})"
        lines.append([str(size), f"{bare:.2f}", f"{ours:.2f}", ratio, f"{loss:.6f}"])
    print(describe(), "\n")
    print(
        f"{len(rows)} rows, {sum(lengths):,} tokens, all trained; {options.rounds} rounds in turn, one thread, CPU time\n"
    )
    print(
        table(["batch size", "bare forward, s", "evaluate, s", "ratio, round by round: median (range)", "loss"], lines)
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--metric", default="perplexity")
    parser.add_argument("--dpo", action="store_true", help="time an evaluation of preference pairs")
    parser.add_argument("--forward", action="store_true", help="time an evaluation of rows against bare forward passes")
    options = parser.parse_args()
    if options.forward:
        forward_passes(options)
        return
    if options.dpo:
        preference_pairs(options)
        return
    if options.rows:
        texts = [row["output"] for row in json.loads(Path(options.rows).read_text())[: options.texts]]
    else:
        texts = [row["text"] for row in demo.texts(options.texts)]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    # The metric loads the checkpoint's own dtype; a float32 copy puts both on the same arithmetic.
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    metric = evaluate.load(options.metric, module_type="metric")
    tokens = sum(len(ids) - 1 for ids in tokenizer(texts)["input_ids"])

    def theirs() -> float:
        # The metric loads the model itself; that part is its own, and left out of its time by timing it alone below.
        return metric.compute(predictions=texts, model_id=folder, add_start_token=False, device="cpu")[
            "mean_perplexity"
        ]

    def loading() -> None:
        AutoModelForCausalLM.from_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)

    times: dict[str, list[float]] = {"evaluate": [], "hf_objectives": [], "one document at a time": []}
    values: dict[str, float] = {}
    for _ in range(options.rounds):
        begin = time.perf_counter()
        loading()
        load = time.perf_counter() - begin
        for name, run in (
            ("evaluate", theirs),
            ("hf_objectives", lambda: compute_perplexity(model, tokenizer, texts).perplexity),
            ("one document at a time", lambda: float(torch.tensor(one_by_one(model, tokenizer, texts)).double().exp())),
        ):
            begin = time.perf_counter()
            values[name] = run()
            times[name].append(time.perf_counter() - begin - (load if name == "evaluate" else 0))
    rate = {name: [tokens / seconds for seconds in all_times] for name, all_times in times.items()}
    against = [ours / other for ours, other in zip(rate["hf_objectives"], rate["evaluate"], strict=True)]
    print(describe(), "\n")
    print(f"{len(texts)} texts, {tokens:,} predicted tokens, {options.rounds} rounds, medians\n")
    lines = [
        [name, f"{statistics.median(r):.0f}", f"{min(r):.0f} to {max(r):.0f}", f"{values[name]:.4f}"]
        for name, r in rate.items()
    ]
    print(table(["", "tokens/s", "range", "perplexity"], lines))
    print(f"\nhf_objectives / evaluate, round by round: median {statistics.median(against):.2f} "
          f"({min(against):.2f} to {max(against):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
