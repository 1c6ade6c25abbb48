"""The plan of a launch: what it will really do, resolved and printed before it starts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from rich.console import Console
from rich.table import Table
from transformers.integrations import get_available_reporting_integrations

from hf_objectives.distributed import world_size
from hf_objectives.errors import ConfigError
from hf_objectives.trainers import copies_of_rows

ACCELERATE = "accelerate's config"


class Line(NamedTuple):
    """One setting of the plan: its name, its value, and where that came from."""

    name: str
    value: str
    origin: str


def resolve_plan(args: Any, data: Any, model: Any, num_rows: int, origin: Mapping[str, str]) -> list[Line]:
    """The plan of a run on `num_rows` prepared rows; `origin` says where each value came from, see `parse_config`."""
    processes = world_size() // copies_of_rows()
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    per_epoch = max(1, -(-num_rows // rows))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)

    def source(*names: str) -> str:
        return ", ".join(dict.fromkeys(origin.get(name, "this launch") for name in names))

    max_length, train_on = (getattr(data, name, getattr(args, name, None)) for name in ("max_length", "train_on"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    limit = "as long as it is" if max_length is None else f"{max_length} tokens"
    sizes = (
        f"{args.per_device_train_batch_size} per device x {args.gradient_accumulation_steps} accumulated x {processes}"
    )
    most = []
    if max_length is not None:
        most = [Line("global batch", f"up to {rows * max_length:,} tokens", source("max_length"))]
    return [
        Line("processes", f"{world_size()} ({_backend(args)})", "this launch"),
        Line("device", str(args.device), "this machine"),
        Line("precision", *_precision(args, model, source)),
        Line("attention", str(getattr(model.config, "_attn_implementation", "unknown")), source("attn_implementation")),
        Line("parameters", f"{trained:,} trained of {total:,}", source("use_peft")),
        Line("row", f"{limit}, {_packing(data)}", source("max_length", "packing", "strategy")),
        Line("over-length", data.overlength, source("overlength")),
        Line("trained tokens", str(train_on), source("train_on")),
        Line("global batch", f"{rows} rows = {sizes}",
             source("per_device_train_batch_size", "gradient_accumulation_steps")),
        *most,
        Line("steps", f"{steps} ({num_rows} rows, {per_epoch} steps an epoch)", source("max_steps", "num_train_epochs")),
        Line("learning rate", f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
             source("learning_rate", "lr_scheduler_type")),
        Line("seed", str(args.seed), source("seed")),
        Line("output", str(args.output_dir), source("output_dir")),
    ]  # fmt: skip


def check_launch(args: Any) -> None:
    """Refuse settings that contradict each other, this machine or accelerate's configuration."""
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
    for tracker in args.report_to or ():
        # transformers has no check for flyte.
        if tracker not in (*(known := get_available_reporting_integrations()), "flyte"):
            raise ConfigError(
                f"report_to names {tracker!r}, which is not installed here; install it, or name one of "
                f"{', '.join(known) or '(none is installed)'} or none"
            )
    sharding, where = _sharding(args)
    launched = args.distributed_state.distributed_type
    if sharding and launched in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            f"{where} asks for {sharding}, but this launch ({world_size()} process(es) on {args.device.type}) would train "
            f"without it; launch it on accelerators with accelerate launch or torchrun, or leave {sharding} out"
        )
    accumulation = int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"))
    if accumulation not in (1, args.gradient_accumulation_steps):
        raise ConfigError(
            f"{ACCELERATE} says {accumulation} gradient accumulation steps, the training arguments "
            f"{args.gradient_accumulation_steps}, and only the latter count; set gradient_accumulation_steps there"
        )


def print_plan(lines: list[Line], console: Console) -> None:
    """Print the plan as a table."""
    table = Table(title="The plan", title_justify="left", header_style="bold")
    for column in ("", "value", "from"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _precision(args: Any, model: Any, source: Any) -> tuple[str, str]:
    """The dtype of the computation, and its origin."""
    weights = str(model.dtype).removeprefix("torch.")
    if args.mixed_precision == "no":  # not args.bf16: accelerate's config sets it as well
        return weights, source("dtype")
    name = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    return f"{args.mixed_precision} autocast of {weights}", source(name) if name else ACCELERATE


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


def _backend(args: Any) -> str:
    sharding, _ = _sharding(args)
    if world_size() == 1:
        return sharding or "no process group"
    return f"{sharding or 'DDP'} over {torch.distributed.get_backend()}"


def _packing(data: Any) -> str:
    if not data.packing:
        return "one row each, padded"
    isolated = "isolated" if getattr(data, "isolate_documents", True) else "not isolated"
    return f"packed ({data.strategy}), documents {isolated}"
