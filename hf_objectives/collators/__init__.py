"""Rows to tensors of a batch."""

from __future__ import annotations

from hf_objectives.collators.assistant_only import (
    DataCollatorForAssistantOnlyLM,  # Pads conversations; only what the assistant has to produce is trained
    DataCollatorWithEosPacking,  # Joins documents with exactly one EOS between them and packs them into rows of `max_
    check_choices,  # Refuse an unknown `train_on` or `control_tokens`
)
from hf_objectives.collators.preference import (
    DataCollatorForPreferencePairs,  # Pads preference pairs; only what the model has to produce of each answer is in
)
