"""One full training step (forward, backward, optimizer) of one row, a quarter or all of its tokens trained.

    python benchmarks/training_step.py --model FOLDER_OR_ID [--lengths 1024 2048] [--shares 0.25 1] [--rounds 3]

Ours, TRL's SFTTrainer and transformers' Trainer, each in a process of its own (so that peak memory is its own), in turn,
round after round. Every process warms up with a step of 64 tokens and times the next one. It runs one thread and counts its
own CPU time, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

CONTENDERS = ("hf_objectives", "trl", "transformers")


def build(name: str, model, tokenizer, folder: str, length: int):
    """The contender's trainer."""
    common = {"use_cpu": True, "report_to": "none", "learning_rate": 1e-5}
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    if name == "hf_objectives":
        from hf_objectives import PerplexityTrainer, PerplexityTrainingArguments

        arguments = PerplexityTrainingArguments(folder, **common)
        return PerplexityTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    if name == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(
            folder, **common, bf16=False, gradient_checkpointing=False, max_length=length,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    from transformers import Trainer, TrainingArguments

    return Trainer(model, TrainingArguments(folder, **common), train_dataset=rows, processing_class=tokenizer)


def work(name: str, path: str, length: int, share: float) -> None:
    """One process: warm up, time one step, print seconds, loss and peak memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.randint(1000, 40_000, (1, length))
    labels = ids.clone()
    labels[:, : round((1 - share) * length)] = -100
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, model, tokenizer, folder, length)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        for part in (slice(length - 64, None), slice(None)):
            own = ids[:, part]
            batch = {"input_ids": own, "labels": labels[:, part], "attention_mask": torch.ones_like(own)}
            begin = time.process_time()
            items = trainer._get_num_items_in_batch([batch], trainer.args.device)
            loss = trainer.training_step(model, batch, items)
            trainer.optimizer.step()
            model.zero_grad()
            seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT" + json.dumps({"seconds": seconds, "loss": loss.item(), "peak": peak}))


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=CONTENDERS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.model, options.lengths[0], options.shares[0])
        return
    from _machine import describe, table

    print(describe(), "\n")
    print(f"One thread, CPU time, float32, {options.rounds} rounds, medians; ratios round by round\n")
    header = ["row", "", "tokens/s", "range", "peak GiB", "loss", "ours / it: tokens/s", "ours / it: peak"]
    lines = []
    for length in options.lengths:
        for share in options.shares:
            lines += measure(options, length, share)
    print(table(header, lines))


def measure(options: argparse.Namespace, length: int, share: float) -> list[list[str]]:
    """A line for each contender."""
    results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--model", options.model, "--worker", name]
            command += ["--lengths", str(length), "--shares", str(share)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
            results[name].append(json.loads(line.removeprefix("RESULT")))
    lines = []
    for name, runs in results.items():
        rates = [length / run["seconds"] for run in runs]
        faster, smaller = (
            statistics.median(pick(ours, run) for ours, run in zip(results["hf_objectives"], runs, strict=True))
            for pick in (lambda a, b: b["seconds"] / a["seconds"], lambda a, b: a["peak"] / b["peak"])
        )
        lines.append(
            [
                f"{length:,} tokens, {share:.0%} trained",
                name,
                f"{statistics.median(rates):.1f}",
                f"{min(rates):.1f} to {max(rates):.1f}",
                f"{statistics.median(run['peak'] for run in runs):.2f}",
                f"{runs[0]['loss']:.6f}",
                f"{faster:.2f}",
                f"{smaller:.2f}",
            ]
        )
    return lines


if __name__ == "__main__":
    main()
