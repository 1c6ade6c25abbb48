"""Rows to the tensors of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.collators.assistant_only import DataCollatorForAssistantOnlyLM  # conversations, padded
    from hf_objectives.collators.packing import DataCollatorWithEosPacking  # documents, joined and packed
    from hf_objectives.collators.preference import DataCollatorForPreferencePairs  # preference pairs, padded
    from hf_objectives.collators.shared_prompt import (
        SharedRows,  # pairs in rows, both answers after one prompt
        share_prompts,  # a padded batch of pairs as such rows
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
