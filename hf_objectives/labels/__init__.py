"""One row to token ids and labels: which tokens are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.labels.batches import (
        BatchEncoder,  # Encodes batches of rows to Arrow tables
    )
    from hf_objectives.labels.chat import (
        Labelled,  # A batch of encoded texts with labels
        encode_chat,  # Token ids and labels of one conversation
        encode_chats,  # `encode_chat` for many conversations, to an Arrow table
        read_tools,  # Tool schemas as a list, from a list or from JSON text
    )
    from hf_objectives.labels.config import (
        CONTROL_TOKENS,  # Values of `control_tokens`
        ON_ERROR,  # Values of `on_error`
        OVERLENGTH,  # Values of `overlength`
        TRAIN_ON,  # Values of `train_on`
        EncodingConfig,  # How the rows of a dataset become ids and labels
        EncodingOptions,  # Its fields as keyword arguments of a function
        LabelConfig,  # How one row becomes ids and labels
        Overlength,  # Type of `overlength`
        TrainOn,  # Type of `train_on`
    )
    from hf_objectives.labels.formats import (
        FORMATS,  # The row formats by name
        Example,  # One row in one form, whatever its format
        Kind,  # What a row is: a text, prompt and completion, messages, a preference, tokens
        detect_format,  # Name of the format of a row, a key of FORMATS
        to_example,  # Reads a row to an Example
    )
    from hf_objectives.labels.framing import (
        document_frame,  # What stands before a document (BOS) and after it (EOS)
    )
    from hf_objectives.labels.generation import (
        generation_template,  # The tokenizer's template with marks around what is trained
    )
    from hf_objectives.labels.ledger import (
        SKIPPED,  # End of the reason of a row that was skipped because of an error
        TOO_LONG,  # Reason of a row that is longer than `max_length`
        UNSUPERVISED,  # Reason of a row that trains no token
        Account,  # What happened to the rows and tokens of one source
        Ledger,  # Accounts by source name
    )
    from hf_objectives.labels.messages import (
        REASONING_FIELDS,  # Names that the reasoning of a message goes by
        ROLES,  # Roles that a message may have
        ControlTokens,  # Finds control tokens in text and wraps them, so that they are read as plain text
        content_texts,  # The texts of a message's content, a string or a list of parts
        read_messages,  # Checks a conversation and removes what the template must not see
    )
    from hf_objectives.labels.pair_limits import (
        fit_ids,  # Cuts an encoded preference pair to `max_length`
    )
    from hf_objectives.labels.pair_prompt import (
        SIDES,  # "chosen" and "rejected"
    )
    from hf_objectives.labels.pairs import (
        encode_pair,  # Ids and masks of one preference row
    )
    from hf_objectives.labels.pieces import (
        Piece,  # What one encoded row is made from: its source, number, text and trained spans
        PieceEncoder,  # Encodes rows one by one: render, tokenise, frame
    )
    from hf_objectives.labels.prompts import (
        to_prompt,  # The prompt of a row of any format
        with_prompts,  # A dataset with the prompt of each row, in whatever format, in a column `prompt`
    )
    from hf_objectives.labels.rows import (
        RowEncoder,  # Encodes many rows of any format: render, tokenise, frame, limit, account
        encode_row,  # Ids and labels of one row in any accepted format
    )
    from hf_objectives.labels.templates import (
        Renderer,  # Renders conversations under one template, one set of tools and one set of template variables
        control_tokens,  # The control tokens of a tokenizer under a template, longest first
        marker_pattern,  # A pattern for control tokens in rendered text
        template_of,  # The template text that `apply_chat_template` would use
    )
    from hf_objectives.labels.tokenization import (
        text_encoder,  # The TextEncoder of a tokenizer, made once
        token_byte_lengths,  # Bytes of text per token id
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
