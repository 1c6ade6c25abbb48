"""Forward passes over packed preference pairs, each prompt computed once, and the proof that nothing else changes."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from hf_objectives.collators import SharedRows, share_prompts
from hf_objectives.errors import ConfigError, PackingLeakError
from hf_objectives.evaluation import after_head, virtual_tokens
from hf_objectives.trainers.hf_compat import attention_of, is_stateful
from hf_objectives.trainers.trl_compat import innermost, score_tokens
from hf_objectives.types import IGNORE_INDEX

_LAYERS = ("full_attention", "sliding_attention")
_DENSE = ("sdpa", "eager", "flex_attention")
#: Inputs of a forward pass that say nothing of a token.
_SETTINGS = ("input_ids", "attention_mask", "use_cache", "margin", "return_dict")


def prompt_masks(config: Any, rows: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """Make the attention masks under which both answers of a pair see their prompt, and nothing sees another pair.

    Args:
        config: the config of the model, without those of other modalities.
        rows: `pieces`, `branches` and `position_ids` of `SharedRows`, int64 [rows, length], on the model's device.
        dtype: of the model's embeddings.

    Returns:
        A mask as the model's attention takes it, [rows, 1, length, length], or one for each type of layer by name. A window
        counts positions of the sequence, not places in the row.
    """
    pieces, branches, positions = rows["pieces"], rows["branches"], rows["position_ids"]

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        branch = branches[batch, key]
        own = (branch == 0) | (branch == branches[batch, query])
        return own & (pieces[batch, query] == pieces[batch, key])

    def near(batch: Any, head: Any, query: Any, key: Any) -> Any:
        distance = positions[batch, query] - positions[batch, key]
        return visible(batch, head, query, key) & (distance < config.sliding_window)

    like = torch.empty((*pieces.shape, 0), dtype=dtype, device=pieces.device)
    rules = dict(zip(_LAYERS, (visible, near), strict=True))
    made = {
        kind: create_causal_mask(config, like, None, None, and_mask_function=rules[kind])
        for kind in sorted({*layer_types(config)})
    }
    return made if getattr(config, "layer_types", None) else made.popitem()[1]


def layer_types(config: Any) -> list[str]:
    """The kinds of a model's layers: those that its config lists, or the one that all have."""
    if listed := getattr(config, "layer_types", None):
        return list(listed)
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"]
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]


