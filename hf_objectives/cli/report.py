"""`hf-objectives report`: a run as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_objectives.diagnostics import write_report


def report(argv: Sequence[str]) -> None:
    """Write the report of a run and print where it is.

    Raises:
        FileFormatError: there is no log, or nothing in it can be read.
    """
    parser = argparse.ArgumentParser("hf-objectives report", description="Write a run as one HTML file.")
    parser.add_argument("run", help="output folder, checkpoint, trainer_state.json, JSON lines, CSV or TensorBoard")
    parser.add_argument("--output", default="report.html", help="the file to write")
    parser.add_argument("--compare", help="another run: its curves are overlaid, its settings compared")
    given = parser.parse_args(list(argv))
    print(write_report(given.run, given.output, compare=given.compare))
