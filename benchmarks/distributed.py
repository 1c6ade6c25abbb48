"""Hold runs on several ranks, in shards, in micro-batches and from other clusters' checkpoints against one process.

    python benchmarks/distributed.py

Each run takes twenty steps of sixteen rows on a tiny model, in float32 on CPUs (gloo). A process that takes the sixteen
rows in one batch gives the figures that all others must give: loss and gradient norm of each step, and an evaluation before
and after. Each launch is one of torchrun, or of accelerate with the files of hf_objectives/recipes/accelerate.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from _machine import describe, table

from tests.support.clusters import BOUNDS, STEPS, Clusters, Outcome, divided, from_files, resumed, two_hosts

PARTS = {function.__name__: function for function in (divided, two_hosts, from_files, resumed)}
HEADER = ["equal", "loss", "gradient norm", "evaluation before", "evaluation after"]


def row(outcomes: Sequence[Outcome]) -> list[str]:
    """How many runs are equal, and the largest distances of all."""
    worst = [max(outcome.far[name] for outcome in outcomes) for name in BOUNDS]
    return [f"{sum(outcome.equal for outcome in outcomes)} of {len(outcomes)}", *(f"{value:.1e}" for value in worst)]


def grouped(title: str, outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """A table with a row for each name."""
    groups: dict[str, list[Outcome]] = {}
    for outcome, name in zip(outcomes, names, strict=True):
        groups.setdefault(name, []).append(outcome)
    return table([title, *HEADER], [[name, *row(group)] for name, group in groups.items()])


def cluster(outcome: Outcome) -> str:
    """Launch, ranks, and whether the model is sharded."""
    how = "FSDP2" if outcome.run.sharded else "DDP" if outcome.ranks > 1 else "one process"
    return f"{outcome.launch}: {outcome.ranks} x {how}" if outcome.ranks > 1 else f"{outcome.launch}: {how}"


def main() -> None:
    """Launch, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(sys.stderr):  # trainers print their logs
            clusters = Clusters(Path(place), steps=arguments.steps)
        for name in arguments.parts:
            for outcome in PARTS[name](clusters):
                outcomes.append(outcome)
                print(f"{'' if outcome.equal else 'NOT EQUAL '}{outcome}", file=sys.stderr, flush=True)
    print(describe(), "\n")
    print(grouped("objective, rows", outcomes, [f"{one.run.objective}, {one.run.rows}" for one in outcomes]), "\n")
    print(grouped("launch", outcomes, [cluster(one) for one in outcomes]), "\n")
    print("configurations equal:", row(outcomes)[0])
    sys.exit(not all(one.equal for one in outcomes))


if __name__ == "__main__":
    main()
