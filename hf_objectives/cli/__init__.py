"""The command line, hf-objectives."""

from __future__ import annotations

from hf_objectives.cli.main import (
    main,  # Run a command of the command line
)
