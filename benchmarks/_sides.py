"""Measures two checkouts of the package in turn: each side in a process of its own, interleaved over several rounds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = str(Path(__file__).resolve().parents[1])


def measure(script: str, arguments: Sequence[str], against: str | None, rounds: int) -> list[dict[str, list[float]]]:
    """Run `script --side ...` with each checkout on the path, and collect the numbers that it prints as one JSON object.

    Args:
        script: the path of a benchmark that knows `--side`.
        arguments: its arguments.
        against: another checkout of the package; None for none.
        rounds: how often each side runs.

    Returns:
        For each side, first this checkout, the numbers of all rounds by name.
    """
    sides = [HERE] if against is None else [HERE, against]
    numbers: list[dict[str, list[float]]] = [{} for _ in sides]
    for _ in range(rounds):
        for side, collected in zip(sides, numbers, strict=True):
            done = subprocess.run(
                [sys.executable, script, "--side", *arguments],
                env={**os.environ, "PYTHONPATH": side, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                collected.setdefault(name, []).append(value)
    return numbers


def median(numbers: dict[str, list[float]], name: str) -> float:
    """The median over the rounds; not a number where a side has none."""
    return statistics.median(numbers[name]) if numbers.get(name) else float("nan")


def report(numbers: dict[str, float]) -> None:
    """What one side prints for `measure`."""
    print(json.dumps(numbers))


def clocked(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    begin = clock()
    function()
    return clock() - begin
