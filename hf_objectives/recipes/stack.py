"""The whole objective stack on the built-in corpus: pretraining, fine-tuning, a reward model, PPO and DPO, one table.

    accelerate launch recipes/stack.py
    accelerate launch recipes/stack.py --skip sft --output_dir runs/stack_without_sft

Each stage starts from the checkpoint of the stage that it builds on: fine-tuning from pretraining, the reward model, PPO and
DPO from fine-tuning; where that one is skipped, from the one before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_objectives import demo
from hf_objectives.demo import SYSTEM, exact_match
from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import LanguageModelEvaluation
from hf_objectives.recipes import dpo, ppo, pretrain, reward, sft
from hf_objectives.recipes.arguments import BUILT_IN, parse_config
from hf_objectives.recipes.preview import figure, table
from hf_objectives.types import check_one_of, option

STAGES = ("pretrain", "sft", "reward", "ppo", "dpo")
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"  # of a checkout
_PROMPTS = 200


@dataclass
class StackArguments:
    """Which stages, how long, and where to."""

    output_dir: str = option("runs/stack", "Folder of the stages, the table and the picture.")
    skip: list[str] = field(default_factory=list, metadata={"help": f"Stages to leave out, of {', '.join(STAGES)}."})
    length: float = option(1.0, "Length of every stage, as a share of its usual steps.")
    seed: int = option(0, "Seed of every stage.")
    configs: str = option(str(CONFIGS), "Folder with the configs of the stages.")

    def __post_init__(self) -> None:
        if not Path(self.configs).is_dir():
            raise ConfigError(f"configs: no folder {self.configs}; give that of the repository, recipes/configs")
        for name in self.skip:
            check_one_of("skip", name, STAGES)
        if len(set(self.skip)) == len(STAGES):
            raise ConfigError("skip names every stage; nothing is left to run")
        if self.length <= 0:
            raise ConfigError(f"length is {self.length}; expected more than 0")


class Stage(NamedTuple):
    """A stage: its recipe and config, its length, and the stages whose checkpoint it may start from, best first."""

    run: Callable[[list[str]], dict[str, Any]]
    config: str
    length: int
    after: tuple[str, ...] = ()
    unit: str = "max_steps"


STACK = {
    "pretrain": Stage(pretrain.main, "pretrain_quickstart.yaml", 800_000, unit="max_tokens"),
    "sft": Stage(sft.main, "quickstart.yaml", 600, ("pretrain",)),
    "reward": Stage(reward.main, "reward_quickstart.yaml", 400, ("sft", "pretrain")),
    "ppo": Stage(ppo.main, "ppo_quickstart.yaml", 450, ("sft", "pretrain")),
    "dpo": Stage(dpo.main, "dpo_quickstart.yaml", 200, ("sft", "pretrain")),
}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the stack; returns the rows of the table."""
    (args,), _ = parse_config((StackArguments,), argv)
    console, folder = Console(soft_wrap=False), Path(args.output_dir)
    stages = [name for name in STAGES if name not in args.skip]
    seconds = {}
    for name in stages:
        console.rule(name)
        began = time.perf_counter()
        STACK[name].run(arguments(name, args))
        seconds[name] = time.perf_counter() - began
    judge = folder / "reward" if "reward" in stages else None
    base = next((folder / name for name in ("sft", "pretrain") if name in stages), None)
    rows: list[dict[str, Any]] = []
    for name in stages:
        compared = base if name in ("ppo", "dpo") else None
        figures = {} if name == "reward" else measure(folder / name, judge, compared, seed=args.seed)
        rows.append({"stage": name, **figures, "tokens": tokens_of(folder / name), "seconds": seconds[name]})
    (folder / "results.json").write_text(json.dumps(rows, indent=1))
    lines = [(row["stage"], *(figure(row.get(key)) for key in COLUMNS)) for row in rows]
    console.print(table("Held out, after each stage", ("stage", *COLUMNS.values()), lines))
    draw(rows, folder / "stack.png")
    console.print(f"Checkpoints, results.json and stack.png are in {folder}", highlight=False)
    return rows


