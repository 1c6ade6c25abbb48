"""What a launch will really do, resolved and said before it starts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from rich.console import Console
from rich.table import Table

from hf_objectives.distributed import world_size
from hf_objectives.errors import ConfigError

ACCELERATE = "accelerate's config"


@dataclass(frozen=True, slots=True)
class Line:
    """One setting of the plan: its name, its value, and where that came from."""

    name: str
    value: str
    origin: str


def resolve_plan(args: Any, data: Any, model: Any, num_rows: int, origin: Mapping[str, str]) -> list[Line]:
    """The plan of a training run.

    Args:
        args: TrainingArguments.
        data: the recipe's data arguments (`max_length`, `packing`, `strategy`, `overlength`, `train_on`).
        model: the loaded model.
        num_rows: rows to train on, after preparation.
        origin: where each value came from, see `parse_config`.

    Raises:
        ConfigError: settings that contradict each other or this machine.
    """
    check_launch(args)
    processes = world_size()
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    per_epoch = max(1, -(-num_rows // rows))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)

    def of(*names: str) -> str:
        return ", ".join(dict.fromkeys(origin.get(name, "this launch") for name in names))

    weights = str(model.dtype).removeprefix("torch.")
    # Not args.bf16: accelerate's config sets it as well.
    precision = weights if args.mixed_precision == "no" else f"{args.mixed_precision} autocast of {weights}"
    if args.bf16 or args.fp16:
        precision_from = of("bf16" if args.bf16 else "fp16")
    else:
        precision_from = of("dtype") if args.mixed_precision == "no" else ACCELERATE
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())

    batch = of("per_device_train_batch_size", "gradient_accumulation_steps")
    return [
        Line("processes", f"{processes} ({_backend(args)})", "this launch"),
        Line("device", str(args.device), "this machine"),
        Line("precision", precision, precision_from),
        Line("attention", str(getattr(model.config, "_attn_implementation", "unknown")), of("attn_implementation")),
        Line("parameters", f"{trained:,} trained of {total:,}", of("use_peft")),
        Line("row", f"{data.max_length} tokens, {_packing(data)}", of("max_length", "packing", "strategy")),
        Line("over-length", data.overlength, of("overlength")),
        Line("trained tokens", data.train_on, of("train_on")),
        Line("global batch", f"{rows} rows = {args.per_device_train_batch_size} per device x "
             f"{args.gradient_accumulation_steps} accumulated x {processes}", batch),
        Line("global batch", f"up to {rows * data.max_length:,} tokens", of("max_length")),
        Line("steps", f"{steps} ({num_rows} rows, {per_epoch} steps an epoch)", of("max_steps", "num_train_epochs")),
        Line("learning rate", f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
             of("learning_rate", "lr_scheduler_type")),
        Line("seed", str(args.seed), of("seed")),
        Line("output", str(args.output_dir), of("output_dir")),
    ]  # fmt: skip


def check_launch(args: Any) -> None:
    """Raise ConfigError for a launch that would not do what it says."""
    if args.n_gpu > 1:
        line = f"accelerate launch --num_processes {args.n_gpu} {' '.join(sys.argv)}"
        raise ConfigError(
            f"{args.n_gpu} GPUs and one process: plain python would use them by DataParallel, slowly and with another "
            f"batch size. Launch with\n    {line}\nor choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    if args.use_cpu and args.fp16:
        raise ConfigError("fp16 on a CPU; use bf16, or leave both off")
    if args.load_best_model_at_end and str(args.eval_strategy.value) == "no":
        raise ConfigError("load_best_model_at_end needs eval_strategy steps or epoch")
    sharding, where = _sharding(args)
    launched = args.distributed_state.distributed_type
    if sharding and launched in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"{where} asks for {sharding}, and this launch ({world_size()} process(es) on {args.device.type}) would go on "
            "without a word and without it; launch it on accelerators with accelerate launch or torchrun, or drop it"
        )
    accumulation = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    if accumulation not in (1, args.gradient_accumulation_steps):
        raise ConfigError(
            f"{ACCELERATE} says {accumulation} gradient accumulation steps, the training arguments "
            f"{args.gradient_accumulation_steps}, and only the latter count; set gradient_accumulation_steps there"
        )


def _sharding(args: Any) -> tuple[str, str]:
    """What shards the model, and where it was asked for; empty where nothing does."""
    for name, asked, variable in (
        ("DeepSpeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
        ("FSDP", args.fsdp, "ACCELERATE_USE_FSDP"),
    ):
        if asked:
            return name, f"--{name.lower()}"
        if parse_flag_from_env(variable):
            return name, ACCELERATE
    return "", ""


def print_plan(lines: list[Line], console: Console) -> None:
    """The plan as a table."""
    table = Table(title="The plan", title_justify="left", header_style="bold")
    for column in ("", "value", "from"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(line.name, line.value, line.origin)
    console.print(table)


def _backend(args: Any) -> str:
    sharding, _ = _sharding(args)
    if world_size() == 1:
        return sharding or "no process group"
    return f"{sharding or 'DDP'} over {torch.distributed.get_backend()}"


def _packing(data: Any) -> str:
    return f"packed ({data.strategy}), documents isolated" if data.packing else "one row each, padded"
