"""Models to the Hub, with their card."""

from __future__ import annotations

from hf_objectives.publishing.hub import (
    push,  # Upload a finished run; a failure is said with the line to try again, and costs nothing but the upload
    write_card,  # Write `README.md`: what was trained on how much of what, in which mixture, and the held-out figures
)