def arguments(name: str, args: StackArguments) -> list[str]:
    """The command line of a stage."""
    stage = STACK[name]
    start = next((Path(args.output_dir) / name for name in stage.after if name not in args.skip), BUILT_IN)
    given = {
        "config": Path(args.configs) / stage.config,
        "model_name_or_path": start,
        "output_dir": Path(args.output_dir) / name,
        stage.unit: max(1, round(stage.length * args.length)),
        "eval_strategy": "no",
        "seed": args.seed,
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    if name == "ppo" and "reward" not in args.skip:
        # The small reward model is soon exploited when it rules alone; right answers outweigh it.
        words += ["--reward_funcs", BUILT_IN, str(Path(args.output_dir) / "reward"), "--reward_weights", "1", "0.1"]
    return words


def tokens_of(folder: Path) -> int | None:
    """Tokens that a stage has seen, from its log."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    seen = [entry[key] for entry in history for key in ("num_tokens_seen", "num_tokens") if entry.get(key)]
    return int(max(seen)) if seen else None


def measure(policy: Path, judge: Path | None, base: Path | None, *, seed: int) -> dict[str, float]:
    """Held-out figures of a checkpoint: perplexity of `texts` and `chats`, `exact_match` (greedy), the mean `reward` that a
    judge gives its sampled answers, and `kl` to the base in nats per answer.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    held_out = {"texts": demo.texts(200, split="test"), "chats": demo.chats(200, split="test")}
    figures = LanguageModelEvaluation(held_out, tokenizer, max_length=None, batch_size=16).measure(model)
    asked = [question for question in demo.questions(_PROMPTS, split="test") if not question.expression]
    row = {name: figures[f"eval_{name}_perplexity"] for name in held_out}
    row["exact_match"] = exact_match(model, tokenizer, asked)[0]
    set_seed(seed)
    prompts = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question.question}] for question in asked
    ]
    ids, mask, answered = sample(model, tokenizer, prompts)
    if judge is not None:
        said = torch.where(answered.bool(), ids, tokenizer.pad_token_id)
        row["reward"] = mean_reward(judge, prompts, tokenizer.batch_decode(said, skip_special_tokens=True))
    if base is not None:
        other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        row["kl"] = divergence(model, other, ids, mask, answered)
    return row


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled answers: ids and attention mask [prompts, length], and where the answer is, up to its stop token."""
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    begin = batch["input_ids"].shape[1]
    ids = model.generate(
        **batch, max_new_tokens=24, do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id
    )
    stopped = (ids[:, begin:] == tokenizer.eos_token_id).long().cumsum(dim=1)
    answered = torch.zeros_like(ids)
    answered[:, begin:] = (stopped - (ids[:, begin:] == tokenizer.eos_token_id).long() == 0).long()
    mask = torch.cat([batch["attention_mask"], answered[:, begin:]], dim=1)
    return ids, mask, answered


@torch.no_grad()
def mean_reward(judge: Path, prompts: list[list[dict[str, str]]], answers: list[str]) -> float:
    """The mean reward that a reward model gives to answers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32)
    chats = [[*prompt, {"role": "assistant", "content": said}] for prompt, said in zip(prompts, answers, strict=True)]
    tokenizer.padding_side = "right"
    batch = tokenizer.apply_chat_template(chats, return_dict=True, return_tensors="pt", padding=True)
    return model(**batch).logits[:, 0].mean().item()


@torch.no_grad()
def divergence(model: nn.Module, base: nn.Module, ids: Tensor, mask: Tensor, answered: Tensor) -> float:
    """KL(model || base) in nats per answer: the whole divergence at every token of the model's own answers, summed."""
    places = torch.nn.functional.pad(answered[:, 1:], (0, 1)).bool()
    ours, theirs = (one(input_ids=ids, attention_mask=mask).logits[places].log_softmax(-1) for one in (model, base))
    return ((ours.exp() * (ours - theirs)).sum() / len(ids)).item()


# What the table's heads and the picture's titles stand for.
COLUMNS = {
    "texts": "text ppl",
    "chats": "chat ppl",
    "exact_match": "exact",
    "reward": "reward",
    "kl": "KL",
    "tokens": "tokens",
    "seconds": "s",
}
TITLES = {
    "perplexity": "Perplexity (log scale)",
    "exact_match": "Exact match",
    "reward": "Mean reward",
    "kl": "KL to the fine-tuned model (nats per answer)",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The stages' figures as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    shown = [row for row in rows if "texts" in row]
    for axes, (key, title) in zip(panels.flat, TITLES.items(), strict=True):
        parts = ("texts", "chats") if key == "perplexity" else (key,)
        for i, part in enumerate(parts):
            there = [(place, row[part]) for place, row in enumerate(shown) if row.get(part) is not None]
            width = 0.8 / len(parts)
            places = [place + width * (i - (len(parts) - 1) / 2) for place, _ in there]
            bars = axes.bar(places, [value for _, value in there], width, label=part)
            axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_xticks(range(len(shown)), [row["stage"] for row in shown])
        axes.set(title=title, yscale="log" if key == "perplexity" else "linear")
        axes.margins(y=0.15)
        axes.set_xlim(-0.6, len(shown) - 0.4)
        axes.grid(alpha=0.25, axis="y")
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=130)
