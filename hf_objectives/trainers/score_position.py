"""Where a reward model reads its score, and the conditions under which that is the last token of the text.

transformers' sequence classifiers read the score at the last token whose id is not the config's `pad_token_id`. They do not
look at the attention mask. So three things can go wrong without an error:

- A batch is padded with another id than the config's: the score is read on padding.
- A text ends with the padding token, for example because EOS is the padding token: the score is read before its end. A
  finished answer and one that broke off before its EOS then have one score.
- A program uses another padding token than the training did: the score is read elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_objectives.errors import ConfigError, FormatError


def spare_pad_token(tokenizer: Any, num_embeddings: int) -> str | None:
    """Find a token that can pad and that ends no text; None where there is none.

    It is a control token with an embedding, not EOS or BOS, and not in the chat template. A token named after padding comes
    first, then the unknown token, then a reserved one.
    """
    templates = tokenizer.chat_template
    text = " ".join(templates.values()) if isinstance(templates, dict) else templates or ""
    free = [
        token.content
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        and i < num_embeddings
        and i not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
        and token.content not in text
    ]
    named = [token for token in free if "pad" in token.lower()]
    unknown = [token for token in free if token == tokenizer.unk_token]
    reserved = [token for token in free if any(word in token.lower() for word in ("reserved", "unused"))]
    return next(iter([*named, *unknown, *reserved]), None)


def read_past_end(token: str, text: str) -> str:
    """The message of an error about a text that ends with the padding token."""
    return (
        f"{text} ends with {token!r}, which is the padding token too: its score would be read before its end, so that "
        "finished and unfinished answers get the same. Give the tokenizer a padding token of its own, "
        "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}) and model.resize_token_embeddings(len(tokenizer)), or set "
        "allow_eos_padding"
    )


def check_batch(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    pad_token_id: int,
    num_embeddings: int,
    rows: Sequence[int],
    token: str,
    allow_eos_padding: bool = False,
) -> None:
    """Check a batch of n pairs against what the model will read.

    Args:
        input_ids: int64 [2n, length], chosen answers first.
        attention_mask: int64 [2n, length], 0 at padding; None without padding.
        pad_token_id, token: the padding of the model's config.
        num_embeddings: number of token embeddings of the model.
        rows: numbers of the n rows, for errors.
        allow_eos_padding: let a text end with the padding token.
    """
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    wrong = input_ids[~kept & (input_ids != pad_token_id)]
    if len(wrong):
        raise ConfigError(
            f"the collator pads with id {int(wrong[0])}, and the model takes {pad_token_id} ({token!r}) for padding; its "
            "score would be read on padding"
        )
    beyond = ((input_ids >= num_embeddings) | (input_ids < 0)) & kept
    ends = torch.where(kept, torch.arange(input_ids.shape[1]), -1).amax(1)
    early = input_ids.gather(1, ends[:, None])[:, 0] == pad_token_id

    def place(bad: Tensor) -> tuple[int, str, int]:
        i = int(bad.nonzero()[0])
        return i, ("chosen", "rejected")[i // len(rows)], rows[i % len(rows)]

    if beyond.any():
        i, side, row = place(beyond.any(1))
        found = int(input_ids[i][beyond[i]][0])
        raise FormatError(f"id {found} in {side}; the model has embeddings for 0 to {num_embeddings - 1}", row=row)
    if early.any() and not allow_eos_padding:
        _, side, row = place(early)
        raise ConfigError(read_past_end(token, f"the {side} side of row {row}"))
