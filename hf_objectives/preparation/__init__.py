"""Files and datasets to encoded, packed rows, in memory or on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.preparation.config import (
        CorpusConfig,  # how documents become prepared rows
        CorpusSettings,  # the former name of CorpusConfig
        difference,  # what two policies of rows disagree on, in words
        tokenizer_digest,  # a digest of everything of a tokenizer that decides ids
    )
    from hf_objectives.preparation.corpus import (
        load_prepared,  # a prepared folder as a dataset, or as a stream without an end
        prepare_corpus,  # sources to a folder of shards, made once
    )
    from hf_objectives.preparation.dataset import (
        encode_rows,  # rows to one table of encoded documents that are not packed
        prepare_dataset,  # rows or files to a dataset of encoded, packed rows
    )
    from hf_objectives.preparation.files import (
        is_hub_id,  # whether a path can only be a dataset on the Hub
        list_files,  # the files that a path, a folder or a glob stands for
    )
    from hf_objectives.preparation.lock import exclusive  # hold a folder while this process works in it
    from hf_objectives.preparation.manifest import (
        MANIFEST,  # name of the manifest's file
        Manifest,  # what a prepared folder holds
    )
    from hf_objectives.preparation.ordered_stream import (
        OrderedStream,
    )  # base of streams that ranks and workers read alike
    from hf_objectives.preparation.places import (
        Place,  # where rows lie: files, an object store, or a dataset of the Hub
        local_files,  # the files of a path, those of an object store copied here
    )
    from hf_objectives.preparation.readers import (
        load_rows,  # all rows of local files, or a dataset of the Hub
        naming_places,  # adds file and line to errors about such rows
    )
    from hf_objectives.preparation.shards import disk_full  # an error as one about a full disk
    from hf_objectives.preparation.splits import (
        are_held_out,  # which rows are evaluated on
        check_share,  # check a share of rows that is held out
        hold_out,  # row numbers to train on and to evaluate on
    )
    from hf_objectives.preparation.stored import (
        ChainedRows,  # the rows of several sequences, one after the other
        SelectedRows,  # some rows of a source, with their numbers there
        mapped_dataset,  # such a table as a dataset
        mapped_tables,  # tables as such that are mapped from disk
        store_rows,  # all rows of a place, on disk
        write_tables,  # tables to an Arrow IPC stream
    )
    from hf_objectives.preparation.stream import PreparedStream  # a prepared folder as a stream without an end
    from hf_objectives.preparation.workers import check_engine  # check that an engine is known and installed
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
