"""Files and datasets to encoded, packed rows, in memory or on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.preparation.config import (
        CorpusSettings,  # How documents become rows. Every field but the last four decides what the rows hold
        difference,  # What two policies disagree on, a line each
        tokenizer_digest,  # A digest of all of a tokenizer that shapes ids: its backend, byte for byte, and its special t
    )
    from hf_objectives.preparation.corpus import (
        load_prepared,  # The rows of a prepared folder: a `datasets.Dataset`, or a stream without an end
        prepare_corpus,  # Prepare packed rows of some sources in a folder, once however many processes ask for them
    )
    from hf_objectives.preparation.data_files import (
        hold_out,  # Row numbers to train on and to evaluate on; a row's side follows from seed and number alone
        is_hub_id,  # Whether a path can only be the id of a dataset on the Hub: `owner/name`, and no such file
        load_rows,  # the rows of local files, in memory, or of a data set of the Hub
    )
    from hf_objectives.preparation.dataset import (
        encode_rows,  # All rows, encoded but not packed: `input_ids`, `labels`, `source` and `row`; see `prepare_dataset`
        prepare_dataset,  # Encode, label and pack a dataset
    )
    from hf_objectives.preparation.lock import (
        exclusive,  # Hold a folder for this process; while another holds it, wait and say how far that one is
    )
    from hf_objectives.preparation.manifest import (
        MANIFEST,
        Manifest,  # What a prepared folder holds
    )
    from hf_objectives.preparation.ordered_stream import (
        OrderedStream,  # Rows 0, 1, 2, ... of an order that never ends, so that every rank takes as many steps as the oth
    )
    from hf_objectives.preparation.readers import (
        list_files,  # The files that a path, a folder or a glob stands for, in order of name
    )
    from hf_objectives.preparation.stream import (
        PreparedStream,  # The packed rows of shards, pass after pass
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
