"""The command line, hf-objectives."""

from __future__ import annotations