class SharedPrompts:
    """Lets the models of a DPO trainer run over packed pairs.

    `install` puts it between TRL's loss and the models, `prove` compares it with the padded pass on the live model.
    """

    #: What the proof compares, and its unit.
    compared, unit = "log-probabilities", " nats"
    #: What a batch has.
    columns = "input_ids, attention_mask and completion_mask"

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._on = True
        self._installed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._proved: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def install(self) -> None:
        """Let the policy and the reference model run over packed pairs from now on.

        Raises:
            ConfigError: the model or a setting does not go with it; names what and why.
        """
        trainer = self._trainer
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is None:
                continue
            inner = innermost(model)
            if inner not in self._installed:
                refuse(trainer, model)
                self._installed.add(inner)
                self._wrap(model, inner)

    def _wrap(self, model: Any, inner: Any) -> None:
        figures = functools.partial(self._trainer.figures_of, model)
        score_tokens(inner, figures=figures, pack=functools.partial(self._pack, inner))

    def _pack(self, model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor] | None:
        if not self._on:
            return None
        if strange := [name for name, value in inputs.items() if value is not None and name not in _SETTINGS]:
            raise ConfigError(
                f"a batch of pairs has {', '.join(strange)}, which cannot be packed; expected {self.columns}. "
                "Set padding_free to False"
            )
        ids, config = inputs["input_ids"], model.config
        flash = is_flash_attention_requested(config)
        rows = share_prompts(ids.cpu().numpy(), inputs["attention_mask"].cpu().numpy(), share=not flash)
        names = ("input_ids", "position_ids", "pieces", "branches", "places")
        there = {name: torch.from_numpy(getattr(rows, name)).to(ids.device) for name in names}
        packed = {name: there[name] for name in ("input_ids", "position_ids")}
        if flash:
            packed |= _bounds(rows, ids.device)
        else:
            packed["attention_mask"] = prompt_masks(config, there, model.get_input_embeddings().weight.dtype)
        return {**packed, "use_cache": False}, there["places"]

    def prove(self, model: nn.Module) -> None:
        """Compare packed and padded passes of random pairs once for each model, before it is used.

        Raises:
            PackingLeakError: what is compared differs, or depends on what it must not see.
        """
        if model in self._proved:
            return
        trainer = self._trainer
        config = innermost(model).config
        windowed = "sliding_attention" in layer_types(config)
        window, longest = (config.sliding_window if windowed else 0), trainer.args.max_length
        beyond = window + 8 if windowed and (longest is None or longest > window) else 0
        full = next(model.parameters()).dtype == torch.float32 and trainer.accelerator.mixed_precision == "no"
        was_training, devices = model.training, [trainer.args.device] if trainer.args.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                if beyond:
                    self._compare(model, _probe_batch(config.vocab_size, beyond, trainer.args.device), full)
                batch = _probe_batch(config.vocab_size, 0, trainer.args.device)
                self._isolate(model, batch, self._compare(model, batch, full))
        finally:
            self._on = True
            model.train(was_training)
        self._proved.add(model)

    def _compare(self, model: nn.Module, batch: dict[str, Tensor], full: bool) -> float:
        """Require the figures of the padded pass; returns the tolerance."""
        model.eval()
        padded, packed = (self._measured(model, batch, on) for on in (False, True))
        bound = (1e-4 if full else 2e-2) * float(padded.abs().max())
        change = float((packed - padded).abs().max())
        if not change <= bound:
            raise self._leak(model, f"differ from padded ones by {change:.3g}{self.unit} (tolerance {bound:.3g})")
        return bound

    def _isolate(self, model: nn.Module, batch: dict[str, Tensor], bound: float) -> None:
        """Change one answer after another, and require the others to stay."""
        count = len(batch["input_ids"])
        for training in (True, False):
            model.train(training)
            before = self._measured(model, batch, True)
            # The rejected side of the last pair is the last of all: what it moves is rounding.
            for side in reversed(range(count)):
                moved = self._measured(model, _other_answer(batch, side), True)
                others = [other for other in range(count) if other != side]
                change = float((moved - before)[others].abs().max())
                if side == count - 1:
                    tolerance = 0.0 if change == 0 else bound
                if not change <= tolerance:
                    moved_by = f"{change:.3g}{self.unit}"
                    raise self._leak(model, f"of one answer moved by {moved_by} when another answer changed")

    def _figures(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of the answers, float32 [sequences, width - 1]."""
        after_head(model)  # proven here, where a sharded model runs as a whole
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, use_cache=False, labels=labels, fused_lm_head=True).log_probs.float()

    def _measured(self, model: nn.Module, batch: dict[str, Tensor], on: bool) -> Tensor:
        """The figures of each sequence, float32 [sequences, ...], of the packed pass or of the padded one."""
        self._on = on
        torch.manual_seed(0)  # dropout draws the same numbers
        try:
            return self._figures(model, batch)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            if not on:
                raise
            raise self._leak(model, f"cannot be computed: {type(error).__name__}: {error}") from error

    def _leak(self, model: nn.Module, what: str) -> PackingLeakError:
        inner: Any = innermost(model)
        return PackingLeakError(
            f"padding_free: {self.compared} of packed pairs {what}, under attention {attention_of(inner)!r} of "
            f"{type(inner).__name__}; expected those of the padded batch. Set padding_free to False"
        )


def _bounds(rows: SharedRows, device: torch.device) -> dict[str, Any]:
    """What flash attention takes to keep the sequences of one row apart."""
    starts = torch.from_numpy((rows.position_ids[0] == 0).nonzero()[0])
    ends = torch.cat([starts, torch.tensor([rows.position_ids.shape[1]])]).to(torch.int32)
    longest = int(ends.diff().max())
    ends = ends.to(device)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _probe_batch(vocabulary: int, beyond: int, device: torch.device) -> dict[str, Tensor]:
    """Three random pairs, few enough for one row; `beyond` more tokens in the first prompt, for a window to cut."""
    lengths = ((10 + beyond, 8, 6), (5, 4, 3), (4, 3, 5))  # of prompt, chosen, rejected
    generator = torch.Generator().manual_seed(0)
    width = max(prompt + max(answers) for prompt, *answers in lengths)
    shape = (2 * len(lengths), width)
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask", "completion_mask")}
    for pair, (prompt, *answers) in enumerate(lengths):
        begin = torch.randint(0, vocabulary, (prompt,), generator=generator)
        for side, answer in enumerate(answers):
            row, end = side * len(lengths) + pair, prompt + answer
            batch["input_ids"][row, :prompt] = begin
            batch["input_ids"][row, prompt:end] = torch.randint(0, vocabulary, (answer,), generator=generator)
            batch["input_ids"][row, prompt] = (7 * pair + side) % vocabulary  # no accident makes the prompt longer
            batch["attention_mask"][row, :end] = 1
            batch["completion_mask"][row, prompt:end] = 1
    return {name: value.to(device) for name, value in batch.items()}


def _other_answer(batch: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """The batch with other tokens in one answer."""
    count = len(batch["input_ids"])
    ids, answer = batch["input_ids"].clone(), batch["completion_mask"][side] == 1
    other = batch["input_ids"][(side + count // 2) % count]
    ids[side, answer] = torch.where(ids[side, answer] == 1, 2, 1)
    first = answer.nonzero()[0]
    ids[side, first] = torch.where(other[first] == 3, 4, 3)
    return {**batch, "input_ids": ids}


def refuse(trainer: Any, model: Any) -> None:
    """Refuse what packed pairs are wrong for, or unproved with.

    Raises:
        ConfigError: names the model or the setting, the reason and what to change.
    """
    inner, args, parallelism = innermost(model), trainer.args, trainer.accelerator.parallelism_config
    config, name = inner.config, type(inner).__name__
    attention = attention_of(inner)
    flash = is_flash_attention_requested(config)
    strange = sorted({*layer_types(config)} - {*_LAYERS})
    takes = inspect.signature(inner.base_model.forward).parameters
    found = {
        f"{name} keeps a state along a row, which both answers would need": is_stateful(inner),
        f"{name} has layers of {', '.join(strange)}, whose masks are not known": strange,
        f"{name} takes no position_ids": "position_ids" not in takes,
        f"{name} has parts beside text": config.get_text_config() is not config,
        "the model learns a prompt (PEFT), which moves the places of tokens": virtual_tokens(model),
        f"attention {attention!r} takes no mask; expected sdpa, eager, flash attention, or flex attention on a GPU": (
            not flash and (attention not in _DENSE or (attention == "flex_attention" and args.device.type == "cpu"))
        ),
        "the auxiliary loss of experts counts the tokens of each prompt twice; router_aux_loss_coef=0 leaves it out": (
            hasattr(trainer, "aux_loss_enabled")  # a reward model has no such loss
            and (trainer.aux_loss_enabled or getattr(config, "output_router_logits", False))
        ),
        "tensor parallelism has not been proved with it": (getattr(parallelism, "tp_size", None) or 1) > 1,
        "neftune_noise_alpha scales its noise by the length of a row": args.neftune_noise_alpha,
        "use_liger_kernel has not been proved with it": args.use_liger_kernel,
        "torch_compile would compile each batch anew, whose rows have other lengths": args.torch_compile,
    }
    for reason, is_so in found.items():
        if is_so:
            raise ConfigError(f"padding_free: {reason}. Set padding_free to False")
