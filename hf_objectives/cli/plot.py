"""`hf-objectives plot`: the curves of one or several runs as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_objectives.diagnostics import FORMATS, plot_training_metrics


def plot(argv: Sequence[str]) -> None:
    """Draw the given logs over each other and print the picture's path.

    Raises:
        FileFormatError: there is no log, nothing in it can be read, or it has no loss.
        ConfigError: the picture's ending is unknown.
    """
    parser = argparse.ArgumentParser("hf-objectives plot", description="Draw the curves of one or several runs.")
    parser.add_argument(
        "run", nargs="+", help="output folder, trainer_state.json, JSON lines, CSV, TensorBoard or trackio"
    )
    parser.add_argument(
        "--output", default="training_curves.png", help=f"the picture: {', '.join(FORMATS)} by its ending"
    )
    parser.add_argument("--no_findings", action="store_true", help="curves alone: mark nothing that looks wrong")
    given = parser.parse_args(list(argv))
    print(plot_training_metrics(given.run, given.output, findings=[] if given.no_findings else None))
