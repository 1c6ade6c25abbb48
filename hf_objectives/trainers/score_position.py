"""Where a reward model reads its score, and what has to hold for that to be the last token of the text.

transformers' sequence classifiers read the score at the last token whose id is not the config's `pad_token_id`, and do
not look at the attention mask. So three things can go wrong without an error. Batches padded with another id than the
config's are read on padding. A text that ends with the padding token, as all do whose EOS is the padding token, is read
before its end: alone, padded left or right all the same, but a finished answer and one that broke off before its EOS
then have one score. And a program that chooses another padding token than the training did reads elsewhere than it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_objectives.errors import ConfigError, FormatError, TokenizerError

_SPARE = ("reserved", "unused")


def spare_pad_token(tokenizer: Any, num_embeddings: int) -> str | None:
    """A token of the tokenizer that can pad and ends no text, or None.

    Control tokens only, with an embedding, that are not EOS or BOS and do not stand in the chat template: one named after
    padding first, then the unknown token, then a reserved one.

    Args:
        tokenizer: a transformers tokenizer.
        num_embeddings: how many the model has.
    """
    templates = tokenizer.chat_template
    text = " ".join(templates.values()) if isinstance(templates, dict) else templates or ""
    free = {
        token.content: i
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        and i < num_embeddings
        and i not in (tokenizer.eos_token_id, tokenizer.bos_token_id)
        and token.content not in text
    }
    named = [token for token in free if "pad" in token.lower()]
    unknown = [token for token in free if token == tokenizer.unk_token]
    reserved = [token for token in free if any(word in token.lower() for word in _SPARE)]
    return next(iter([*named, *unknown, *reserved]), None)


def check_vocabulary(tokenizer: Any, num_embeddings: int) -> None:
    """Hold the tokenizer against the model.

    Raises:
        TokenizerError: a token that text or padding can produce has no embedding. Control tokens that nothing asks for may
            be without: some models of text have the tokenizer of their siblings that see.
    """
    if len(tokenizer) <= num_embeddings:
        return
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.pad_token_id}
    without = {i: token for token, i in tokenizer.get_vocab().items() if i >= num_embeddings and i not in control}
    if without:
        first = min(without)
        raise TokenizerError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {num_embeddings} embeddings: {without[first]!r} is "
            f"{first}; expected the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)) before training"
        )


def read_past_end(token: str, text: str) -> str:
    """What to say where a text ends with the padding token."""
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
    """Hold a batch of pairs against what the model will read; both int64 [2n, length], chosen answers first.

    Args:
        input_ids: the ids.
        attention_mask: 0 where there is padding; None where there is none.
        pad_token_id: the model config's.
        num_embeddings: how many the model has.
        rows: numbers of the n rows, for errors.
        token: the padding token.
        allow_eos_padding: let a text end with the padding token.

    Raises:
        ConfigError: padding with another id, or a text that ends with the padding token.
        FormatError: an id that the model has no embedding for.
    """
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    wrong = input_ids[~kept & (input_ids != pad_token_id)]
    if len(wrong):
        raise ConfigError(
            f"the collator pads with id {int(wrong[0])}, and the model takes {pad_token_id} ({token!r}) for padding; its "
            "score would be read on padding"
        )
    columns = torch.arange(input_ids.shape[1])
    ends = torch.where(kept, columns, -1).amax(1)
    beyond = ((input_ids >= num_embeddings) | (input_ids < 0)) & kept
    early = input_ids.gather(1, ends[:, None])[:, 0] == pad_token_id
    for bad in (beyond.any(1), early & (not allow_eos_padding)):
        if not bool(bad.any()):
            continue
        i = int(bad.nonzero()[0])
        side, row = ("chosen", "rejected")[i // len(rows)], rows[i % len(rows)]
        if beyond[i].any():
            found = int(input_ids[i][beyond[i]][0])
            raise FormatError(f"id {found} in {side}; the model has embeddings for 0 to {num_embeddings - 1}", row=row)
        raise ConfigError(read_past_end(token, f"the {side} side of row {row}"))
