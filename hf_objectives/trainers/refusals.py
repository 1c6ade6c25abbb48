"""What trainers refuse when they are made: arguments that would be passed over in silence, or would make numbers wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_objectives.errors import ConfigError

_CALLABLES = {
    "compute_metrics": "compute_metrics needs the logits of all tokens, which are never gathered; evaluate() gives exact "
    "loss, perplexity and bits per byte, and a callback's on_evaluate may add to them",
    "preprocess_logits_for_metrics": "preprocess_logits_for_metrics would never be called: logits are computed only where a "
    "token is predicted and are never gathered; leave it out",
    "compute_loss_func": "compute_loss_func would never be called: the loss is the summed nats of a step over its trained "
    "tokens. For another loss override compute_loss in a subclass, or use transformers.Trainer; z_loss, "
    "label_smoothing_factor and loss_weights in the rows are built in",
}


def refuse_callables(given: Mapping[str, Any]) -> None:
    """Refuse arguments of a Trainer that a loss and an evaluation of exact sums would never call.

    Raises:
        ConfigError: names the argument and what to do instead.
    """
    for name, reason in _CALLABLES.items():
        if given.get(name) is not None:
            raise ConfigError(reason)


def refuse_cut_rows(parallelism: Any, *, takes_parts: bool = False) -> None:
    """Refuse parallelism under which losses, scores or counts would be wrong.

    Context and sequence parallelism give each process a part of each row. A token at a cut has its label, or the score of its
    text, on another process.

    Args:
        parallelism: `ParallelismConfig` of accelerate, or None.
        takes_parts: whether the trainer takes the parts that context parallelism gives. It takes neither those of DeepSpeed's
            sequence parallelism, of which neither the count of tokens nor the scale of gradients has been proved, nor tensor
            parallelism: its evaluation gives every process other rows, and its logs count the tokens of each.

    Raises:
        ConfigError: names the setting.
    """
    context, sequence, tensor = (getattr(parallelism, name, None) or 1 for name in ("cp_size", "sp_size", "tp_size"))
    if sequence > 1 and takes_parts:
        raise ConfigError(
            f"parallelism_config has sp_size={sequence}: the loss over DeepSpeed's parts of rows is not proved and may be "
            f"wrong. Set sp_size to 1, and cp_size to {sequence} with FSDP2 in its place"
        )
    if tensor > 1 and takes_parts:
        raise ConfigError(
            f"parallelism_config has tp_size={tensor}: an evaluation would give the processes that share a model different "
            "rows, and logs would count each token several times. Set tp_size to 1, and dp_shard_size with FSDP2 in its place"
        )
    for name, size in (("cp_size", 1 if takes_parts else context), ("sp_size", sequence)):
        if size > 1:
            raise ConfigError(
                f"parallelism_config has {name}={size}: it gives each process a part of each row, and the label of a part's "
                f"last token lies on another process, so that losses and scores would be wrong. Set {name} to 1; FSDP and "
                "dp_shard_size share a model among processes without cutting rows, and gradient checkpointing makes room for "
                "longer ones"
            )


def refuse_data_parallel(args: Any) -> None:
    """Refuse one process with several GPUs: `DataParallel` cuts all tensors of a batch alike, bounds of documents too.

    Raises:
        ConfigError: says how to start.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process with {args.n_gpu} GPUs would cut batches with torch's DataParallel, the bounds of documents among "
            "them; start one process a GPU with accelerate launch or torchrun, or let CUDA_VISIBLE_DEVICES show one"
        )


def refuse_devices(args: Any) -> None:
    """Both `refuse_data_parallel` and `refuse_fp16_on_cpu`."""
    refuse_data_parallel(args)
    refuse_fp16_on_cpu(args)


def refuse_fp16_on_cpu(args: Any) -> None:
    """Refuse fp16 where there is no kernel for it but a CPU's, whose sums overflow and round otherwise.

    Raises:
        ConfigError: says what to use.
    """
    if args is not None and args.fp16 and args.device.type == "cpu":
        raise ConfigError("fp16 on a CPU; use bf16, or leave both off")


def refuse_zero_gradients(trainer: Any, settings: Mapping[str, Any]) -> None:
    """Refuse settings that keep gradients off parameters where the optimizer takes a missing gradient for 0, and moves on.

    Args:
        trainer: a Trainer.
        settings: values by name; those that are unset or 0 ask for nothing.

    Raises:
        ConfigError: names the settings.
    """
    wanted = [f"{name}={value}" for name, value in settings.items() if value]
    if wanted and trainer.is_deepspeed_enabled:
        raise ConfigError(
            f"{' and '.join(wanted)} under DeepSpeed, whose optimizer moves parameters without a gradient too; expected an "
            "optimizer that passes over them: use FSDP, or leave the setting out"
        )
