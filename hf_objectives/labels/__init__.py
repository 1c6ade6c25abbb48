"""One row to token ids and labels: which tokens are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.labels.batches import (
        BatchEncoder,  # Encodes batches of rows; see `prepare_dataset` for the settings
    )
    from hf_objectives.labels.byte_lengths import (
        token_byte_lengths,  # Bytes of text per token id
    )
    from hf_objectives.labels.chat import (
        Labelled,  # A batch of encoded texts with labels
        encode_chat,  # Token ids and labels of one conversation
        encode_chats,  # `encode_chat` for a batch
        read_tools,  # Tool schemas as a list: parsed from JSON text, without the null keys that an Arrow table gives ever
    )
    from hf_objectives.labels.config import (
        CONTROL_TOKENS,
        ON_ERROR,
        OVERLENGTH,
        TRAIN_ON,
        EncodingConfig,  # how rows become ids and labels
        EncodingOptions,  # its fields as keyword arguments of a function
        Overlength,
        TrainOn,
    )
    from hf_objectives.labels.formats import (
        FORMATS,  # The formats, by name
        Example,  # One row in one form
        detect_format,  # Name of the format of a row, a key of FORMATS
        to_example,  # Read a row
    )
    from hf_objectives.labels.ledger import (
        Account,  # The account of one source
        Ledger,  # Accounts by source name
    )
    from hf_objectives.labels.messages import (
        REASONING_FIELDS,
        ROLES,  # Roles that chat templates in use know. "assistant" is the one whose turns are trained
        ControlTokens,  # Finds literal control tokens in untrusted text and wraps them so that they are tokenised as plai
        content_texts,  # The texts of a message's content: itself when it is a string, those of its blocks when it is a l
        read_messages,  # Check a conversation and strip what the template must not see
    )
    from hf_objectives.labels.pair_prompt import (
        SIDES,
    )
    from hf_objectives.labels.pairs import (
        encode_pair,  # Ids and masks of one preference row
        fit_ids,  # An encoded pair (arrays) cut to `max_length`: the prompt's first tokens after BOS go first, see the mo
    )
    from hf_objectives.labels.prompts import (
        PromptOrder,  # TRL's order of prompts, with a shuffle that depends on the epoch and not on how many this process
        with_prompts,  # Rows with their prompt in a column `prompt`, in one form, all text or all conversations, and thei
    )
    from hf_objectives.labels.rows import (
        SKIPPED,
        TOO_LONG,
        UNSUPERVISED,
        RowEncoder,  # Encodes rows under fixed settings; see `prepare_dataset`
        encode_row,  # Ids and labels of one row in any accepted format; what is beyond `max_length` is cut off
    )
    from hf_objectives.labels.templates import (
        Renderer,  # Renders conversations under one template, one set of tools and one set of template arguments
        control_tokens,  # The control tokens of a tokenizer under a template, longest first
        marker_pattern,  # A pattern for control tokens in rendered text: the tokenizer's added tokens and whatever has th
        template_of,  # The template text that `apply_chat_template` would use: the argument, a named one, or the tokenize
    )
    from hf_objectives.labels.tokenization import (
        text_encoder,  # The TextEncoder of a tokenizer, made once and again when tokens were added to it
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
