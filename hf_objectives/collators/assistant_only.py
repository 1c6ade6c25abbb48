"""Lists of rows to tensors: padded conversations, or documents packed into rows.

Both collators take rows as they come (any format of `formats.py`; they encode) or encoded rows (`input_ids`, `labels`).
They work as `data_collator` of a `Trainer`, of TRL's trainers and of a DataLoader with workers; in a `Trainer` that is
given raw rows set `remove_unused_columns=False`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_objectives.errors import ConfigError, FormatError, NothingSupervisedError, TokenizerError, nearest
from hf_objectives.labels import CONTROL_TOKENS, TRAIN_ON, encode_row
from hf_objectives.packing import check_packing, pack_rows
from hf_objectives.types import IGNORE_INDEX, Row

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One row: ids, labels, optional weights of its labels, and length, source and row number of its documents."""

    ids: NDArray
    labels: NDArray
    weights: NDArray | None
    lengths: list[int]
    sources: list[str] | None
    numbers: list[int] | None
    packed: bool


def check_choices(train_on: str, control_tokens: str) -> None:
    """Refuse an unknown `train_on` or `control_tokens`.

    Raises:
        ConfigError: names the setting and the known values.
    """
    for name, value, known in (("train_on", train_on, TRAIN_ON), ("control_tokens", control_tokens, CONTROL_TOKENS)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}{nearest(str(value), known)}")


