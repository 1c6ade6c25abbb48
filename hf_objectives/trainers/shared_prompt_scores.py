"""Scores of packed preference pairs: a reward model computes each prompt once, and reads its scores as in a padded batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_objectives.trainers.shared_prompt import SharedPrompts, innermost


class SharedPromptScores(SharedPrompts):
    """Lets the sequence classifier of a reward trainer run over packed pairs, within `packing`.

    Only the layers see packed rows. Their hidden states are laid out as those of the padded batch again, so that the model
    finds the last token of each text and scores it by code of its own, whatever its head is.
    """

    compared, unit = "hidden states under the scores", ""
    columns = "input_ids, attention_mask and margin"

    def _wrap(self, model: Any, inner: Any) -> None:
        """Leave the model as it is: nothing tells a batch of pairs from one of other texts, but the loss that asks."""

    @contextmanager
    def packing(self, model: nn.Module) -> Iterator[None]:
        """Within it, batches of pairs run through the layers of the model as packed rows.

        Args:
            model: the sequence classifier, wrapped or not. It takes the padded batch, `input_ids` and `attention_mask`,
                int64 [2 * pairs, width], and gives scores [2 * pairs, 1].
        """
        inner = innermost(model)
        layers = inner.base_model
        names = [*inspect.signature(layers.forward).parameters]
        running: list[Tensor] = []

        def pack(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if given.get("attention_mask") is None:  # a batch without padding
                given["attention_mask"] = torch.ones_like(given["input_ids"])
            packed = self._pack(inner, given)
            if packed is None:
                return None
            running.append(packed[1])
            return (), packed[0]

        def spread(module: nn.Module, args: Any, output: Any) -> None:
            if running:
                places, hidden = running.pop(), output.last_hidden_state.flatten(0, 1)
                # No score is read at padding; it gets the state of some token.
                sources = places.clamp(min=0).flatten().to(hidden.device)
                output.last_hidden_state = hidden.index_select(0, sources).view(*places.shape, -1)

        handles = [
            layers.register_forward_pre_hook(pack, with_kwargs=True),
            layers.register_forward_hook(spread),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _figures(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states at the last token of each text, float32 [sequences, width of the model].

        They say more than a score, which is 0 under a new head that begins with 0. That the head makes the score of nothing
        else is proved by padding that is not a number.
        """
        inner = innermost(model)
        real = batch["attention_mask"] == 1
        ids = batch["input_ids"].masked_fill(~real, inner.config.get_text_config().pad_token_id)
        states: list[Tensor] = []

        def read(module: nn.Module, args: Any, output: Any) -> None:
            hidden, there = output.last_hidden_state, real.to(output.last_hidden_state.device)
            states.append(hidden[torch.arange(len(there), device=there.device), there.sum(1) - 1].float())
            output.last_hidden_state = hidden.masked_fill(~there.unsqueeze(-1), math.nan)

        with self.packing(model):
            handle = inner.base_model.register_forward_hook(read)
            try:
                scores = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
            finally:
                handle.remove()
        if scores.shape != (len(ids), 1):
            raise ValueError(f"scores have the shape {[*scores.shape]}; expected [{len(ids)}, 1]")
        if not scores.isfinite().all():
            raise self._leak(model, "give scores that are not finite: the head reads padding, or its weights are not")
        return states[0].to(ids.device)
