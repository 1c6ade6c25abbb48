"""The objective stack under several seeds, and without a stage: medians and ranges, one table and one picture.

    python benchmarks/stack.py --out runs/stack_seeds [--seeds 0 1 2] [--rloo] [--without pretrain sft]

Each run is `recipes/stack.py` in a process of its own. With `--without` the stack runs again without that stage, only as
far as its lack can be seen: fine-tuning, PPO and DPO. With `--rloo` TRL's RLOO trains from the fine-tuned model of each seed
too, four answers a prompt, on as many generated answers as PPO. Runs whose `results.json` is there are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_objectives.recipes.stack_figures import COLUMNS, measure, tokens_of

ROOT = Path(__file__).parents[1]


def run_stack(folder: Path, seed: int, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of one run of the stack."""
    if not (folder / "results.json").exists():
        words = ["--output_dir", str(folder), "--seed", str(seed), *(["--skip", *skip] if skip else [])]
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            subprocess.run([sys.executable, ROOT / "recipes/stack.py", *words], stdout=log, stderr=log, check=True)
    return json.loads((folder / "results.json").read_text())


def run_rloo(folder: Path, seed: int) -> dict[str, Any]:
    """RLOO from the fine-tuned model of a run, on as many answers as PPO has; its figures as a row."""
    out = folder / "rloo"
    if not (out / "results.json").exists():
        words = ["--config", "ppo_quickstart", "--algorithm", "rloo"]
        words += ["--num_generations", 4, "--model_name_or_path", folder / "sft", "--output_dir", out]
        words += ["--seed", seed + 1000, "--eval_strategy", "no"]
        with (folder / "rloo.log").open("w") as log:
            program = [sys.executable, ROOT / "recipes/ppo.py", *map(str, words)]
            subprocess.run(program, stdout=log, stderr=log, check=True)
    row = measure(out, str(folder / "reward"), str(folder / "sft"), seed=seed)
    return {"stage": "rloo", **row, "tokens": tokens_of(out)}


def figure(values: Sequence[float | None]) -> str:
    """The median of several runs, with the range where there is one."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    shown = "{:,.0f}" if min(found) > 500 else "{:.3f}" if max(found) < 10 else "{:.1f}"
    middle = shown.format(statistics.median(found))
    ends = [shown.format(end) for end in (min(found), max(found))]
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]} to {ends[1]})"


def print_table(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> None:
    """A line for each stage of each kind of run."""
    print("| after |", " | ".join(COLUMNS.values()), "|")
    print("| --- |", " | ".join("---" for _ in COLUMNS), "|")
    for kind, seeds in runs.items():
        for stage in (row["stage"] for row in seeds[0]):
            rows = [next(row for row in rows if row["stage"] == stage) for rows in seeds]
            figures = (figure([row.get(key) for row in rows]) for key in COLUMNS)
            print(f"| {stage}{kind} |", " | ".join(figures), "|")


def print_skills(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Exact match of unseen questions by skill: medians over the seeds."""
    stages = [row["stage"] for row in seeds[0] if "by_skill" in row]
    by = {stage: [row["by_skill"] for rows in seeds for row in rows if row["stage"] == stage] for stage in stages}
    print("\n| skill |", " | ".join(stages), "|\n| --- |", " | ".join("---" for _ in stages), "|")
    for skill in by[stages[0]][0]:
        shares = (statistics.median(one[skill]["exact_match"] for one in by[stage]) for stage in stages)
        print(f"| {skill} |", " | ".join(f"{share:.2f}" for share in shares), "|")


def draw(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Medians as bars, ranges over the seeds as error bars; runs without a stage beside the whole ones."""
    from matplotlib.figure import Figure

    panels = {
        "exact_match": "Exact match, unseen questions",
        "texts": "Perplexity of held-out texts (log scale)",
        "chats": "Perplexity of held-out chats (log scale)",
        "accuracy": "Accuracy on held-out pairs",
    }
    picture = Figure(figsize=(12, 7), layout="constrained")
    for axes, (key, title) in zip(picture.subplots(2, 2).flat, panels.items(), strict=True):
        names, bars = [], []
        for kind, seeds in runs.items():
            for stage in (row["stage"] for row in seeds[0]):
                values = [row[key] for rows in seeds for row in rows if row["stage"] == stage and key in row]
                if values:
                    names.append(stage + kind.replace(" ", "\n"))
                    bars.append((statistics.median(values), min(values), max(values)))
        middle = [bar[0] for bar in bars]
        ends = [[bar[0] - bar[1] for bar in bars], [bar[2] - bar[0] for bar in bars]]
        colours = ["tab:gray" if "without" in name else "tab:blue" for name in names]
        axes.bar_label(axes.bar(names, middle, yerr=ends, capsize=3, color=colours), fmt="%.3g", fontsize=8)
        axes.set(title=title, yscale="log" if key in ("texts", "chats") else "linear")
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(y=0.15)
        axes.grid(alpha=0.25, axis="y")
    picture.savefig(path, dpi=130)


def main() -> None:
    """Make the runs, then print and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--without", nargs="*", default=[])
    parser.add_argument("--rloo", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[list[dict[str, Any]]]] = {"": []}
    for seed in options.seeds:
        runs[""].append(run_stack(options.out / f"seed_{seed}", seed))
    if options.rloo:
        for seed, rows in zip(options.seeds, runs[""], strict=True):
            rows.append(run_rloo(options.out / f"seed_{seed}", seed))
    for stage in options.without:
        skip = [stage, "reward", "student", "distill"]
        made = [run_stack(options.out / f"seed_{seed}_without_{stage}", seed, skip) for seed in options.seeds]
        runs[f" without {stage}"] = made
    print_table(runs)
    print_skills(runs[""])
    draw(runs, options.out / "stack.png")


if __name__ == "__main__":
    main()
