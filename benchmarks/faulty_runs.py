"""Runs of the demo model with faults put in on purpose, and healthy ones: what the detectors of `diagnose` are measured on.

    OMP_NUM_THREADS=1 python benchmarks/faulty_runs.py --out FOLDER [--only PATTERN] [--seed N]

Writes `<name>/trainer_state.json` for each run and one `labels.json`: for each name the fault, the step of its beginning, the
kinds of which one has to be found (`expected`, or `any_of` where it is empty), those that would be true too and are no
false alarm (`also`), and the half: "develop" to build detectors on, "report" to measure them on. A run that is there already
is not run again. About a quarter of an hour on one core. With a seed other than 0 rows, weights and order are new, and rates
and lengths differ somewhat: runs that nobody has looked at.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_objectives import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking, demo
from hf_objectives.labels.rows import encode_row
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments

IGNORE = -100
Batch = dict[str, Any]
Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Run:
    """One run: what it trains on, how, and what is wrong with it.

    Attributes:
        fault: the name of the fault, "healthy" without one.
        first_step: the optimizer step with which it begins; None where there is none.
        rows: "texts" or "chats"; "by_source", texts of one skill each in the order of the skills; "chats_by_source", chats
            without calls before those with, the short ones first.
        trained: start from a checkpoint that has seen the texts, not from random weights.
        spoil_rows: of the rows before training; train and validation where `spoil_eval`.
        spoil_batch: of a batch in a training step, by the number of the step.
        spoil_model: of the model before training.
        factor: of the learning rate, by the number of steps done.
        plain: transformers' own Trainer, as it is.
    """

    name: str
    fault: str = "healthy"
    expected: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    first_step: int | None = None
    rows: str = "texts"
    n_rows: int = 2000
    steps: int = 160
    batch: int = 4
    rate: float = 2e-3
    packed: int = 0
    trained: bool = False
    plain: bool = False
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    spoil_rows: Callable[[Rows, random.Random], Rows] | None = None
    spoil_eval: bool = True
    spoil_batch: Callable[[Batch, int], Batch] | None = None
    spoil_model: Callable[[Any], None] | None = None
    factor: Callable[[int], float] | None = None


# -- faults ------------------------------------------------------------------------------------------------------


def random_ids(first: int, last: int) -> Callable[[Batch, int], Batch]:
    """From one step to another, tokens drawn at random: a broken shard."""

    def spoil(batch: Batch, step: int) -> Batch:
        if not first <= step <= last:
            return batch
        ids = torch.randint(6, 600, batch["input_ids"].shape, generator=torch.Generator().manual_seed(step))
        return {**batch, "input_ids": ids, "labels": torch.where(batch["labels"] == IGNORE, IGNORE, ids)}

    return spoil


def shuffle_labels(rows: Rows, rng: random.Random) -> Rows:
    """The labels of all rows dealt out anew: only how often a token occurs can be learnt."""
    labels = [label for row in rows for label in row["labels"] if label != IGNORE]
    rng.shuffle(labels)
    dealt = iter(labels)
    return [{**row, "labels": [IGNORE if one == IGNORE else next(dealt) for one in row["labels"]]} for row in rows]


def shift_twice(rows: Rows, rng: random.Random) -> Rows:
    """Labels moved the wrong way, so that each place predicts the very token that it reads."""
    return [{**row, "labels": [IGNORE, *row["input_ids"][:-1]]} for row in rows]


def freeze_body(model: Any) -> None:
    """Only the norms train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)


def freeze_all_but_last_norm(model: Any) -> None:
    """Only the last norm trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.norm.weight")


def read_ahead(model: Any) -> None:
    """Attention without the causal mask."""

    def open_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        ids = kwargs["input_ids"]
        keep = torch.ones_like(ids) if mask is None else mask
        seen = torch.where(keep[:, None, None, :].bool(), 0.0, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": seen.expand(-1, 1, ids.shape[1], -1).contiguous()}

    model.model.register_forward_pre_hook(open_mask, with_kwargs=True)


def overflow(first: int, where: str = "norm", last: int = 10**9) -> Callable[[Any], None]:
    """Activations that leave the range of float16 from one training step on, at the last norm or in a layer's MLP."""

    def spoil(model: Any) -> None:
        step = 0

        def cast(module: Any, args: Any, output: Tensor) -> Tensor:
            nonlocal step
            if not module.training:
                return output
            step += 1
            scale = 2.0**18 if first <= step <= last else 1.0
            return (output * scale).half().float() / scale

        part = model.model.norm if where == "norm" else model.model.layers[1].mlp.down_proj
        part.register_forward_hook(cast)

    return spoil


