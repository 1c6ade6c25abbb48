"""One full DPO step (policy, reference, backward, optimizer): packed pairs with shared prompts against TRL's padded ones.

    python benchmarks/dpo_step.py --model FOLDER_OR_ID --pairs dpo_en_demo.json [--max-length 512] [--batch 4]
    python benchmarks/dpo_step.py --model FOLDER_OR_ID --answer 100          # prompts four times as long as the answers

Ours with `padding_free=True` and TRL's DPOTrainer, each in a process of its own (so that peak memory is its own), in turn,
round after round, on the same padded batches. Every process warms up with two short pairs, which is where ours is proved, and
times the steps on the batches. It runs one thread and counts its own CPU time, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONTENDERS = ("hf_objectives", "trl")


def pairs_of(options, tokenizer) -> list[dict]:
    """Encoded pairs: real ones in a seeded order, or random ids with prompts four times as long as the answers."""
    chance, count = random.Random(0), options.batch * options.batches
    if options.answer:

        def ids(length):
            return [chance.randrange(1000, 40_000) for _ in range(length)]

        return [
            {
                "prompt_ids": ids(4 * options.answer),
                **{f"{side}_ids": ids(options.answer) for side in ("chosen", "rejected")},
                **{f"{side}_mask": [1] * options.answer for side in ("chosen", "rejected")},
            }
            for _ in range(count)
        ]
    from hf_objectives.labels import encode_pair

    rows = chance.sample(json.loads(Path(options.pairs).read_text()), count)
    return [encode_pair(tokenizer, row, max_length=options.max_length) for row in rows]


def build(name: str, model, reference, tokenizer, folder: str):
    """The contender's trainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from hf_objectives import PerplexityDPOConfig, PerplexityDPOTrainer

    ours = name != "trl"
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "learning_rate": 1e-6, "gradient_checkpointing": False,
        "padding_free": ours,
    }  # fmt: skip
    rows = Dataset.from_list([{"prompt": "One and one is", "chosen": " two.", "rejected": " three."}] * 2)
    return (PerplexityDPOTrainer if ours else DPOTrainer)(
        model,
        reference,
        (PerplexityDPOConfig if ours else DPOConfig)(folder, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def time_steps(options, trainer, collate: Callable, pairs: list[dict]) -> None:
    """Warm up, time the steps, print seconds, losses, tokens computed in the layers, and peak memory."""
    model = trainer.model
    short = [{key: value[-8:] for key, value in pair.items()} for pair in pairs[:2]]
    batches = [pairs[i : i + options.batch] for i in range(0, len(pairs), options.batch)]
    tokens, seconds, losses = 0, 0.0, []

    def count(module, args):
        nonlocal tokens
        tokens += args[0].shape[0] * args[0].shape[1]

    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    handle = None
    for rows in (short, *batches):
        batch = collate(rows)
        begin = time.process_time()
        loss = trainer.training_step(model, batch)
        trainer.optimizer.step()
        model.zero_grad()
        if handle is not None:
            seconds += time.process_time() - begin
            losses.append(loss.item())
        else:
            handle = model.model.layers[0].register_forward_pre_hook(count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT" + json.dumps({"seconds": seconds, "losses": losses, "tokens": tokens, "peak": peak}))


def work(options) -> None:
    """One process of DPO."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_objectives import DataCollatorForPreferencePairs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, reference = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options.worker, model, reference, tokenizer, folder)
        time_steps(options, trainer, DataCollatorForPreferencePairs(tokenizer), pairs_of(options, tokenizer))


def main(description: str | None = __doc__, work: Callable = work) -> None:
    """Run the rounds and print."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", help="a JSON file of preference rows")
    parser.add_argument("--answer", type=int, help="tokens of each answer of random pairs, in place of --pairs")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=CONTENDERS)
    options = parser.parse_args()
    if not options.pairs and not options.answer:
        parser.error("one of --pairs and --answer is needed")
    if options.worker:
        work(options)
        return
    from _machine import describe, table

    results: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            command = [sys.executable, *sys.argv, "--worker", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
            results[name].append(json.loads(line.removeprefix("RESULT")))
    pairs = options.batch * options.batches
    rate = {name: [pairs / one["seconds"] for one in runs] for name, runs in results.items()}
    lines = [
        [
            name,
            f"{statistics.median(rate[name]):.4f}",
            f"{min(rate[name]):.4f} to {max(rate[name]):.4f}",
            f"{runs[0]['tokens']:,}",
            f"{statistics.median(one['peak'] for one in runs):.2f}",
            ", ".join(f"{loss:.6f}" for loss in runs[0]["losses"]),
        ]
        for name, runs in results.items()
    ]
    print(describe(), "\n")
    kind = f"prompts of {4 * options.answer} and answers of {options.answer} tokens" if options.answer else "real pairs"
    cut = "" if options.answer else f" of at most {options.max_length} tokens"
    print(f"{pairs} {kind}{cut} in batches of {options.batch}, float32, {options.rounds} rounds, medians\n")
    print(table(["", "pairs/s of CPU time", "range", "tokens in the layers", "peak GiB", "losses"], lines))
    fewer = results["trl"][0]["tokens"] / results[CONTENDERS[0]][0]["tokens"]
    against = [ours / theirs for ours, theirs in zip(rate["hf_objectives"], rate["trl"], strict=True)]
    print(f"\nhf_objectives / trl, round by round: median {statistics.median(against):.2f} "
          f"({min(against):.2f} to {max(against):.2f}); ratio of tokens computed: {fewer:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
