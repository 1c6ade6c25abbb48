"""Tokens of a tokenizer that a model has no embedding for."""

from __future__ import annotations

from typing import Any

from hf_objectives.errors import TokenizerError


def num_embeddings(model: Any) -> int | None:
    """Ids that a model has embeddings for; None where it does not say."""
    find = getattr(model, "get_input_embeddings", None)
    return getattr(find() if callable(find) else None, "num_embeddings", None)


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Refuse a model without an embedding for a token that text or padding can produce.

    Control tokens that neither frame texts nor stand in the chat template may be without one: some text models have the
    tokenizer of a vision model of their family.

    Raises:
        TokenizerError: names the first such token.
    """
    number = num_embeddings(model)
    if number is None or not hasattr(tokenizer, "added_tokens_decoder") or len(tokenizer) <= number:
        return
    template = str(getattr(tokenizer, "chat_template", None))
    added = tokenizer.added_tokens_decoder.items()
    unused = {i for i, token in added if token.special and str(token) not in template}
    unused -= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    without = {i: token for token, i in tokenizer.get_vocab().items() if i >= number and i not in unused}
    if without:
        first = min(without)
        raise TokenizerError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {number} embeddings: {without[first]!r} is "
            f"{first}; expected the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)) first"
        )
