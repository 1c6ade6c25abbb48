"""Preference rows to the batch that DPO takes: the chosen sides of all rows, then the rejected ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_objectives.collators.base import Batch, Collator, token_ids
from hf_objectives.distributed import world_size
from hf_objectives.errors import FormatError, NothingSupervisedError
from hf_objectives.labels import SIDES, encode_pair, fit_ids
from hf_objectives.types import Row


@dataclass(kw_only=True)
class DataCollatorForPreferencePairs(Collator):
    """Pads preference pairs; only what the model has to produce of each answer is in the completion mask.

    Takes raw rows of any preference format of `formats.py`, which it encodes, or encoded rows (`prompt_ids`, `chosen_ids`,
    `rejected_ids`, `chosen_mask`, `rejected_mask`). It works as `data_collator` of a DataLoader with workers, and of TRL's
    own `DPOTrainer` and `RewardTrainer` with `remove_unused_columns=False`: they add ids of their own to raw rows, without
    masks, and this collator encodes what the ids were made of.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: tokens of a prompt and one answer together. Longer rows lose the oldest turns of their prompt first, see
            `pair_limits.py`; of encoded rows, whose turns are not known, the first tokens of the prompt after BOS.
        train_on, control_tokens, chat_template, template_kwargs: see `encode_pair`.
        pad_to_multiple_of: the width is a multiple of this.
        return_rows: give `row_ids` where all rows have a number in `row`.

    Returns (from a call): `input_ids`, `attention_mask` and `completion_mask`, int64 [2 × rows, width], the chosen sides of
    all rows before the rejected ones, padded on the right whatever the tokenizer's padding side. The completion mask is 0
    on the prompt, on padding, and inside an answer on what the template or others say. `ref_chosen_logps`,
    `ref_rejected_logps` and `margin` (of a RewardTrainer), float32 [rows], where the rows have them. `row_ids`, int64
    [rows], where asked for. An encoded row without masks is taken under `train_on="all"` alone, and trained on all of its
    answers.

    Raises:
        ConfigError: an unknown option, `max_length` under 2, or a loader that would cut the batch.
        DataError: a row that cannot be used; `row` counts within the batch where it has no number of its own.
        TokenizerError: neither a pad nor an EOS token.

    Example:
        >>> from hf_objectives import DataCollatorForPreferencePairs, demo
        >>> batch = DataCollatorForPreferencePairs(demo.build_tokenizer())(demo.preferences(2))
        >>> sorted(batch), batch["input_ids"].shape[0]
        (['attention_mask', 'completion_mask', 'input_ids'], 4)
    """

    return_rows: bool = False

    @property
    def survives_dispatch(self) -> bool:
        """Whether batches stay whole: several processes would get equal shares of all sides, and a pair has two."""
        return world_size() == 1

    def __call__(self, features: Sequence[Row]) -> Batch:
        self.check_host()
        pairs = [self._read(row, i) for i, row in enumerate(features)]
        sides = [(pair["prompt_ids"], pair[f"{side}_ids"], pair[f"{side}_mask"]) for side in SIDES for pair in pairs]
        batch: Batch = {
            "input_ids": self.pad([np.append(prompt, answer) for prompt, answer, _ in sides], self.pad_token_id),
            "attention_mask": self.pad([np.ones(len(prompt) + len(answer)) for prompt, answer, _ in sides], 0),
            "completion_mask": self.pad([np.append(np.zeros(len(prompt)), mask) for prompt, _, mask in sides], 0),
        }
        batch["completion_mask"][:, 0] = 0  # nothing predicts the first token of all
        for name in (*(f"ref_{side}_logps" for side in SIDES), "margin"):
            if values := [row[name] for row in features if row.get(name) is not None]:
                if len(values) < len(features):
                    raise FormatError(
                        f"{len(values)} of {len(features)} rows of a batch have {name}; expected all or none"
                    )
                batch[name] = torch.tensor(values, dtype=torch.float32)
        if self.return_rows and all(isinstance(row.get("row"), int) for row in features):
            batch["row_ids"] = torch.tensor([row["row"] for row in features])
        return batch

    def _read(self, row: Row, i: int) -> Mapping[str, Any]:
        columns = row if isinstance(row, Mapping) else {}
        own = columns.get("row")
        number = own if isinstance(own, int) else i
        if columns.get("chosen_ids") is None and columns.get("prompt_ids") is None:
            return self._raw(row, columns, number)
        if self.train_on == "all" or all(columns.get(f"{side}_mask") is not None for side in SIDES):
            return self._encoded(row, number)
        if all(columns.get(side) is not None for side in SIDES):  # a host added ids of its own
            return self._raw({**row, **self._as_given(columns)}, columns, number)
        raise FormatError(
            "a row of ids has no chosen_mask and rejected_mask, so that every token after the prompt would be trained, and "
            f"train_on is {self.train_on!r}; pass train_on='all' to the collator if that is meant. If the host tokenised the "
            "rows (DPOTrainer and RewardTrainer do), set remove_unused_columns=False, so that the collator gets their texts",
            row=number,
        )

    def _raw(self, row: Row, columns: Row, number: int) -> Mapping[str, Any]:
        return encode_pair(self.tokenizer, row, source=columns.get("source"), row_index=number, **self.options())

    def _as_given(self, row: Row) -> dict[str, Any]:
        """Both sides as they were before TRL wrote into plain texts: an EOS at their end, and RewardTrainer the prompt.

        Here EOS is a control token that encoding adds, no text. Of conversations `encode_pair` finds the prompt by itself.
        """
        sides = {side: row[side] for side in SIDES}
        if not all(isinstance(text, str) for text in sides.values()):
            return sides
        repeated = row.get("prompt") if row.get("prompt_ids") is None else None  # RewardTrainer makes no prompt_ids
        return {
            side: text.removeprefix(repeated or "").removesuffix(self.tokenizer.eos_token or "")
            for side, text in sides.items()
        }

    def _encoded(self, row: Row, number: int) -> Mapping[str, Any]:
        """A row of ids, with its masks, and cut where it is too long."""
        if row.get("prompt_ids") is None:
            raise FormatError(
                "prompt_ids is missing beside chosen_ids; RewardTrainer takes it away unless remove_unused_columns=False",
                row=number,
            )
        pair: dict[str, Any] = {"prompt_ids": token_ids(row["prompt_ids"], "prompt_ids", number, self.num_ids)}
        for side in SIDES:
            if row.get(f"{side}_ids") is None:
                raise FormatError(
                    f"{side}_ids is missing; expected prompt_ids, chosen_ids and rejected_ids", row=number
                )
            answer = token_ids(row[f"{side}_ids"], f"{side}_ids", number, self.num_ids)
            mask = row.get(f"{side}_mask")
            mask = np.ones(len(answer), np.int64) if mask is None else np.asarray(mask, np.int64)
            if mask.shape != answer.shape:
                raise FormatError(
                    f"{side}_mask has {len(mask)} entries for {len(answer)} ids; expected one each", row=number
                )
            pair[f"{side}_ids"], pair[f"{side}_mask"] = answer, mask
        if self.max_length is not None:
            pair = fit_ids(pair, self.max_length, bos=self.tokenizer.bos_token_id)
        first = int(not len(pair["prompt_ids"]))  # nothing predicts the first token of all
        for side in SIDES:
            if not pair[f"{side}_mask"][first:].any():
                raise NothingSupervisedError(
                    f"{side} has no token to train (max_length={self.max_length}); expected an answer", row=number
                )
        return pair
