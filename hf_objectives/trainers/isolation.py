"""Probes on the live model: does a packed document see its neighbour, or a token those after it?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.errors import PackingLeakError
from hf_objectives.evaluation import probe_causality, probed_logits, unwrapped, virtual_tokens
from hf_objectives.trainers.hf_compat import attention_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IsolationReport:
    """The result of the probe.

    Attributes:
        attention: the attention implementation of the model.
        change: largest change of a logit of one document when the other one changed.
        tolerance: the largest change that passes.
    """

    attention: str
    change: float
    tolerance: float


class ModelProbes:
    """The probes of a trainer's model: causality, and isolation where a collator packs; each is made once."""

    def __init__(self) -> None:
        self._made: set[str] = set()

    def run(self, model: nn.Module, collator: Any) -> None:
        """Make those that `collator` calls for; see `probe_causality` and `probe_isolation`."""
        if "causality" not in self._made:
            self._made.add("causality")
            probe_causality(model)
        packs = isinstance(collator, DataCollatorWithEosPacking) and collator.isolate_documents
        if packs and "isolation" not in self._made:
            self._made.add("isolation")
            report = probe_isolation(model, flash_attn_kwargs=collator.return_flash_attn_kwargs)
            logger.info("packed documents are isolated under %s: %.2g", report.attention, report.change)


def probe_isolation(
    model: nn.Module, *, length: int = 16, tolerance: float | None = None, flash_attn_kwargs: bool = True
) -> IsolationReport:
    """Pack two documents as the collator does, change one, and require the logits of the other to stay.

    The probe runs in training and in evaluation mode, on the model's device, dtype and attention. Dropout draws the same
    numbers both times. Random state, mode and gradients stay as they were.

    Args:
        model: a causal language model, wrapped or not.
        length: tokens of each document.
        tolerance: largest change of a logit that passes. Default: four times what the same change moves when the documents
            are rows of their own, and never more than 1e-4 of the largest logit in float32, 2e-2 in half precision. Rows do
            not see each other, so that is the rounding of experts that share their batches, and 0 in any other model.
        flash_attn_kwargs: whether batches have these, see the collator; without them two rows are packed, because
            transformers reads the places of a single row otherwise than those of several.

    Raises:
        PackingLeakError: the logits of the other document changed, the model says that it lacks a kernel to keep documents
            apart, or it learns a prompt (PEFT); names the attention implementation, the kernel, or what to do.
    """
    _refuse_prompts(model)
    parameter = next(model.parameters())
    config = unwrapped(model).config
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, 2 * length), generator=generator)
    moved = (ids + torch.randint(1, max(2, vocabulary), ids.shape, generator=generator)) % vocabulary
    first, second = (torch.cat([new[:, :length], old[:, length:]], dim=1) for new, old in ((moved, ids), (ids, moved)))
    was_training = model.training
    worst = IsolationReport(attention_of(unwrapped(model)) or "unknown", 0.0, 0.0)
    try:
        for training in (True, False):
            model.train(training)
            packed = partial(_logits, model, flash_attn_kwargs=flash_attn_kwargs)
            change, largest = _moved(packed, ids, first, second)
            bound = tolerance
            if bound is None:
                noise, _ = _moved(partial(_logits, model, packed=False), ids, first, second)
                bound = min(4 * noise, (1e-4 if parameter.dtype == torch.float32 else 2e-2) * largest)
            if not change <= bound:
                raise PackingLeakError(
                    f"packed documents see each other under attention {worst.attention!r} in "
                    f"{'training' if training else 'evaluation'} mode: changing one of two moved a logit of the other "
                    f"by {change:.3g} (tolerance {bound:.3g}). Use a model and attention that honour position_ids (sdpa, "
                    "eager or flash attention of a decoder without recurrent layers), or train without packing"
                )
            worst = max(worst, IsolationReport(worst.attention, change, bound), key=lambda report: report.change)
    finally:
        model.train(was_training)
    return worst


def _refuse_prompts(model: nn.Module) -> None:
    if virtual := virtual_tokens(model):
        raise PackingLeakError(
            f"PEFT drops or shifts position_ids beside its {virtual} virtual tokens, so that packed documents would see each "
            "other; train without packing (DataCollatorForAssistantOnlyLM), or with LoRA"
        )


def _moved(logits_of: Callable[[Tensor], Tensor], ids: Tensor, first: Tensor, second: Tensor) -> tuple[float, float]:
    """The largest change of a logit of one document when the other changes, and the largest logit."""
    logits, after_first, after_second = logits_of(ids), logits_of(first), logits_of(second)
    length = len(logits) // 2
    forth, back = (after_first - logits)[length:].abs().max(), (after_second - logits)[:length].abs().max()
    return float(torch.maximum(forth, back)), float(logits.abs().max())  # not max(), which loses a NaN


def _logits(model: nn.Module, ids: Tensor, *, packed: bool = True, flash_attn_kwargs: bool = False) -> Tensor:
    """Logits [2 * length, vocabulary] of two documents, packed or as rows of their own, in float32.

    Raises:
        PackingLeakError: the model refuses packed documents. Layers of transformers with convolutions or linear attention do
            so where the kernel that would keep documents apart is not installed.
    """
    device, length = next(model.parameters()).device, ids.shape[1] // 2
    ids = ids.to(device)
    places = torch.arange(length, device=device).repeat(2).unsqueeze(0)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": places}
    if not packed:
        inputs = {name: value.view(2, length) for name, value in inputs.items()}
    elif flash_attn_kwargs:
        bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}
        inputs["seq_idx"] = torch.arange(2, dtype=torch.int32, device=device).repeat_interleave(length).unsqueeze(0)
    else:
        inputs = {name: value.repeat(2, 1) for name, value in inputs.items()}
    try:
        logits = probed_logits(model, **inputs)
    except ValueError as error:
        raise PackingLeakError(
            f"{type(unwrapped(model)).__name__} does not take packed documents: {error} Or train without packing"
        ) from error
    return logits[: 1 if packed else 2].flatten(0, 1)
