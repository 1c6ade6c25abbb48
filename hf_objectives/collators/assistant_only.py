"""Rows to padded tensors, in which only what the assistant has to produce is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_objectives.collators.base import Batch, LanguageModelCollator
from hf_objectives.errors import FormatError
from hf_objectives.labels import PieceEncoder
from hf_objectives.types import IGNORE_INDEX, Row


@dataclass(kw_only=True)
class DataCollatorForAssistantOnlyLM(LanguageModelCollator):
    """Pads conversations; only what the assistant has to produce is trained.

    Takes raw rows of any format of `formats.py`, which it encodes, or encoded rows (`input_ids`, `labels`). It works as
    `data_collator` of a `Trainer`, of TRL's trainers and of a DataLoader with workers. In a `Trainer` that is given raw
    rows set `remove_unused_columns=False`, and in TRL's SFTTrainer `dataset_kwargs={"skip_prepare_dataset": True}` as well.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: longer rows are cut off, and a turn that the cut goes through is not trained.
        train_on, control_tokens, chat_template, template_kwargs: see `LabelConfig`. Only "all" accepts encoded rows that
            have no labels or labels equal to their ids.
        pad_to_multiple_of: widths are multiples of this.
        allow_empty: accept a batch in which nothing is trained, which is an error otherwise.
        return_source: give the source and the row number of each token (`source_names`, list of str; `source_ids` and
            `row_ids`, int64 [rows, width], -1 for none) where rows have `source` and `row`.

    Returns (from a call): `input_ids`, `attention_mask`, `labels`, int64 [rows, width], padded on the right whatever the
    tokenizer's padding side; `labels` are unshifted and -100 on padding, on what is not trained and on the first token.

    Raises:
        DataError: a row that cannot be used, or one that holds several documents; `row` counts within the batch.
        NothingSupervisedError: no token of the batch is trained.
        TokenizerError: neither a pad nor an EOS token.
        ConfigError: an unknown option, or `max_length` under 2.

    Example:
        >>> from hf_objectives import demo, DataCollatorForAssistantOnlyLM
        >>> collate = DataCollatorForAssistantOnlyLM(demo.build_tokenizer())
        >>> batch = collate([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'labels']
    """

    def __call__(self, features: Sequence[Row]) -> Batch:
        encoder = PieceEncoder(self.tokenizer, self)
        rows = [self.read(row, i, encoder, max_ids=self.max_length) for i, row in enumerate(features)]
        for i, row in enumerate(rows):
            if len(row.lengths) > 1:
                raise FormatError(
                    f"the row holds {len(row.lengths)} documents, which would see each other here; use "
                    "DataCollatorWithEosPacking for packed rows",
                    row=i,
                )
            row.labels[:1] = IGNORE_INDEX  # nothing predicts the first token
        seen = self.pad([np.ones(len(row.ids)) for row in rows], 0)
        return {**self.tensors(rows, len(rows)), "attention_mask": seen}
