"""The frozen model that a policy is held close to: a copy of the policy as it is, made before anything is done to it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from trl.models import prepare_deepspeed
from trl.models.utils import prepare_fsdp
from trl.trainer.utils import add_fused_lm_head


def frozen_copy(model: nn.Module) -> Any:
    """A copy of a causal language model, not wrapped and without adapters, in evaluation mode, that no optimizer moves."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def place_reference(model: Any, accelerator: Any, *, temperature: float = 1.0) -> Any:
    """The reference on the run's device, sharded as the policy is, with TRL's fused head for log-probabilities."""
    add_fused_lm_head(model, temperature=temperature)
    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == "FSDP":
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)
