"""Rows to packed tensors: documents joined with one EOS and put together in rows of a fixed length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_objectives.collators.base import Batch, EncodedRow, LanguageModelCollator
from hf_objectives.distributed import world_size
from hf_objectives.errors import NothingSupervisedError, TokenizerError
from hf_objectives.labels import LabelConfig, PieceEncoder
from hf_objectives.packing import check_packing, pack_rows
from hf_objectives.types import IGNORE_INDEX, Row


@dataclass(kw_only=True)
class DataCollatorWithEosPacking(LanguageModelCollator):
    """Joins documents with exactly one EOS between them and packs them into rows of `max_length`.

    A document that ends with EOS (or with EOS and one token of white space, as ChatML renders end) gets no other one. The
    EOS of any other document is trained if the document's last token is. Rows that `prepare_dataset` or `pack_dataset`
    packed are taken as they are: `seq_lengths` or `position_ids` say where their documents lie, and have to agree.

    Args:
        tokenizer: a fast transformers tokenizer with an EOS token.
        max_length: tokens that a row may hold.
        strategy: "best_fit" or "first_fit" packs whole documents; "concat" makes a continuous stream, as GPT was trained on.
        isolate_documents: positions restart at each document, and no document sees another under sdpa, eager or flash
            attention. Outside of a Trainer call the model with `use_cache=False`: with a cache transformers takes the row
            for one document.
        overflow: what happens to documents longer than a row, but under "concat": "truncate" (a conversation's cut turn is
            not trained), "split" into pieces, or "drop".
        return_flash_attn_kwargs: give `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [documents + 1]), `max_length_q` and
            `max_length_k` (int) when isolating, and `seq_idx` (int32 [rows, width], the number of a token's document in its
            row), which layers with convolutions read; padding counts as a document of its own.
        train_on, control_tokens, chat_template, template_kwargs, pad_to_multiple_of, allow_empty, return_source: see
            `DataCollatorForAssistantOnlyLM`.

    Returns (from a call): `input_ids`, `labels`, int64 [rows, width]; when isolating also `position_ids`, and no
    `attention_mask`, which would make the model see one document; otherwise an `attention_mask` where there is padding.
    No document's first token is a target, in any mode.

    Raises:
        ConfigError: an unknown strategy or overflow, or `max_length` under 2 or missing.
        TokenizerError: no EOS token.
        DataError, NothingSupervisedError: as `DataCollatorForAssistantOnlyLM`.
    """

    strategy: str = "best_fit"
    isolate_documents: bool = True
    overflow: str = "truncate"
    return_flash_attn_kwargs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_packing(self.max_length, self.strategy, self.overflow)
        if getattr(self.tokenizer, "eos_token_id", None) is None:
            raise TokenizerError("the tokenizer has no EOS token to join documents with; set tokenizer.eos_token")

    @property
    def survives_dispatch(self) -> bool:
        """Whether batches stay whole: on one process those without the bounds of documents, which are no rows.

        Several processes would get equal shares of the packed rows, and what does not divide would be lost.
        """
        return world_size() == 1 and not (self.isolate_documents and self.return_flash_attn_kwargs)

    def __call__(self, features: Sequence[Row]) -> Batch:
        self.check_host()
        # Conversations that will be truncated are cut when they are encoded, where their turns are known.
        cuts = self.strategy != "concat" and self.overflow == "truncate"
        encoder = PieceEncoder(self.tokenizer, self if cuts else LabelConfig(**{**self.options(), "max_length": None}))
        read = [self.read(row, i, encoder) for i, row in enumerate(features)]
        whole = [not cuts or row.get("input_ids") is not None for row in features]
        loose = [self._closed(row, is_whole) for row, is_whole in zip(read, whole, strict=True) if not row.packed]
        rows = [row for row in read if row.packed] + (self._packed(loose) if loose else [])
        if not rows:
            raise NothingSupervisedError(f"every document of the batch is longer than max_length={self.max_length}")
        for row in rows:
            begins = np.cumsum([0, *row.lengths[:-1]])
            row.labels[begins[np.array(row.lengths) > 0]] = IGNORE_INDEX
        batch = self.tensors(rows, len(features))
        width = batch["input_ids"].shape[1]
        if self.isolate_documents:
            batch.update(self._isolated(rows, width))
        elif any(len(row.ids) < width for row in rows):
            batch["attention_mask"] = self.pad([np.ones(len(row.ids)) for row in rows], 0)
        return batch

    def _closed(self, row: EncodedRow, whole: bool) -> EncodedRow:
        """The document with one EOS at its end, unless it was cut at `max_length`."""
        eos, n = int(self.tokenizer.eos_token_id), len(row.ids)
        if not n or (not whole and n == self.max_length) or row.ids[-1] == eos:
            return row
        if n > 1 and row.ids[-2] == eos and self.tokenizer.decode(row.ids[-1:].tolist()).isspace():
            return row
        label = eos if row.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
        weights = None if row.weights is None else np.append(row.weights, row.weights[-1])
        return replace(
            row, ids=np.append(row.ids, eos), labels=np.append(row.labels, label), weights=weights, lengths=[n + 1]
        )

    def _packed(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        offsets = np.concatenate(([0], np.cumsum([len(row.ids) for row in rows])))
        packed = pack_rows(offsets, self.max_length or 0, strategy=self.strategy, overflow=self.overflow)
        weights = [np.ones(len(row.ids), np.float32) if row.weights is None else row.weights for row in rows]
        flat = [np.concatenate(arrays) for arrays in ([row.ids for row in rows], [row.labels for row in rows], weights)]
        weighted = any(row.weights is not None for row in rows)
        ids, labels, token_weights = (np.split(values, packed.row_offsets[1:-1]) for values in packed.gather_all(flat))
        made = []
        for i, (a, b) in enumerate(itertools.pairwise(packed.piece_offsets)):
            documents = [rows[d] for d in packed.documents[a:b]]
            names = [(document.sources or [""])[0] for document in documents]
            numbers = [(document.numbers or [-1])[0] for document in documents]
            origin = names if any(names) else None, numbers if max(numbers) >= 0 else None
            row_weights = token_weights[i] if weighted else None
            made.append(EncodedRow(ids[i], labels[i], row_weights, packed.lengths[a:b].tolist(), *origin, packed=True))
        return made

    def _isolated(self, rows: Sequence[EncodedRow], width: int) -> Batch:
        """Positions that restart at each document, and the bounds of documents for flash attention; padding is one, too."""
        sizes = np.array([n for row in rows for n in [*row.lengths, width - len(row.ids)] if n], np.int64)
        ends = np.cumsum(sizes)
        positions = np.arange(len(rows) * width) - np.repeat(ends - sizes, sizes)
        batch: Batch = {"position_ids": torch.from_numpy(positions.reshape(len(rows), width))}
        if self.return_flash_attn_kwargs:
            first = positions.reshape(len(rows), width) == 0
            bounds, longest = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)), int(sizes.max())
            batch |= {
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
                "seq_idx": torch.from_numpy(np.cumsum(first, axis=1, dtype=np.int32) - 1),
            }
        return batch
