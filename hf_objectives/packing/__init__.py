"""Documents to rows of a fixed length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.packing.bins import (
        PackedRows,  # Rows of packed documents, or pieces of documents
        check_packing,  # Raise ConfigError unless the settings name a way to pack
        pack_lengths,  # Put documents in as few bins as the strategy manages; a pure function of its arguments
        pack_rows,  # Pack documents that lie end to end in one flat array
    )
    from hf_objectives.packing.dataset import (
        flat_column,  # A list column as its values (int32) end to end and the offsets of its rows (int64 [rows + 1])
        pack_dataset,  # Pack the documents of an encoded dataset into rows of at most `max_length` tokens
        pack_table,  # `pack_dataset` on an Arrow table; without `labels`, where all tokens but the first of a document ar
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
