"""What the collators share: rows to arrays, and arrays to right-padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from hf_objectives.distributed import is_dispatched
from hf_objectives.errors import ConfigError, FormatError, NothingSupervisedError, TokenizerError
from hf_objectives.labels import LabelConfig, PieceEncoder
from hf_objectives.types import IGNORE_INDEX, Row, called_by

Batch = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row as arrays.

    Attributes:
        ids, labels: int64 [tokens]; labels are unshifted.
        weights: float32 [tokens], weights of the labels; None where the row has none.
        lengths: tokens of each document in the row; of one document where the row is not packed.
        sources, numbers: source and row number of each document; None where the row has none.
        packed: whether the row was packed before: it says where its documents lie.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32] | None
    lengths: list[int]
    sources: list[str] | None
    numbers: list[int] | None
    packed: bool

    def per_token(self, values: Sequence[int] | None) -> NDArray[np.int64]:
        """One value per document as int64 [tokens]; -1 where there are no values."""
        return np.repeat(np.asarray(values or [-1] * len(self.lengths), np.int64), self.lengths)


@dataclass
class _Tokenizing:
    """The tokenizer, apart so that it is the first argument: dataclasses begin with the fields of the last base class."""

    tokenizer: Any


@dataclass(kw_only=True)
class Collator(LabelConfig, _Tokenizing):
    """Options and padding of all collators; see each."""

    max_length: int | None = field(default=None, kw_only=False)
    pad_to_multiple_of: int | None = None
    num_ids: int | None = None  # of the model's embeddings; trainers set it, so that other ids are refused

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected at least 1")

    _from_trainer: ClassVar[bool] = False

    def __getstate__(self) -> Any:
        """A spawned loader worker cannot see who asks for its batches, so this is asked before it starts."""
        self.check_host()
        return {**vars(self), "_from_trainer": self.in_trainer}

    @property
    def in_trainer(self) -> bool:
        """Whether a Trainer of transformers asks for batches."""
        return self._from_trainer or called_by("transformers.trainer")

    @property
    def survives_dispatch(self) -> bool:
        """Whether batches stay whole where accelerate joins those of all processes and cuts them by rows."""
        return True

    def check_host(self) -> None:
        """Refuse a loader that would cut the batches.

        Raises:
            ConfigError: accelerate hands out the batches of one process; says what to change.
        """
        if not self.survives_dispatch and is_dispatched():
            raise ConfigError(
                "accelerate hands out the batches of one process (its default for streams) and cuts them by rows, which "
                f"those of {type(self).__name__} do not survive; set accelerator_config={{'dispatch_batches': False}} in "
                "a Trainer's arguments, DataLoaderConfiguration(dispatch_batches=False) in a loop of accelerate"
            )

    @property
    def pad_token_id(self) -> int:
        """Id of the token to pad with: the pad token, or EOS, which masks tell from a real one; else a TokenizerError."""
        for name in ("pad_token_id", "eos_token_id"):
            if (value := getattr(self.tokenizer, name, None)) is not None:
                return int(value)
        raise TokenizerError("the tokenizer has neither a pad nor an EOS token to pad with; set tokenizer.pad_token")

    def pad(self, rows: Sequence[NDArray], value: float, dtype: Any = np.int64) -> torch.Tensor:
        """Rows [tokens] of any lengths as one tensor [rows, width], padded on the right with `value`."""
        multiple = self.pad_to_multiple_of or 1
        width = max(1, -(-max(map(len, rows)) // multiple)) * multiple
        padded = np.full((len(rows), width), value, dtype)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return torch.from_numpy(padded)


@dataclass(kw_only=True)
class LanguageModelCollator(Collator):
    """What the two collators of language modelling share; see each."""

    allow_empty: bool = False
    return_source: bool = False

    def read(self, row: Row, i: int, encoder: PieceEncoder, max_ids: int | None = None) -> EncodedRow:
        """Row i of a batch as arrays: a raw row is encoded, an encoded one cut to `max_ids`, a packed one taken as it is."""
        ids, labels = (None if row.get(name) is None else np.asarray(row[name]) for name in ("input_ids", "labels"))
        packed = row.get("seq_lengths") is not None or row.get("position_ids") is not None
        if ids is not None and self.train_on != "all" and row.get("loss_weights") is None:
            _check_masked(ids, labels, self.train_on, i)
        if ids is None or (not packed and max_ids is not None and len(ids) > max_ids):
            encoded = encoder.encode_one(row, source=row.get("source"), number=i)
            ids, labels = encoded.ids, encoded.labels
        ids = token_ids(ids, "input_ids", i, self.num_ids)
        labels = ids.copy() if labels is None else token_ids(labels, "labels", i)  # a copy: the first will be ignored
        if labels.shape != ids.shape or ids.ndim != 1:
            raise FormatError(
                f"input_ids of shape {ids.shape}, labels of shape {labels.shape}; expected one label per token", row=i
            )
        weights = row.get("loss_weights")
        if weights is not None:
            weights = np.asarray(weights, np.float32)[: len(ids)]
            if weights.shape != ids.shape:
                raise FormatError(f"{len(weights)} loss_weights for {len(ids)} tokens; expected one per token", row=i)
            if not (np.isfinite(weights) & (weights >= 0)).all():
                raise FormatError("loss_weights has a value below 0 or not finite; expected 0 or more", row=i)
        lengths = _document_lengths(row, len(ids), i) if packed else [len(ids)]
        sources = row.get("sources") or ([row["source"]] * len(lengths) if row.get("source") is not None else None)
        numbers = row.get("rows") or ([row["row"]] if isinstance(row.get("row"), int) else None)
        if numbers is not None:
            numbers = [*numbers, *[-1] * len(lengths)][: len(lengths)]
        return EncodedRow(ids, labels, weights, lengths, sources, numbers, packed)

    def tensors(self, rows: Sequence[EncodedRow], num_rows: int) -> Batch:
        """Padded `input_ids`, `labels` and the extra columns, [rows, width], of a batch of `num_rows` rows."""
        batch: Batch = {
            "input_ids": self.pad([row.ids for row in rows], self.pad_token_id),
            "labels": self.pad([row.labels for row in rows], IGNORE_INDEX),
        }
        if not self.allow_empty and not (batch["labels"][:, 1:] != IGNORE_INDEX).any():
            raise NothingSupervisedError(
                f"no token is trained in a batch of {num_rows} rows; check labels and max_length={self.max_length}, "
                "or pass allow_empty=True"
            )
        if any(row.weights is not None for row in rows):
            weights = [np.ones(len(row.ids)) if row.weights is None else row.weights for row in rows]
            batch["loss_weights"] = self.pad(weights, 1, np.float32)
            self._check_weighted(batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != IGNORE_INDEX])
        if self.return_source and any(row.sources for row in rows):
            names: dict[str, int] = {}
            codes = [[names.setdefault(name, len(names)) for name in row.sources or ()] for row in rows]
            batch["source_ids"] = self.pad([row.per_token(of_row) for row, of_row in zip(rows, codes, strict=True)], -1)
            batch["source_names"] = list(names)
        if self.return_source and any(row.numbers for row in rows):
            batch["row_ids"] = self.pad([row.per_token(row.numbers) for row in rows], -1)
        return batch

    def _check_weighted(self, weights: torch.Tensor) -> None:
        """Refuse weights of trained tokens where nobody applies them."""
        # PerplexityTrainer asks its collator for sources; no other part of a Trainer knows what they are, or weights.
        if not self.return_source and (weights != 1).any() and self.in_trainer:
            raise ConfigError(
                "this Trainer hands loss_weights to the model, which ignores them; use PerplexityTrainer, or leave them "
                "out. Where your own compute_loss applies them, set return_source=True"
            )


def token_ids(values: Any, name: str, i: int, num_ids: int | None = None) -> NDArray[np.int64]:
    """The ids, or the labels, of row i as an array of its own.

    Raises:
        FormatError: a value that is no whole number, negative and not -100, or not under `num_ids`.
    """
    found = np.array(values)
    whole = found.dtype.kind in "iu" or not found.size or (found.dtype.kind == "f" and (found == np.floor(found)).all())
    ids = found.astype(np.int64) if whole else None
    if ids is None or ((ids < 0) & ((ids != IGNORE_INDEX) | (name != "labels"))).any():
        raise FormatError(f"{name} has a value that is no token id; expected whole numbers, 0 or more", row=i)
    if num_ids is not None and ids.size and ids.max() >= num_ids:
        raise FormatError(f"{name} has id {ids.max()}; the model has embeddings for 0 to {num_ids - 1}", row=i)
    return ids


def _document_lengths(row: Row, size: int, i: int) -> list[int]:
    """Tokens of each document of a packed row, from `seq_lengths` or from `position_ids`, which start at 0 in each.

    A plain Trainer drops the first, SFTTrainer the second.

    Raises:
        FormatError: they do not cover the row, or do not agree.
    """
    given, positions = row.get("seq_lengths"), row.get("position_ids")
    lengths = None if given is None else [int(length) for length in given]
    cause = "something cut the row after it was packed (SFTTrainer does, to its max_length): pass rows as they are"
    if lengths is not None and sum(lengths) != size:
        raise FormatError(f"seq_lengths add up to {sum(lengths)}, the row has {size} tokens; {cause}", row=i)
    if positions is None:
        return lengths or []
    places = np.asarray(positions, np.int64)
    begins = np.flatnonzero(places == 0)
    ends = np.append(begins[1:], len(places))
    expected = np.arange(len(places)) - np.repeat(begins, ends - begins) if len(begins) and begins[0] == 0 else None
    if len(places) != size or (size and (expected is None or not np.array_equal(places, expected))):
        raise FormatError(
            f"{len(places)} position_ids for {size} tokens; expected places that count up from 0 in each document; {cause}",
            row=i,
        )
    found = (ends - begins).tolist()
    if lengths is not None and [length for length in lengths if length] != found:
        raise FormatError(
            f"seq_lengths say {len(lengths)} documents, position_ids {len(found)} or others; {cause}", row=i
        )
    return found if lengths is None else lengths


def _check_masked(ids: Any, labels: Any, train_on: str, i: int) -> None:
    """Refuse ids of which every token would be trained: a host that tokenises rows leaves such behind.

    Raises:
        FormatError: the labels are missing or are the ids.
    """
    if labels is None or np.array_equal(ids, labels):
        found = "no labels" if labels is None else "labels that are its ids"
        raise FormatError(
            f"a row of {len(ids)} ids has {found}, so that every token would be trained, and train_on is {train_on!r}; pass "
            "train_on='all' to the collator if that is meant. If the host tokenised conversations (SFTTrainer does), set "
            "its dataset_kwargs={'skip_prepare_dataset': True} and remove_unused_columns=False, so that the collator gets "
            "the messages, or assistant_only_loss=True, which masks them",
            row=i,
        )
