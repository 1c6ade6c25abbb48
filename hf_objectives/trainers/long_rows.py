"""Room for long rows: TRL's selective checkpointing and its offloading of activations, in a Trainer that is not TRL's."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor

from hf_objectives.errors import ConfigError

_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


class LongRows:
    """A mixin before `transformers.Trainer`: what `activation_offloading` and selective checkpointing ask for.

    Neither changes a number. `activation_checkpointing_kwargs={"selective": True}` keeps the results of attention and
    computes the rest again; `activation_offloading` moves what the backward pass needs to the memory of the host.

    Raises:
        ConfigError: selective checkpointing without `activation_checkpointing`, or a reentrant one; offloading without an
            accelerator.
    """

    args: Any
    model: Any

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        # transformers has new names for both settings, and keeps the old ones beside them.
        for name in [name for name in _CHECKPOINTING if args is not None and hasattr(args, name)]:
            kwargs_of = f"{name}_kwargs"
            given = dict(getattr(args, kwargs_of) or {})
            if given.get("selective"):
                if not getattr(args, name) or given.get("use_reentrant") or model is None:
                    raise ConfigError(
                        f"{kwargs_of} asks for selective checkpointing, which needs {name}=True, no use_reentrant, and a "
                        "model that is passed, not made by model_init"
                    )
                from hf_objectives.trainers.trl_compat import enable_selective_activation_checkpointing

                enable_selective_activation_checkpointing(model)
            elif "selective" in given:
                del given["selective"]
                setattr(args, kwargs_of, given)
        super().__init__(model, args, *rest, **kwargs)  # type: ignore[call-arg]
        self._saved = saved_activations(self.args, self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-batch, with activations where they were asked to be."""
        with self._saved:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]


def saved_activations(args: Any, model: Any) -> Any:
    """The context in which activations are saved: in the host's memory where `activation_offloading` is on."""
    if not getattr(args, "activation_offloading", False):
        return contextlib.nullcontext()
    if args.device.type == "cpu":
        raise ConfigError("activation_offloading moves activations from an accelerator; leave it off on a CPU")
    from hf_objectives.trainers.trl_compat import get_act_offloading_ctx_manager

    return get_act_offloading_ctx_manager(model)