def padding_id(tokenizer: Any) -> int:
    """Id of the token to pad with: the pad token, EOS where there is none.

    Raises:
        TokenizerError: neither.
    """
    for name in ("pad_token_id", "eos_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            return int(value)
    raise TokenizerError("the tokenizer has neither a pad nor an EOS token to pad with; set tokenizer.pad_token")


@dataclass
class _Collator:
    """What both collators share: encoding of raw rows, checks, and columns that ride along."""

    tokenizer: Any
    max_length: int | None = None
    train_on: str = "assistant"
    control_tokens: str = "plain"
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    allow_empty: bool = False
    return_source: bool = False

    def __post_init__(self) -> None:
        check_choices(self.train_on, self.control_tokens)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; expected at least 2, a token and the one that it predicts"
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected at least 1")

    @property
    def pad_token_id(self) -> int:
        """The pad token's id, EOS where there is none; padding is told from a real EOS by mask and labels."""
        return padding_id(self.tokenizer)

    def _read(self, row: Row, i: int, max_length: int | None) -> _Encoded:
        sources = row.get("sources") or ([row["source"]] if row.get("source") is not None else None)
        numbers = row.get("rows") or ([row["row"]] if isinstance(row.get("row"), int) else None)
        packed = row.get("seq_lengths") is not None
        if row.get("input_ids") is None or packed:
            encoded = row if packed else self._encode(row, i, max_length)
        else:
            encoded = (
                row if max_length is None or len(row["input_ids"]) <= max_length else self._encode(row, i, max_length)
            )
        ids = np.asarray(encoded["input_ids"], np.int64)
        labels = ids.copy() if encoded.get("labels") is None else np.array(encoded["labels"], np.int64)
        if labels.shape != ids.shape or ids.ndim != 1:
            raise FormatError(
                f"input_ids of shape {ids.shape}, labels of shape {labels.shape}; expected one label per token", row=i
            )
        weights = row.get("loss_weights")
        if weights is not None:
            weights = np.asarray(weights, np.float32)[: len(ids)]
            if weights.shape != ids.shape:
                raise FormatError(f"{len(weights)} loss_weights for {len(ids)} tokens; expected one per token", row=i)
        lengths = [int(length) for length in row["seq_lengths"]] if packed else [len(ids)]
        if sum(lengths) != len(ids):
            raise FormatError(f"seq_lengths add up to {sum(lengths)}, the row has {len(ids)} tokens", row=i)
        if sources is not None and len(sources) != len(lengths):
            sources = list(sources) * len(lengths)
        return _Encoded(ids, labels, weights, lengths, sources, numbers, packed)

    def _encode(self, row: Row, i: int, max_length: int | None) -> dict[str, list[int]]:
        return encode_row(
            self.tokenizer,
            row,
            max_length=max_length,
            train_on=self.train_on,
            control_tokens=self.control_tokens,
            chat_template=self.chat_template,
            source=row.get("source"),
            row_index=i,
            **self.template_kwargs,
        )

    def _check_supervised(self, labels: NDArray[np.int64], number: int) -> None:
        if not self.allow_empty and not (labels[:, 1:] != IGNORE_INDEX).any():
            raise NothingSupervisedError(
                f"no token is trained in a batch of {number} rows; check labels and max_length={self.max_length}, "
                "or pass allow_empty=True"
            )

    def _width(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return max(1, -(-longest // multiple)) * multiple

    def _tensors(self, rows: Sequence[_Encoded]) -> Batch:
        """Right-padded `input_ids`, `labels` and what rides along, [rows, width]."""
        width = self._width(max(len(row.ids) for row in rows))
        ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        labels = np.full((len(rows), width), IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            labels[i, : len(row.ids)] = row.labels
        batch: Batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if any(row.weights is not None for row in rows):
            weights = np.ones((len(rows), width), np.float32)
            for i, row in enumerate(rows):
                if row.weights is not None:
                    weights[i, : len(row.ids)] = row.weights
            batch["loss_weights"] = torch.from_numpy(weights)
        if self.return_source and any(row.sources for row in rows):
            names: dict[str, int] = {}
            of = np.full((len(rows), width), -1, np.int64)
            for i, row in enumerate(rows):
                for source, begin, length in zip(row.sources or [], _begins(row.lengths), row.lengths, strict=False):
                    of[i, begin : begin + length] = names.setdefault(source, len(names))
            batch["source_names"] = list(names)
            batch["source_ids"] = torch.from_numpy(of)
        if self.return_source and any(row.numbers for row in rows):
            of = np.full((len(rows), width), -1, np.int64)
            for i, row in enumerate(rows):
                for number, begin, length in zip(row.numbers or [], _begins(row.lengths), row.lengths, strict=False):
                    of[i, begin : begin + length] = number
            batch["row_ids"] = torch.from_numpy(of)
        return batch


@dataclass
class DataCollatorForAssistantOnlyLM(_Collator):
    """Pads conversations; only what the assistant has to produce is trained.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: longer rows are cut off, and a turn that the cut goes through is not trained.
        train_on, control_tokens, chat_template, template_kwargs: see `encode_chat`.
        pad_to_multiple_of: widths are multiples of this.
        allow_empty: take a batch in which nothing is trained; it is an error otherwise.
        return_source: give the source and the row number of each token (`source_names`, `source_ids`, `row_ids`; int64
            [rows, width], -1 for none) where rows carry `source` and `row`, for evaluation by source and for reports.

    Returns (from a call): `input_ids`, `attention_mask`, `labels`, int64 [rows, width], padded on the right whatever the
    tokenizer's padding side; `labels` are unshifted and -100 on padding, on what is not trained and on the first token.

    Raises:
        DataError: a row that cannot be used; `row` counts within the batch.
        NothingSupervisedError: no token of the batch is trained.
        TokenizerError: neither a pad nor an EOS token.

    Example:
        >>> from hf_objectives import demo, DataCollatorForAssistantOnlyLM
        >>> collate = DataCollatorForAssistantOnlyLM(demo.build_tokenizer())
        >>> batch = collate([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}])
        >>> sorted(batch)
        ['attention_mask', 'input_ids', 'labels']
    """

    def __call__(self, features: Sequence[Row]) -> Batch:
        rows = [self._read(row, i, self.max_length) for i, row in enumerate(features)]
        for row in rows:
            if len(row.labels):
                row.labels[0] = IGNORE_INDEX
        batch = self._tensors(rows)
        self._check_supervised(batch["labels"].numpy(), len(rows))
        mask = np.arange(batch["input_ids"].shape[1]) < np.array([[len(row.ids)] for row in rows])
        batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch


@dataclass
class DataCollatorWithEosPacking(_Collator):
    """Joins documents with exactly one EOS between them and packs them into rows of `max_length`.

    A document that ends with EOS (or EOS and one token of white space, as ChatML renders end) is given none; another
    one is, trained if the document's last token is. Rows that `prepare_dataset` or `pack_dataset` packed (`seq_lengths`)
    are taken as they are.

    Args:
        tokenizer: a fast transformers tokenizer with an EOS token.
        max_length: tokens a row may hold.
        strategy: "best_fit" packs whole documents; "concat" makes a continuous stream, as GPT was trained on.
        isolate_documents: positions restart at each document, and no document sees another under sdpa, eager or flash
            attention. Outside of a Trainer call the model with `use_cache=False`: with a cache transformers takes the row
            for one document.
        overflow: for best_fit, what becomes of documents longer than a row: "truncate" (a conversation's cut turn is
            not trained), "split" into pieces, or "drop".
        return_flash_attn_kwargs: give `cu_seq_lens_q`, `cu_seq_lens_k` (int32 [documents + 1]), `max_length_q` and
            `max_length_k` (int) when isolating; padding counts as a document of its own.
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
        if self.max_length is None:
            raise ConfigError("packing needs max_length, the number of tokens a row holds")
        check_packing(self.max_length, self.strategy, self.overflow)
        if getattr(self.tokenizer, "eos_token_id", None) is None:
            raise TokenizerError("the tokenizer has no EOS token to join documents with; set tokenizer.eos_token")

    def __call__(self, features: Sequence[Row]) -> Batch:
        assert self.max_length is not None  # __post_init__ raised otherwise
        rows = [self._document(row, i) for i, row in enumerate(features)]
        ready = [row for row in rows if row.packed]
        loose = [row for row in rows if not row.packed]
        for row in ready:
            row.labels[[begin for begin, length in zip(_begins(row.lengths), row.lengths, strict=True) if length]] = (
                IGNORE_INDEX
            )
        made = ready + (self._pack(loose) if loose else [])
        if not made:
            raise NothingSupervisedError(f"every document of the batch is longer than max_length={self.max_length}")
        batch = self._tensors(made)
        self._check_supervised(batch["labels"].numpy(), len(features))
        width = batch["input_ids"].shape[1]
        if self.isolate_documents:
            self._isolate(batch, made, width)
        elif any(len(row.ids) < width for row in made):
            mask = np.arange(width) < np.array([[len(row.ids)] for row in made])
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        return batch

    def _document(self, row: Row, i: int) -> _Encoded:
        """One document, closed by EOS; longer conversations are cut here, where their turns are known."""
        cut = self.max_length if self.strategy == "best_fit" and self.overflow == "truncate" else None
        if row.get("input_ids") is not None:
            cut = None
        read = self._read(row, i, cut)
        if read.packed or not len(read.ids) or (cut is not None and len(read.ids) == cut):
            return read
        eos = int(self.tokenizer.eos_token_id)
        if read.ids[-1] == eos or (
            len(read.ids) > 1 and read.ids[-2] == eos and self.tokenizer.decode(read.ids[-1:].tolist()).isspace()
        ):
            return read
        label = eos if read.labels[-1] != IGNORE_INDEX else IGNORE_INDEX
        weights = None if read.weights is None else np.append(read.weights, read.weights[-1])
        ids, labels = np.append(read.ids, eos), np.append(read.labels, label)
        return _Encoded(ids, labels, weights, [len(ids)], read.sources, read.numbers, False)

    def _pack(self, rows: Sequence[_Encoded]) -> list[_Encoded]:
        assert self.max_length is not None
        offsets = np.concatenate(([0], np.cumsum([len(row.ids) for row in rows])))
        packed = pack_rows(offsets, self.max_length, strategy=self.strategy, overflow=self.overflow)
        ids = packed.gather(np.concatenate([row.ids for row in rows]))
        labels = packed.labels(np.concatenate([row.labels for row in rows]))
        weights = None
        if any(row.weights is not None for row in rows):
            ones = [np.ones(len(row.ids), np.float32) if row.weights is None else row.weights for row in rows]
            weights = packed.gather(np.concatenate(ones))
        made = []
        for i in range(len(packed.row_offsets) - 1):
            tokens = slice(*packed.row_offsets[i : i + 2])
            pieces = slice(*packed.piece_offsets[i : i + 2])
            sources = [(rows[d].sources or [""])[0] for d in packed.documents[pieces]]
            numbers = [(rows[d].numbers or [-1])[0] for d in packed.documents[pieces]]
            made.append(
                _Encoded(
                    ids[tokens],
                    labels[tokens],
                    None if weights is None else weights[tokens],
                    packed.lengths[pieces].tolist(),
                    sources if any(sources) else None,
                    numbers if max(numbers) >= 0 else None,
                    True,
                )
            )
        return made

    def _isolate(self, batch: Batch, rows: Sequence[_Encoded], width: int) -> None:
        lengths = [length for row in rows for length in [*row.lengths, width - len(row.ids)] if length]
        sizes = np.asarray(lengths, np.int64)
        ends = np.cumsum(sizes)
        positions = np.arange(len(rows) * width) - np.repeat(ends - sizes, sizes)
        batch["position_ids"] = torch.from_numpy(positions.reshape(len(rows), width))
        if self.return_flash_attn_kwargs:
            bounds = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = bounds
            batch["max_length_q"] = batch["max_length_k"] = int(sizes.max())


def _begins(lengths: Sequence[int]) -> list[int]:
    """Where each of several documents in a row begins."""
    return [0, *np.cumsum(lengths)[:-1].tolist()]
