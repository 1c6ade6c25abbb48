"""The whole objective stack on the built-in corpus: pretraining, fine-tuning, a reward model, PPO, DPO and distillation.

    accelerate launch recipes/stack.py
    accelerate launch recipes/stack.py --skip sft --output_dir runs/stack_without_sft
    accelerate launch recipes/stack.py --check true

The demonstrations of fine-tuning are those of a careless annotator (`demo.CARELESS`), which alignment is there to mend. Each
stage starts from the checkpoint that it builds on: fine-tuning from pretraining, the reward model, PPO and DPO from
fine-tuning; where that one is skipped, from the one before it. Distillation teaches a smaller model what the aligned one
does: `student` is that model after fine-tuning on the same demonstrations alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import distill, dpo, ppo, pretrain, reward, sft
from hf_objectives.recipes.arguments import BUILT_IN, parse_config
from hf_objectives.recipes.config_files import CONFIGS
from hf_objectives.recipes.preview import figure, table
from hf_objectives.recipes.stack_figures import COLUMNS, EACH, draw, measure, missed, pair_figures, tokens_of
from hf_objectives.types import check_one_of, option


class Stage(NamedTuple):
    """A stage: its recipe and config, its length, the stages whose checkpoint it may start from, best first, and its model
    where there is none.
    """

    run: Callable[[list[str]], dict[str, Any]]
    config: str
    length: int
    after: tuple[str, ...] = ()
    model: str = BUILT_IN
    unit: str = "max_steps"


STACK = {
    "pretrain": Stage(pretrain.main, "pretrain_quickstart.yaml", 2_000_000, unit="max_tokens"),
    "sft": Stage(sft.main, "stack_sft.yaml", 900, ("pretrain",)),
    "reward": Stage(reward.main, "reward_quickstart.yaml", 500, ("sft", "pretrain")),
    "ppo": Stage(ppo.main, "ppo_quickstart.yaml", 280, ("sft", "pretrain")),
    "dpo": Stage(dpo.main, "dpo_quickstart.yaml", 250, ("sft", "pretrain")),
    "student": Stage(sft.main, "stack_sft.yaml", 1000, model=f"{BUILT_IN}:small"),
    "distill": Stage(distill.main, "distill_quickstart.yaml", 300, ("student",)),
}
_OF_PPO = 1000  # added to the seed: PPO has prompts of its own
_TEACHERS = ("ppo", "dpo", "sft", "pretrain")  # of distillation, best first


@dataclass
class StackArguments:
    """Which stages, how long, and where to."""

    output_dir: str = option("runs/stack", "Folder of the stages, the table and the picture.")
    skip: list[str] = field(default_factory=list, metadata={"help": f"Stages to leave out, of {', '.join(STACK)}."})
    length: float = option(1.0, "Length of every stage, as a share of its usual steps.")
    seed: int = option(0, "Seed of every stage.")
    check: bool = option(False, "End with an error where a stage falls short of its bar.")
    configs: str | None = option(None, "Folder with the configs of the stages; by default the shipped ones.")

    def __post_init__(self) -> None:
        if self.configs and not Path(self.configs).is_dir():
            raise ConfigError(f"configs: no folder {self.configs}; expected one with the configs of the stages")
        for name in self.skip:
            check_one_of("skip", name, STACK)
        if "student" in self.skip or not {*_TEACHERS} - {*self.skip}:
            self.skip = [*self.skip, "distill"]  # which has nobody to teach, or nobody who teaches
        if not {*STACK} - {*self.skip}:
            raise ConfigError("skip names every stage; nothing is left to run")
        if self.length <= 0:
            raise ConfigError(f"length is {self.length}; expected more than 0")

    def first(self, names: Sequence[str]) -> str | None:
        """The folder of the first of some stages that is not left out; None where all are."""
        return next((str(Path(self.output_dir) / name) for name in names if name not in self.skip), None)


CLASSES = (StackArguments,)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the stack; returns the rows of the table.

    Raises:
        ConfigError: with `check`, a stage that falls short of its bar.
    """
    (args,), _ = parse_config(CLASSES, argv)
    console, folder = Console(soft_wrap=False), Path(args.output_dir)
    console.width = max(console.width, 120)  # a figure that is cut says nothing
    console.print(splits_line(args.seed), highlight=False)
    rows: list[dict[str, Any]] = []
    for name in (name for name in STACK if name not in args.skip):
        console.rule(name)
        began = time.perf_counter()
        results = STACK[name].run(arguments(name, args))
        rows.append({"stage": name, **pair_figures(results), "tokens": tokens_of(folder / name)})
        rows[-1]["seconds"] = time.perf_counter() - began
    judge, base = (args.first(names) for names in (("reward",), ("sft", "pretrain")))
    for row in (row for row in rows if row["stage"] != "reward"):
        compared = base if row["stage"] in ("ppo", "dpo") else None
        row |= measure(folder / row["stage"], judge, compared, seed=args.seed)
    (folder / "results.json").write_text(json.dumps(rows, indent=1))
    lines = [(row["stage"], *(figure(row.get(key)) for key in COLUMNS)) for row in rows]
    console.print(table("Held out, after each stage", ("stage", *COLUMNS.values()), lines))
    draw(rows, folder / "stack.png")
    console.print(f"Checkpoints, results.json and stack.png are in {folder}", highlight=False)
    short = missed(rows)
    for line in short:
        console.print(line, highlight=False, markup=False)
    if args.check and short:
        raise ConfigError(f"{len(short)} figure(s) of the stack are short of their bars: {'; '.join(short)}")
    return rows


def splits_line(seed: int) -> str:
    """How many questions the stages may be trained on and how many are asked; none of them is in both."""
    talks = [row["messages"] for row in demo.chats(30_000, seed=seed)]
    for start in (seed, seed + _OF_PPO):
        talks += [row["prompt"] for row in demo.preferences(16_000, seed=start)]
    trained = {message["content"] for talk in talks for message in talk if message["role"] == "user"}
    lines = {line for row in demo.texts(30_000, seed=seed) for line in row["text"].splitlines()}
    asked = {question.question for question in demo.exam(EACH, seed=seed)}
    assert not (trained | lines) & asked
    return (
        f"{len(trained):,} distinct questions in chats and pairs, {len(lines):,} lines of text, {len(asked):,} questions of "
        "the exam: none of them was trained"
    )


def arguments(name: str, args: StackArguments) -> list[str]:
    """The command line of a stage."""
    stage = STACK[name]
    given: dict[str, Any] = {
        "config": Path(args.configs or CONFIGS) / stage.config,
        "model_name_or_path": args.first(stage.after) or stage.model,
        "output_dir": Path(args.output_dir) / name,
        stage.unit: max(1, round(stage.length * args.length)),
        "eval_strategy": "no",
        "seed": args.seed + _OF_PPO * (name == "ppo"),
    }
    if name == "distill":
        given["teacher_model_name_or_path"] = args.first(_TEACHERS)
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]
