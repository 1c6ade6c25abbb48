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


def refuse_cut_rows(parallelism: Any) -> None:
    """Refuse context and sequence parallelism, which give each process a part of each row.

    A token at a cut has its label, or the score of its text, on another process.

    Args:
        parallelism: `ParallelismConfig` of accelerate, or None.

    Raises:
        ConfigError: names the setting.
    """
    for name, kind in (("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(parallelism, name, None) or 1
        if size > 1:
            raise ConfigError(
                f"parallelism_config has {name}={size}: {kind} parallelism gives each process a part of each row, and the "
                "label of a part's last token lies on another process, so that losses and scores would be wrong. Set "
                f"{name} to 1; FSDP, dp_shard_size and tp_size share a model among processes without cutting rows, and "
                "gradient checkpointing makes room for longer ones"
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
