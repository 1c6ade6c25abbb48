"""The reference of PPO: the policy as it was given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from hf_objectives.errors import ConfigError


def own_reference(model: Any, args: Any, peft_config: Any) -> Any:
    """Copy the policy as its frozen reference; None without a KL penalty, and where TRL makes the reference.

    TRL loads a reference from the folder or Hub id in the policy's config, whatever the policy is now. For a path, a
    PeftModel and a `peft_config` that is right.
    """
    adapted = isinstance(model, PeftModel)
    if not isinstance(model, str) and not adapted and getattr(model, "peft_config", None):
        raise ConfigError("the model carries an adapter that transformers loaded; merge it, or load it with PeftModel")
    if isinstance(model, str) or adapted or peft_config is not None or not args.beta:
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def asking_for_none(args: Any, own: bool) -> Iterator[None]:
    """Within it, `args` ask TRL for no reference if we have our own. Afterwards they are the caller's, also on an error."""
    beta, sync = args.beta, args.sync_ref_model
    if own:
        args.beta, args.sync_ref_model = 0.0, False
    try:
        yield
    finally:
        args.beta, args.sync_ref_model = beta, sync
