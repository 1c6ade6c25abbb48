"""Context parallelism: which models and rows it leaves right, and what it cuts.

Each process of a group has the same rows and cuts its part out of them. Attention runs over the whole row, round the group.
All else must come from a token and its place alone. Accelerate takes attention masks away, so that attention is plain
causal one: right for rows of one document that are padded on the right.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import split_extra_columns, unwrapped, virtual_tokens
from hf_objectives.losses import shifted_columns
from hf_objectives.trainers.hf_compat import is_stateful

_CUT = ("input_ids", "attention_mask", "position_ids")
_PACKED = (
    "context parallelism drops the mask that keeps the documents of a packed row apart; give one document a row "
    "(packing off, DataCollatorForAssistantOnlyLM), or set cp_size to 1"
)


def refuse_uncuttable(model: nn.Module, *, compiled: bool) -> None:
    """Refuse what gives a token of a part another value than the same token of the whole row.

    Raises:
        ConfigError: a model that carries a state along the row, counts places by itself or learns a prompt; rotary embeddings
            that change with the length of a row, of which a part has less; `torch.compile`, with which this has never been
            run.
    """
    if compiled:
        raise ConfigError("torch_compile has never been run with context parallelism; turn it off, or set cp_size to 1")
    if is_stateful(model):
        raise ConfigError(
            f"{type(model).__name__} carries a state along a row, and context parallelism would begin it anew in each part; "
            "set cp_size to 1"
        )
    base = unwrapped(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base  # PEFT's forward takes anything
    if virtual := virtual_tokens(model):
        raise ConfigError(
            f"PEFT puts {virtual} virtual tokens before each part of a row under context parallelism, and drops its places; "
            "train with LoRA, or set cp_size to 1"
        )
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ConfigError(
            f"{type(base).__name__} takes no position_ids, so that each part of a row would begin at place 0 under context "
            "parallelism; set cp_size to 1"
        )
    for module in model.modules():
        kind = str(getattr(module, "rope_type", ""))
        if "dynamic" in kind or "longrope" in kind:
            raise ConfigError(
                f"{type(model).__name__} has rotary embeddings of type {kind}, which change with the longest place that a "
                "process sees, and context parallelism (cp_size) gives each other places; set cp_size to 1"
            )


def collator_of_parts(collator: Any, parts: int) -> Any:
    """The collator with widths that divide into two pieces for each part: torch gives a part one from either end of a row.

    Raises:
        ConfigError: a collator that packs.
    """
    if isinstance(collator, DataCollatorWithEosPacking):
        raise ConfigError(_PACKED)
    if not isinstance(collator, DataCollatorForAssistantOnlyLM):
        return collator
    return dataclasses.replace(collator, pad_to_multiple_of=lcm(collator.pad_to_multiple_of or 1, 2 * parts))


def check_rows(batch: Mapping[str, Any]) -> None:
    """Check that plain causal attention is right for the rows of a batch.

    Raises:
        ConfigError: several documents a row, padding on the left, or inputs of which a part cannot be told.
    """
    inputs = split_extra_columns(batch)[0]
    ids, mask, places = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if any(name in inputs for name in ("seq_lengths", "seq_idx", "cu_seq_lens_q")):
        raise ConfigError(_PACKED)
    if places is not None and not (
        places.shape == ids.shape and places.eq(torch.arange(ids.shape[1], device=places.device)).all()
    ):
        raise ConfigError(_PACKED)
    if mask is not None and (mask.shape != ids.shape or (mask[:, 1:] > mask[:, :-1]).any()):
        raise ConfigError(
            "context parallelism drops the attention mask, which hides more here than padding on the right; let the collator "
            "pad on the right, or set cp_size to 1"
        )
    others = sorted(name for name, value in inputs.items() if isinstance(value, Tensor) and name not in _CUT)
    if others:
        raise ConfigError(
            f"the batch has {', '.join(others)}, of which context parallelism knows no parts; let the collator leave "
            "them out, or set cp_size to 1"
        )


def columns_to_cut(batch: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """A copy of the rows of a batch, with what each position predicts in the place of what stands there.

    Args:
        batch: `input_ids` and `labels` (int64 [batch, length]), with or without the other columns of our collators.
        parts: processes among which each row is cut.

    Raises:
        ConfigError: rows that cannot be cut into equal parts, and what `check_rows` refuses.
    """
    check_rows(batch)
    inputs, extra = split_extra_columns(batch)
    ids = inputs["input_ids"]
    if ids.shape[1] % parts:
        raise ConfigError(
            f"rows of {ids.shape[1]} tokens cannot be cut into cp_size={parts} equal parts; let the collator pad them to a "
            f"multiple of {2 * parts} (pad_to_multiple_of)"
        )
    places = torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)
    rows = {**inputs, "position_ids": places, **shifted_columns(extra)}
    # Torch cuts in place, and whoever watches the step keeps the batch.
    rows = {name: value.clone() if isinstance(value, Tensor) else value for name, value in rows.items()}
    names = extra.get("source_names")
    return rows if names is None else {**rows, "source_names": names}
