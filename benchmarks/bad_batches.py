"""How often the live monitor names an injected bad batch, how often it cries without one, and what it costs a step.

    python benchmarks/bad_batches.py [--runs 60] [--steps 100 600]

Trains the demo model for 60 steps with one bad batch (random tokens, labels of other places, one token again and again,
reversed text, a damaged encoding), or one bad row of eight, at a random step; healthy runs beside them. Named means: an event
within five steps, whose suspects are of the bad rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import describe, table
from datasets import Dataset

from hf_objectives import (
    DataCollatorForAssistantOnlyLM,
    DiagnosticsCallback,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    demo,
)
from hf_objectives.diagnostics import callback

STEPS, LENGTH = 60, 64
FAULTS = ("random tokens", "labels of other places", "one token again and again", "reversed", "damaged encoding")


def spoiled(row: dict[str, Any], fault: str, draw: random.Random, tokenizer: Any) -> dict[str, Any]:
    """The row with a fault."""
    ids = list(row["input_ids"])
    labels = list(ids)
    if fault == "random tokens":
        ids = [draw.randrange(10, len(tokenizer)) for _ in ids]
        labels = list(ids)
    elif fault == "labels of other places":
        draw.shuffle(labels)
    elif fault == "one token again and again":
        labels = [draw.randrange(10, len(tokenizer))] * len(ids)
    elif fault == "reversed":
        ids = ids[::-1]
        labels = list(ids)
    else:
        text = "".join(chr(draw.randrange(0x00C0, 0x0250)) for _ in range(LENGTH))
        ids = (tokenizer(text)["input_ids"] * 3)[: len(ids)]
        labels = list(ids)
    return {**row, "input_ids": ids, "labels": labels}


def make_trainer(
    folder: str, seed: int, *, fault: str | None, whole: bool, batch: int, accumulation: int, steps: int = STEPS
):
    """A trainer, the step of its bad batch and the numbers of its bad rows."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = demo.build_tokenizer()
    texts = demo.texts(steps * batch * accumulation + seed)[seed:]
    rows = [
        {"input_ids": (tokenizer(one["text"])["input_ids"] * 20)[:LENGTH], "source": "web", "row": i}
        for i, one in enumerate(texts)
    ]
    rows = [{**row, "labels": list(row["input_ids"])} for row in rows]
    step = draw.randrange(25, steps - 3)
    first = (step - 1) * batch * accumulation
    bad = range(first, first + (batch * accumulation if whole else 1))
    if fault is None:
        step, bad = 0, range(0)
    for i in bad:
        rows[i] = spoiled(rows[i], fault, draw, tokenizer)
    args = PerplexityTrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        learning_rate=draw.choice([2e-4, 5e-4, 1e-3]), logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        train_sampling_strategy="sequential", disable_tqdm=True, seed=seed,
    )  # fmt: skip
    model = demo.build_model(tokenizer)
    model.load_state_dict(_trained())
    trainer = PerplexityTrainer(
        model, args, DataCollatorForAssistantOnlyLM(tokenizer),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    return trainer, step, set(bad)


@functools.cache
def _trained() -> dict[str, torch.Tensor]:
    """Weights that know such text: what is bad about labels shows in the loss of a model that predicts good ones."""
    torch.manual_seed(0)
    tokenizer = demo.build_tokenizer()
    model = demo.build_model(tokenizer)
    ids = [(tokenizer(one["text"])["input_ids"] * 20)[:LENGTH] for one in demo.texts(20_000)[10_000:]]
    rows = [{"input_ids": one, "labels": list(one)} for one in ids]
    with tempfile.TemporaryDirectory() as folder:
        args = PerplexityTrainingArguments(
            folder, max_steps=500, per_device_train_batch_size=16, learning_rate=3e-3, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_list(rows)
        PerplexityTrainer(model, args, DataCollatorForAssistantOnlyLM(tokenizer), train_dataset=data).train()
    return {name: value.clone() for name, value in model.state_dict().items()}


def one_run(seed: int, fault: str | None, *, whole: bool) -> tuple[bool, bool, int]:
    """Whether an event came within five steps, whether its suspects are bad rows, and the number of other events."""
    batch, accumulation = random.Random(seed).choice([(4, 1), (8, 1), (4, 2)]) if whole else (8, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer, step, bad = make_trainer(
            folder, seed, fault=fault, whole=whole, batch=batch, accumulation=accumulation
        )
        trainer.add_callback(DiagnosticsCallback(trainer))
        trainer.train()
        events = [json.loads(path.read_text()) for path in Path(folder).glob("diagnostics/*/event.json")]
    near = [event for event in events if bad and 0 <= event["step"] - step <= 5]
    named = {one["row"] for event in near for one in event["examples"] if one["suspect"]}
    return bool(near), bool(named) and named <= bad, len(events) - len(near)


def own_share(steps: int) -> list[str]:
    """The part of a training's time that is spent in the callback, by the clock around what it does.

    Two trainings in turn, with and without it, differ by several percent for other reasons.
    """
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin

        return call

    with tempfile.TemporaryDirectory() as folder:
        trainer, _, _ = make_trainer(folder, 1, fault=None, whole=True, batch=16, accumulation=1, steps=steps)
        watch = DiagnosticsCallback(trainer)
        for name in ("on_pre_optimizer_step", "on_log", "on_train_begin", "on_train_end"):
            setattr(watch, name, timed(name, getattr(watch, name)))
        usual, callback.random_state = callback.random_state, timed("random_state", callback.random_state)
        trainer.add_callback(watch)
        try:
            begin = time.perf_counter()
            trainer.train()
            whole = time.perf_counter() - begin
        finally:
            callback.random_state = usual
    parts = ("on_pre_optimizer_step", "on_log", "random_state")
    shares = [f"{spent[name] / whole:.2%}" for name in parts]
    return [str(steps), f"{1000 * whole / steps:.1f}", *shares, f"{sum(spent.values()) / whole:.2%}"]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="runs with a bad batch; a third as many healthy ones")
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 600], help="of trainings whose cost is measured")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    print(describe())
    rows = []
    for whole in (True, False):
        for fault in FAULTS:
            outcomes = [
                one_run(100 * i + 7, fault, whole=whole)
                for i in range(given.runs // len(FAULTS) // (1 if whole else 2))
            ]
            caught, named, others = (sum(int(outcome[k]) for outcome in outcomes) for k in range(3))
            rows.append(
                [fault, "whole" if whole else "one row of eight", *map(str, (len(outcomes), caught, named, others))]
            )
    if given.runs:
        healthy = [one_run(1000 + i, None, whole=True)[2] for i in range(given.runs // 3)]
        rows.append(["none", "", str(len(healthy)), "", "", str(sum(healthy))])
        print(f"\n### bad batches: {STEPS} steps a run\n")
        heads = ["fault", "batch", "runs", "caught within 5 steps", "bad rows named, no others", "other events"]
        print(table(heads, rows))
    costs = [own_share(steps) for steps in given.steps]
    print("\n### cost of the callback\n")
    print(table(["steps", "ms a step", "judging and looks", "detectors", "random states", "in all"], costs))


if __name__ == "__main__":
    main()
