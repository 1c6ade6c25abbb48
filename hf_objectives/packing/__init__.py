"""Documents to rows of a fixed length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.packing.bins import pack_lengths  # Lengths to bins
    from hf_objectives.packing.dataset import (
        flat_column,  # A list column of a table as its values end to end, and the offsets of its rows
        list_column,  # Lists from values end to end and offsets
        pack_dataset,  # An encoded dataset to a dataset of packed rows
        pack_table,  # The same for Arrow tables
        pack_tables,  # The same, some rows at a time
    )
    from hf_objectives.packing.rows import (
        PackedRows,  # Rows of packed documents: which piece of which document is where
        check_packing,  # Checks strategy, overflow and max_length
        document_positions,  # the position of each token in its document
        pack_rows,  # Documents to packed rows
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
