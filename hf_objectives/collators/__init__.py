"""Rows to the tensors of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.collators.assistant_only import (
        DataCollatorForAssistantOnlyLM,  # Pads conversations; only what the assistant has to produce is trained
    )
    from hf_objectives.collators.packing import (
        DataCollatorWithEosPacking,  # Joins documents with one EOS between them and packs them into rows
    )
    from hf_objectives.collators.preference import (
        DataCollatorForPreferencePairs,  # Pads preference pairs; only the answers are in the completion mask
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