def jump(at: int, by: float, last: int = 10**9) -> Callable[[int], float]:
    """A factor of the learning rate from one step on."""
    return lambda done: by if at <= done <= last else 1.0


# -- trainers ----------------------------------------------------------------------------------------------------


class _WithFaults:
    """What both trainers take from a run; stands before the trainer in the order of classes."""

    run: Run
    skips_bad_steps = False

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        if self.run.spoil_batch:
            inputs = self.run.spoil_batch(inputs, self.state.global_step + 1)  # type: ignore[attr-defined]
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.skips_bad_steps and not torch.isfinite(loss):
            model.zero_grad()  # as the scaler of mixed precision does
        return loss

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        scheduler, factor = super().create_scheduler(*args, **kwargs), self.run.factor  # type: ignore[misc]
        if factor:
            scheduler.lr_lambdas = [
                lambda done, usual=usual: usual(done) * factor(done) for usual in scheduler.lr_lambdas
            ]
        return scheduler


class _Plain(_WithFaults, Trainer):
    """transformers' Trainer."""


class _Ours(_WithFaults, PerplexityTrainer):
    """PerplexityTrainer."""


def rows_of(run: Run, tokenizer: Any, n: int, split: str) -> Rows:
    """Encoded rows."""
    if run.rows.startswith("chats"):
        raw = demo.chats(n, seed=run.seed, split=split)  # type: ignore[arg-type]
        if run.rows == "chats_by_source":
            raw.sort(key=lambda row: (row["source"], len(row["messages"])))
    elif run.rows == "by_source":
        names = sorted(demo.SKILLS)
        raw = [row for s in names for row in demo.texts(n // len(names), seed=run.seed, split=split, skills=[s])]  # type: ignore[arg-type]
    else:
        raw = demo.texts(n, seed=run.seed, split=split)  # type: ignore[arg-type]
    encoded = [encode_row(tokenizer, row) for row in raw]
    return [{key: list(row[key]) for key in ("input_ids", "labels")} for row in encoded]


def train(run: Run, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None) -> Any:
    """Train and keep the log; gives the model."""
    set_seed(run.seed)
    rng = random.Random(run.seed)
    model = demo.build_model(tokenizer, seed=run.seed)
    if weights:
        model.load_state_dict(weights)
    own, held_out = rows_of(run, tokenizer, run.n_rows, "train"), rows_of(run, tokenizer, 48, "test")
    if run.spoil_rows:
        own = run.spoil_rows(own, rng)
        held_out = run.spoil_rows(held_out, rng) if run.spoil_eval else held_out
    if run.spoil_model:
        run.spoil_model(model)
    collator: Any = DataCollatorForAssistantOnlyLM(tokenizer)
    if run.packed:
        collator = DataCollatorWithEosPacking(tokenizer, max_length=run.packed)
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 10, **run.options}
    skips = options.pop("skips_bad_steps", False)
    settings: dict[str, Any] = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 20, "per_device_eval_batch_size": 24,
        "max_steps": run.steps, "per_device_train_batch_size": run.batch, "learning_rate": run.rate,
        "seed": run.seed, **options,
    }  # fmt: skip
    if not run.plain:
        settings["stop_on_non_finite"] = False  # the log is to show it
    kind, arguments = (_Plain, TrainingArguments) if run.plain else (_Ours, PerplexityTrainingArguments)
    trainer = kind(
        model, arguments(str(folder), **settings), collator,
        train_dataset=own, eval_dataset=held_out, processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.run, trainer.skips_bad_steps = run, skips
    trainer.train()
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save_state()
    return model


# -- the runs ----------------------------------------------------------------------------------------------------

SEQUENTIAL = {"train_sampling_strategy": "sequential"}
UNCLIPPED = {"max_grad_norm": 1e9, "warmup_steps": 0}


def healthy_runs() -> Iterable[Run]:
    """Rates, schedules, batches, data and beginnings that are all right."""
    base = Run("healthy")
    yield replace(base, name="usual")
    yield replace(base, name="low_rate", rate=5e-4, seed=1, steps=240)
    yield replace(base, name="high_rate", rate=4e-3, seed=2)
    yield replace(base, name="constant", seed=3, options={"lr_scheduler_type": "constant", "warmup_steps": 0})
    yield replace(
        base,
        name="constant_warmup",
        rate=1e-3,
        seed=4,
        options={"lr_scheduler_type": "constant_with_warmup"},
    )
    yield replace(base, name="linear", seed=5, options={"lr_scheduler_type": "linear", "warmup_steps": 40})
    yield replace(base, name="long_warmup", seed=6, options={"warmup_steps": 80})
    yield replace(base, name="batch_2", seed=7, batch=2, rate=1e-3, steps=200)
    yield replace(base, name="batch_16", seed=8, batch=16, steps=100)
    yield replace(base, name="accumulated", seed=9, batch=2, steps=100, options={"gradient_accumulation_steps": 4})
    yield replace(base, name="packed", seed=10, batch=2, packed=256)
    yield replace(base, name="plain", seed=11, plain=True)
    yield replace(base, name="chats", seed=12, rows="chats", steps=120)
    yield replace(base, name="chats_packed", seed=13, rows="chats", batch=1, packed=512, steps=150)
    yield replace(base, name="chats_linear", seed=14, rows="chats", steps=120, options={"lr_scheduler_type": "linear"})
    yield replace(base, name="short", seed=15, steps=60, options={"eval_steps": 10})
    yield replace(base, name="long", seed=16, steps=400, n_rows=1700)
    yield replace(base, name="three_epochs", seed=17, n_rows=300, steps=225, rate=1e-3)
    yield replace(base, name="adafactor", seed=18, rate=1e-2, also=("spike_recovered",), options={"optim": "adafactor"})
    yield replace(base, name="no_validation", seed=19, options={"eval_strategy": "no"})
    yield replace(base, name="log_every_5", seed=20, steps=240, options={"logging_steps": 5})
    yield replace(base, name="goes_on", seed=21, trained=True, rate=2e-4)
    yield replace(base, name="goes_on_flat", seed=22, trained=True, rate=3e-5, steps=200)
    yield replace(base, name="goes_on_constant", seed=23, trained=True, rate=1e-4,
                  options={"lr_scheduler_type": "constant"})  # fmt: skip
    yield replace(base, name="goes_on_chats", seed=24, trained=True, rows="chats", rate=5e-4, steps=120)
    yield replace(base, name="goes_on_packed", seed=25, trained=True, rate=2e-4, batch=2, packed=256)


def runs_of_faults() -> Iterable[Run]:
    """Five runs or more of each fault."""
    high = Run("x", "rate_too_high", any_of=("not_decreasing", "spike_sustained", "gradient_explosion"),
               also=("plateau", "spike_recovered", "non_finite", "schedule_fault"), first_step=1)  # fmt: skip
    constant = {**UNCLIPPED, "lr_scheduler_type": "constant_with_warmup"}
    # Fifty times too high, this model blows up, comes back, and then learns how often tokens occur and no more.
    back = replace(high, any_of=("plateau", "spike_recovered", *high.any_of), options=UNCLIPPED)
    yield replace(back, name="comes_back_0.1", rate=0.1, seed=1)
    yield replace(back, name="comes_back_0.2", rate=0.2, seed=2)
    yield replace(high, name="constant_1", rate=1.0, seed=3, options=constant)
    yield replace(high, name="constant_0.7", rate=0.7, seed=4, options=constant)
    late = {**constant, "warmup_steps": 100}
    yield replace(high, name="after_warmup", rate=1.0, seed=5, first_step=60, options=late)
    yield replace(high, name="after_warmup_batch_8", rate=1.0, seed=6, batch=8, first_step=60, options=late)
    yield replace(high, name="trained", rate=0.06, seed=7, trained=True, options={"warmup_steps": 30})
    yield replace(high, name="trained_constant", rate=0.1, seed=8, trained=True, options=constant)
    yield replace(high, name="chats", rate=1.0, seed=9, rows="chats", steps=100, options=constant)

    frozen = Run("x", "frozen_body", any_of=("plateau", "not_decreasing"), first_step=1, spoil_model=freeze_body)
    yield replace(frozen, name="norms", seed=1)
    yield replace(frozen, name="norms_low", seed=2, rate=5e-4)
    yield replace(frozen, name="last_norm", seed=3, spoil_model=freeze_all_but_last_norm)
    yield replace(frozen, name="last_norm_constant", seed=4, steps=240, spoil_model=freeze_all_but_last_norm,
                  options={"lr_scheduler_type": "constant"})  # fmt: skip
    yield replace(frozen, name="norms_chats", seed=5, rows="chats", steps=100)
    yield replace(frozen, name="last_norm_batch_8", seed=6, batch=8, spoil_model=freeze_all_but_last_norm)

    shuffled = Run("x", "shuffled_labels", any_of=("plateau", "not_decreasing"), also=("overfitting",), first_step=1,
                   spoil_rows=shuffle_labels, steps=200)  # fmt: skip
    yield replace(shuffled, name="both", seed=1)
    yield replace(shuffled, name="both_low", seed=2, rate=1e-3)
    yield replace(shuffled, name="both_batch_8", seed=3, batch=8)
    yield replace(shuffled, name="train_only", seed=4, spoil_eval=False)
    yield replace(shuffled, name="trained", seed=5, trained=True, rate=1e-3)
    yield replace(shuffled, name="chats", seed=6, rows="chats", steps=100)

    shard = Run("x", "broken_shard", any_of=("spike_recovered", "spike_sustained"), also=("gradient_explosion",),
                first_step=100, spoil_batch=random_ids(100, 119), steps=240)  # fmt: skip
    yield replace(shard, name="twenty", seed=1)
    yield replace(shard, name="ten", seed=2, spoil_batch=random_ids(100, 109))
    yield replace(shard, name="forty", seed=3, spoil_batch=random_ids(100, 139))
    yield replace(shard, name="trained", seed=4, trained=True, rate=5e-4)
    yield replace(shard, name="to_the_end", seed=5, expected=("spike_sustained",), any_of=(), first_step=160,
                  spoil_batch=random_ids(160, 10**9))  # fmt: skip
    yield replace(shard, name="chats", seed=6, rows="chats", steps=140, first_step=70,
                  spoil_batch=random_ids(70, 84))  # fmt: skip

    batch = Run("x", "broken_batch", ("spike_recovered",), also=("gradient_explosion",), first_step=90,
                spoil_batch=random_ids(90, 90))  # fmt: skip
    yield replace(batch, name="early", seed=1, first_step=50, spoil_batch=random_ids(50, 50))
    yield replace(batch, name="middle", seed=2)
    yield replace(batch, name="late", seed=3, first_step=140, spoil_batch=random_ids(140, 140))
    yield replace(batch, name="trained", seed=4, trained=True, rate=5e-4)
    yield replace(batch, name="unclipped", seed=5, options=UNCLIPPED)
    yield replace(batch, name="batch_2", seed=6, batch=2, rate=1e-3)
    yield replace(batch, name="two_batches", seed=7, spoil_batch=random_ids(90, 91))

    tiny = Run("x", "tiny_data", ("overfitting",), also=("too_good", "plateau"), first_step=1, n_rows=32, steps=200)
    yield replace(tiny, name="rows_32", seed=1)
    yield replace(tiny, name="rows_16", seed=2, n_rows=16)
    yield replace(tiny, name="rows_64", seed=3, n_rows=64, batch=8, steps=240)
    yield replace(tiny, name="constant", seed=4, n_rows=24, options={"lr_scheduler_type": "constant"})
    yield replace(tiny, name="trained", seed=5, trained=True, n_rows=24, rate=1e-3)
    yield replace(tiny, name="chats", seed=6, rows="chats", n_rows=24, steps=160)

    rate = Run("x", "rate_jumps", ("schedule_fault",), first_step=80, factor=jump(80, 20), rate=1e-3,
               also=("spike_sustained", "spike_recovered", "not_decreasing", "gradient_explosion", "plateau"))  # fmt: skip
    constant = {"lr_scheduler_type": "constant_with_warmup"}
    yield replace(rate, name="constant_20", seed=1, options=constant)
    yield replace(rate, name="cosine_20", seed=2)
    yield replace(rate, name="linear_50", seed=3, factor=jump(80, 50), options={"lr_scheduler_type": "linear"})
    yield replace(rate, name="for_fifteen_steps", seed=4, factor=jump(80, 30, 94), steps=200, options=constant)
    yield replace(rate, name="trained", seed=5, trained=True, rate=3e-4, factor=jump(80, 40), options=constant)
    yield replace(rate, name="chats", seed=6, rows="chats", steps=120, first_step=60, factor=jump(60, 30))

    over = Run("x", "float16_overflow", ("non_finite",), also=("spike_recovered", "spike_sustained", "not_decreasing"),
               first_step=60, spoil_model=overflow(60), steps=120)  # fmt: skip
    unfiltered = {"logging_nan_inf_filter": False}
    yield replace(over, name="plain", seed=1, plain=True)
    yield replace(over, name="plain_unfiltered", seed=2, plain=True, options=unfiltered)
    yield replace(over, name="ours", seed=3, options=unfiltered, spoil_model=overflow(60, "mlp"))
    yield replace(over, name="ours_filtered", seed=4)
    yield replace(over, name="three_steps_skipped", seed=5, options={**unfiltered, "skips_bad_steps": True},
                  spoil_model=overflow(60, "norm", 62))  # fmt: skip
    yield replace(over, name="at_once", seed=6, first_step=3, spoil_model=overflow(3), options=unfiltered, plain=True)

    order = Run("x", "bad_shuffling", ("sawtooth",), also=("plateau", "spike_recovered"), first_step=1, steps=240,
                rows="by_source", n_rows=160, options=SEQUENTIAL)  # fmt: skip
    yield replace(order, name="by_source", seed=1)
    yield replace(order, name="by_source_long", seed=2, n_rows=240, steps=300)
    yield replace(order, name="by_source_short", seed=3, n_rows=100, steps=200)
    yield replace(order, name="by_source_trained", seed=4, trained=True, rate=5e-4)
    yield replace(order, name="by_source_constant", seed=5, options={**SEQUENTIAL, "lr_scheduler_type": "constant"})
    yield replace(order, name="chats_by_source", seed=6, rows="chats_by_source", n_rows=100, steps=125)

    leak = Run("x", "leaked_labels", ("too_good",), first_step=1, spoil_rows=shift_twice, also=("plateau",))
    yield replace(leak, name="shifted", seed=1)
    yield replace(leak, name="shifted_low", seed=2, rate=1e-3, steps=240)
    yield replace(leak, name="shifted_packed", seed=3, batch=2, packed=256)
    yield replace(leak, name="shifted_trained", seed=4, trained=True, rate=1e-3)
    ahead = replace(leak, spoil_rows=None, spoil_model=read_ahead, steps=300)
    yield replace(ahead, name="reads_ahead", seed=5, rate=4e-3)
    yield replace(ahead, name="reads_ahead_trained", seed=6, trained=True)


def all_runs(seed: int = 0) -> list[Run]:
    """Every run under its fault's name; the halves take turns within a fault. A seed other than 0 makes others of each: rates
    of 0.8 to 1.25 times these, up to 1.3 times the steps."""
    rng = random.Random(seed)
    runs = []
    for run in [*healthy_runs(), *runs_of_faults()]:
        rate, longer = (0.8 * 1.5625 ** rng.random(), 1 + 0.3 * rng.random()) if seed else (1.0, 1.0)
        new = {"seed": run.seed + 1000 * seed, "rate": run.rate * rate, "steps": int(run.steps * longer)}
        runs.append(replace(run, name=f"{run.fault}-{run.name}", **new))
    return runs


def labels_of(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """What there is to find in each run."""
    seen: dict[str, int] = {}
    labels = {}
    for run in runs:
        half = ("develop", "report")[seen.get(run.fault, 0) % 2]
        seen[run.fault] = seen.get(run.fault, 0) + 1
        labels[run.name] = {
            "fault": run.fault, "half": half, "first_step": run.first_step,
            "expected": list(run.expected), "any_of": list(run.any_of), "also": list(run.also),
        }  # fmt: skip
    return labels


def trained_weights(tokenizer: Any, out: Path, seed: int) -> dict[str, Tensor]:
    """Weights that have seen the texts; kept in the folder."""
    kept = out / "trained.pt"
    if not kept.exists():
        start = Run(
            "trained", seed=100 + 1000 * seed, n_rows=6000, steps=700, batch=8, rate=3e-3, options={"eval_steps": 100}
        )
        torch.save(train(start, tokenizer, out / "start", None).state_dict(), kept)
    return torch.load(kept)


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="*", help="names, as a shell pattern")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    given.out.mkdir(parents=True, exist_ok=True)
    runs = all_runs(given.seed)
    (given.out / "labels.json").write_text(json.dumps(labels_of(runs), indent=1))
    tokenizer = demo.build_tokenizer()
    for run in runs:
        folder = given.out / run.name
        if not fnmatch.fnmatch(run.name, given.only) or (folder / "trainer_state.json").exists():
            continue
        begin = time.perf_counter()
        train(run, tokenizer, folder, trained_weights(tokenizer, given.out, given.seed) if run.trained else None)
        print(f"{run.name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
