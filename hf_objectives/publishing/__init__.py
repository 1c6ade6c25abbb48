"""Models to the Hub, with their card."""

from __future__ import annotations

from hf_objectives.publishing.hub import (
    push,  # Upload a finished run; a failure costs nothing but the upload
    write_card,  # Write the model card, with measured facts only
)
