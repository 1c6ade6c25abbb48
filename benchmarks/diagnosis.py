"""How well the detectors tell what is wrong with a run: generated logs, and real ones with faults put in on purpose.

    python benchmarks/diagnosis.py [--half report] [--runs FOLDER] [--sizes] [--million] [--show]

The detectors were developed on the even cases and are reported on the odd ones. `--runs` is what benchmarks/faulty_runs.py
wrote. `--sizes` says how much is found of faults of one size, small ones among them. A finding counts from severity "warning"
on. Of a case's `expected` kinds one has to be found; `allowed` kinds are its consequences and count neither way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from _curves import SIZES, Case, generate, of_size
from _machine import describe, table

from hf_objectives.diagnostics.detect import diagnose
from hf_objectives.inspection.findings import SEVERITIES

PLACED = ("broken_shard", "broken_batch", "rate_jumps", "float16_overflow")  # real faults that begin at a step


def score(cases: list[Case], *, show: bool = False) -> tuple[dict[str, Counter], Counter]:
    """Per fault and over all: found, missed, and false alarms."""
    per_fault: dict[str, Counter] = defaultdict(Counter)
    for case in cases:
        findings = [one for one in diagnose(case.log) if SEVERITIES.index(one.severity) > 0]
        found = {one.kind for one in findings}
        hit = int(bool(found & set(case.expected)))
        false = found - set(case.expected) - set(case.allowed)
        fault = case.name.split("-", 1)[0]
        per_fault[fault].update(cases=1, found=hit, missed=int(bool(case.expected) and not hit), false=len(false))
        if case.step is not None and hit:
            first = min(abs(one.step - case.step) for one in findings if one.kind in case.expected)
            per_fault[fault].update(near=first <= 5 * _every(case), placed=1)
        if show and (false or (case.expected and not hit)):
            print(case.name, "missed" if not hit and case.expected else "", "false:", sorted(false))
            for one in findings:
                print("    ", one.kind, one.steps, one.severity, one.evidence)
    total: Counter = Counter()
    for counts in per_fault.values():
        total.update(counts)
    return per_fault, total


def _every(case: Case) -> int:
    return case.log[0]["step"]


def f1(counts: Counter) -> float:
    """2 TP / (2 TP + FP + FN)."""
    return 2 * counts["found"] / max(1, 2 * counts["found"] + counts["false"] + counts["missed"])


def real(folder: Path, half: str) -> list[Case]:
    """The runs that benchmarks/faulty_runs.py wrote."""
    labels = json.loads((folder / "labels.json").read_text())
    cases = []
    for name, label in labels.items():
        if half in ("both", label["half"]) and (folder / name / "trainer_state.json").exists():
            log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
            expected = tuple(label["expected"] or label["any_of"])
            step = label["first_step"] if label["fault"] in PLACED else None
            cases.append(Case(name, log, expected, tuple(label["also"]), step))
    return cases


def report(title: str, cases: list[Case], *, show: bool) -> None:
    """Print the table of a set of cases."""
    per_fault, total = score(cases, show=show)
    rows = []
    for fault, counts in sorted(per_fault.items()):
        placed = f"{counts['near']}/{counts['placed']}" if counts["placed"] else ""
        rows.append((fault, counts["cases"], counts["found"], counts["missed"], counts["false"], placed))
    print(f"\n### {title}: {len(cases)} logs, F1 {f1(total):.3f}\n")
    print(
        table(
            ["fault", "logs", "found", "missed", "false alarms", "first step within 5 lines"],
            [[str(cell) for cell in row] for row in rows],
        )
    )


def sizes(n: int, seed: int) -> None:
    """Print the share that is found, as a warning or worse, of each fault by size."""
    rows = []
    for kind, (meaning, given) in SIZES.items():
        for size in given:
            _, total = score(of_size(kind, size, n, seed))
            rows.append([kind, f"{size:g}", meaning, f"{total['found']}/{n}"])
    print(f"\n### generated, by size: {n} logs each\n")
    print(table(["fault", "size", "meaning", "found"], rows))


# Peak memory from /proc: getrusage of a child begins with what its parent had.
_DIAGNOSE = """
import re, sys, time
from pathlib import Path
from hf_objectives import diagnose
begin = time.perf_counter()
found = diagnose(sys.argv[1])
seconds = time.perf_counter() - begin
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(seconds, peak, len(found))
"""


def million(steps: int = 1_000_000, rounds: int = 5) -> None:
    """Print seconds and peak memory of `diagnose` on logs of a million steps, each in a process of its own.

    A healthy one in two formats, and one with 20 restarts of its schedule, 200 spikes and four epochs. Memory includes Python
    and its packages.
    """
    rng = np.random.default_rng(0)
    at = np.arange(1, steps + 1)
    losses = 2 + 8 * at**-0.3 + rng.normal(0, 0.1, steps)
    norms = rng.lognormal(0, 0.2, steps)
    smooth = 1e-3 * (1 - at / steps)
    restarts = 5e-4 * (1 + np.cos(np.pi * (20 * at / steps % 1)))
    spiked = losses + 3 * (at % (steps // 200) == steps // 400)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        state, plain, eventful = (Path(folder) / name for name in ("trainer_state.json", "log.jsonl", "eventful.jsonl"))
        lines = _lines(losses, smooth, norms, epochs=1)
        state.write_text(json.dumps({"log_history": lines}, indent=2, sort_keys=True))
        plain.write_text("\n".join(map(json.dumps, lines)))
        lines = _lines(spiked, restarts, norms, epochs=4)
        eventful.write_text("\n".join(map(json.dumps, lines)))
        del lines
        for path in (state, plain, eventful):
            runs = [
                subprocess.run([sys.executable, "-c", _DIAGNOSE, str(path)], capture_output=True, text=True, check=True)
                for _ in range(rounds)
            ]
            seconds, memory, found = zip(*(map(float, run.stdout.split()) for run in runs), strict=True)
            span = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            rows.append(
                [path.name, f"{path.stat().st_size / 1e6:.0f}", span, f"{max(memory):.0f}", f"{max(found):.0f}"]
            )
    print(f"\n### a log of {steps:,} steps, {rounds} rounds\n")
    print(table(["log", "MB", "seconds", "peak memory, MiB", "findings"], rows))


def _lines(losses: np.ndarray, rates: np.ndarray, norms: np.ndarray, *, epochs: int) -> list[dict[str, float]]:
    n = len(losses)
    curves = zip(losses.tolist(), rates.tolist(), norms.tolist(), strict=True)
    return [
        {"epoch": (i + 1) / n * epochs, "grad_norm": norm, "learning_rate": rate, "loss": loss, "step": i + 1}
        for i, (loss, rate, norm) in enumerate(curves)
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", default="report", choices=("develop", "report", "both"))
    parser.add_argument("--each", type=int, default=40, help="generated logs of every fault")
    parser.add_argument("--sound", type=int, default=200, help="generated healthy logs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder of benchmarks/faulty_runs.py")
    parser.add_argument(
        "--million", action="store_true", help="time and memory of a log of a million steps, no accuracy"
    )
    parser.add_argument("--sizes", action="store_true", help="how much is found of faults of one size, no other table")
    parser.add_argument("--show", action="store_true", help="every case that is missed or alarmed without cause")
    given = parser.parse_args()
    print(describe())
    if given.million:
        million()
        return
    if given.sizes:
        sizes(given.each, given.seed)
        return
    parity = {"develop": (0,), "report": (1,), "both": (0, 1)}[given.half]
    cases = [
        case for case in generate(given.each, given.sound, given.seed) if int(case.name.rsplit("-", 1)[1]) % 2 in parity
    ]
    if cases:
        report(f"generated, half: {given.half}", cases, show=given.show)
    if given.runs:
        report(f"real, half: {given.half}", real(given.runs, given.half), show=given.show)


if __name__ == "__main__":
    main()
