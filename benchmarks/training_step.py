"""One full training step (forward, backward, optimizer) at 2,048 tokens, a quarter of them supervised.

    python benchmarks/training_step.py --model FOLDER_OR_ID [--rounds 5]

Ours, TRL's SFTTrainer and transformers' Trainer, each in a process of its own (so that peak memory is its own), in turn,
round after round. Every process warms up with one step and times the next.
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

LENGTH, SUPERVISED = 2048, 512
CONTENDERS = ("hf_objectives", "trl", "transformers")


def build(name: str, model, tokenizer, folder: str):
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
            folder, **common, bf16=False, gradient_checkpointing=False, max_length=LENGTH,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    from transformers import Trainer, TrainingArguments

    return Trainer(model, TrainingArguments(folder, **common), train_dataset=rows, processing_class=tokenizer)


def work(name: str, path: str) -> None:
    """One process: warm up, time one step, print seconds, loss and peak memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.randint(1000, 40_000, (1, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH - SUPERVISED] = -100
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, model, tokenizer, folder)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        for timed in (False, True):
            batch = {"input_ids": ids.clone(), "labels": labels.clone(), "attention_mask": torch.ones_like(ids)}
            begin = time.perf_counter()
            items = trainer._get_num_items_in_batch([batch], trainer.args.device)
            loss = trainer.training_step(model, batch, items)
            trainer.optimizer.step()
            model.zero_grad()
            seconds = time.perf_counter() - begin
            first = loss.item() if not timed else first  # noqa: F821
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT" + json.dumps({"seconds": seconds, "loss": first, "peak": peak}))


def main() -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=CONTENDERS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.model)
        return
    from _machine import describe, table

    results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--model", options.model, "--worker", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
            results[name].append(json.loads(line.removeprefix("RESULT")))
    rate = {name: [LENGTH / one["seconds"] for one in runs] for name, runs in results.items()}
    against = [ours / theirs for ours, theirs in zip(rate["hf_objectives"], rate["trl"], strict=True)]
    lines = [
        [
            name,
            f"{statistics.median(rate[name]):.0f}",
            f"{min(rate[name]):.0f} to {max(rate[name]):.0f}",
            f"{statistics.median(one['peak'] for one in runs):.2f}",
            f"{runs[0]['loss']:.6f}",
        ]
        for name, runs in results.items()
    ]
    print(describe(), "\n")
    print(f"1 x {LENGTH:,} tokens, {SUPERVISED} supervised, float32, {options.rounds} rounds, medians\n")
    print(table(["", "tokens/s", "range", "peak GiB", "loss of the first step"], lines))
    print(f"\nhf_objectives / trl, round by round: median {statistics.median(against):.2f} "
          f"({min(against):.2f} to {max(against):.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
