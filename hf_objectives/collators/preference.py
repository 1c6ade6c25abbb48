"""Preference rows to the batch that DPO takes: chosen sides first, then the rejected ones.

Takes rows as they come (any preference format of `formats.py`; it encodes them) or encoded rows (`prompt_ids`, `chosen_ids`,
`rejected_ids`). It works as `data_collator` of TRL's own `DPOTrainer`, and of a DataLoader with workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_objectives.collators.assistant_only import check_choices, padding_id
from hf_objectives.errors import ConfigError, FormatError, NothingSupervisedError
from hf_objectives.labels import SIDES, encode_pair, fit_ids
from hf_objectives.types import Row

Batch = dict[str, torch.Tensor]
_REFERENCES = tuple(f"ref_{side}_logps" for side in SIDES)


@dataclass
class DataCollatorForPreferencePairs:
    """Pads preference pairs; only what the model has to produce of each answer is in the completion mask.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: tokens of a prompt and one answer together. Longer rows lose the oldest turns of their prompt first, see
            `preferences.py`; of encoded rows, whose turns are not known, the first tokens of the prompt after BOS.
        train_on, control_tokens, chat_template, template_kwargs: see `encode_pair`.
        pad_to_multiple_of: the width is a multiple of this.
        return_rows: give `row_ids` where all rows carry a number in `row`.

    Returns (from a call): `input_ids`, `attention_mask` and `completion_mask`, int64 [2 × rows, width], the chosen sides of
    all rows before the rejected ones, padded on the right whatever the tokenizer's padding side; the mask is 0 on the
    prompt, on padding, and inside an answer on what the template or others say. `ref_chosen_logps` and
    `ref_rejected_logps`, float32 [rows], where the rows carry them. `row_ids`, int64 [rows], where asked for. An encoded
    row without `chosen_mask` and `rejected_mask` is trained on all of its answers.

    Raises:
        ConfigError: an unknown setting, or `max_length` under 2.
        DataError: a row that cannot be used; `row` counts within the batch where it carries no number of its own.
        TokenizerError: neither a pad nor an EOS token.

    Example:
        >>> from hf_objectives import demo
        >>> from hf_objectives.preference_collator import DataCollatorForPreferencePairs
        >>> batch = DataCollatorForPreferencePairs(demo.build_tokenizer())(demo.preferences(2))
        >>> sorted(batch), batch["input_ids"].shape[0]
        (['attention_mask', 'completion_mask', 'input_ids'], 4)
    """

    tokenizer: Any
    max_length: int | None = None
    train_on: str = "assistant"
    control_tokens: str = "plain"
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    return_rows: bool = False

    def __post_init__(self) -> None:
        check_choices(self.train_on, self.control_tokens)
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; expected at least 2, a token of the prompt and one of the answer"
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected at least 1")

    @property
    def pad_token_id(self) -> int:
        """The pad token's id, EOS where there is none; padding is told from a real EOS by the masks."""
        return padding_id(self.tokenizer)

    def __call__(self, features: Sequence[Row]) -> Batch:
        pairs = [self._read(row, i) for i, row in enumerate(features)]
        sides = [(pair["prompt_ids"], pair[f"{side}_ids"], pair[f"{side}_mask"]) for side in SIDES for pair in pairs]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(len(prompt) + len(answer) for prompt, answer, _ in sides) // multiple) * multiple
        ids = np.full((len(sides), width), self.pad_token_id, np.int64)
        seen, completion = np.zeros_like(ids), np.zeros_like(ids)
        for i, (prompt, answer, mask) in enumerate(sides):
            at, end = len(prompt), len(prompt) + len(answer)
            ids[i, :at], ids[i, at:end] = prompt, answer
            seen[i, :end], completion[i, at:end] = 1, mask
        completion[:, 0] = 0  # nothing predicts the first token of all
        batch = {
            name: torch.from_numpy(values)
            for name, values in (("input_ids", ids), ("attention_mask", seen), ("completion_mask", completion))
        }
        for name in _REFERENCES:
            if given := [row[name] for row in features if row.get(name) is not None]:
                if len(given) < len(features):
                    raise FormatError(
                        f"{len(given)} of {len(features)} rows of a batch have {name}; expected all or none"
                    )
                batch[name] = torch.tensor(given, dtype=torch.float32)
        if self.return_rows and all(isinstance(row.get("row"), int) for row in features):
            batch["row_ids"] = torch.tensor([row["row"] for row in features])
        return batch

    def _read(self, row: Row, i: int) -> Mapping[str, Any]:
        own = row.get("row") if isinstance(row, Mapping) else None
        number = own if isinstance(own, int) else i
        if not isinstance(row, Mapping) or row.get("prompt_ids") is None:
            return encode_pair(
                self.tokenizer,
                row,
                max_length=self.max_length,
                train_on=self.train_on,
                control_tokens=self.control_tokens,
                chat_template=self.chat_template,
                source=row.get("source") if isinstance(row, Mapping) else None,
                row_index=number,
                **self.template_kwargs,
            )
        return self._encoded(row, number)

    def _encoded(self, row: Row, number: int) -> Mapping[str, Any]:
        """A row of ids, with its masks, and cut where it is too long.

        Raises:
            FormatError: a side or a mask that is missing or has the wrong length.
            NothingSupervisedError: nothing of an answer is trained.
        """
        pair: dict[str, Any] = {"prompt_ids": _ids(row["prompt_ids"])}
        for side in SIDES:
            if row.get(f"{side}_ids") is None:
                raise FormatError(
                    f"{side}_ids is missing; expected prompt_ids, chosen_ids and rejected_ids", row=number
                )
            answer = _ids(row[f"{side}_ids"])
            given = row.get(f"{side}_mask")
            mask = np.ones(len(answer), np.int64) if given is None else np.asarray(given, np.int64)
            if mask.shape != answer.shape:
                raise FormatError(
                    f"{side}_mask has {len(mask)} entries for {len(answer)} ids; expected one each", row=number
                )
            pair[f"{side}_ids"], pair[f"{side}_mask"] = answer, mask
        if self.max_length is not None:
            pair = fit_ids(pair, self.max_length, bos=self.tokenizer.bos_token_id)
        for side in SIDES:
            if not pair[f"{side}_mask"].any():
                raise NothingSupervisedError(
                    f"{side} has no token to train (max_length={self.max_length}); expected an answer", row=number
                )
        return pair


def _ids(values: Any) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)
