"""Models to the Hub, with their card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.publishing.hub import (
        push,  # Upload a finished run; a failure costs nothing but the upload
        write_card,  # Write the model card, with measured facts only
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
