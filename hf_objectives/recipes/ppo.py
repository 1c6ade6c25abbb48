"""Train a policy by reward with PPO, or with TRL's RLOO or GRPO from the same config, and report before and after.

    accelerate launch recipes/ppo.py --config recipes/configs/ppo_quickstart.yaml --model_name_or_path runs/quickstart
    accelerate launch recipes/ppo.py --config recipes/configs/ppo_quickstart.yaml --algorithm rloo ...
    accelerate launch recipes/ppo.py --model_name_or_path path/or/id --dataset_name prompts.jsonl \\
        --reward_funcs rewards.py:my_reward runs/reward --reward_weights 1.0 0.5 --output_dir runs/mine
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, get_peft_config

from hf_objectives import demo
from hf_objectives.demo import exact_match
from hf_objectives.diagnostics import DiagnosticsCallback, plot_rewards
from hf_objectives.errors import ConfigError, nearest
from hf_objectives.evaluation import LanguageModelEvaluation
from hf_objectives.labels import with_prompts
from hf_objectives.publishing import push, write_card
from hf_objectives.recipes.alignment_rows import RowArguments, lm_datasets, split_rows
from hf_objectives.recipes.arguments import parse_config
from hf_objectives.recipes.plan import check_launch
from hf_objectives.recipes.run import BUILT_IN, RecipeModel, load_policy, on_main, resume_point
from hf_objectives.trainers import PPOConfig, PPOTrainer

TRL_TRAINERS: dict[str, tuple[type, type]] = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}
ALGORITHMS = ("ppo", *TRL_TRAINERS)
FIGURES = {
    "eval_reward": "mean reward",
    "eval_exact_match": "exact match",
    "eval_kl": "KL to the reference (nats per token)",
    "eval_kl_per_answer": "KL to the reference (nats per answer)",
    "eval_completions/mean_length": "tokens of an answer",
    "eval_completions/finished": "finished answers",
}


@dataclass
class RewardArguments(RowArguments):
    """Prompts, rewards and the algorithm."""

    algorithm: str = field(default="ppo", metadata={"help": "ppo, or TRL's rloo or grpo from the same config."})
    reward_funcs: list[str] = field(
        default_factory=lambda: [BUILT_IN],
        metadata={"help": "'builtin', file.py:function in TRL's signature, or the folder or id of a reward model."},
    )
    lm_datasets: str | None = field(
        default=None,
        metadata={"help": "Rows whose perplexity is watched: a mapping of name to file, Hub id or 'builtin' (JSON)."},
    )

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            near = nearest(self.algorithm, ALGORITHMS)
            raise ConfigError(f"algorithm is {self.algorithm!r}; expected one of {', '.join(ALGORITHMS)}{near}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the held-out figures before and after."""
    (model_config, data, args), _ = parse_config((RecipeModel, RewardArguments, PPOConfig), argv)
    console = Console(stderr=False, soft_wrap=False)
    check_launch(args)
    set_seed(args.seed)
    model, tokenizer = load_policy(model_config, use_cpu=args.device.type == "cpu")
    train, held_out = split_rows(data, seed=args.seed, built_in=(8_000, 200))
    rewards = [read_reward(name) for name in data.reward_funcs]
    wants_push, args.push_to_hub = args.push_to_hub, False  # pushed at the end, when everything is on disk
    watched = lm_datasets(data.lm_datasets)
    trainer = build_trainer(
        data.algorithm, model, rewards, args, train, held_out or None, tokenizer, watched, get_peft_config(model_config)
    )
    if on_main():
        print_plan(data, args, trainer, len(train), console)
    asked = demo.questions(200, split="test") if data.dataset_name == BUILT_IN else []
    before = evaluate(trainer, tokenizer, asked)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train(resume_from_checkpoint=resume_point(args))
    after = evaluate(trainer, tokenizer, asked)
    trainer.save_model()
    trainer.save_state()
    results = {"before": before, "after": after, "figures": list(FIGURES), "algorithm": data.algorithm}
    if on_main():
        folder = Path(args.output_dir)
        (folder / "results.json").write_text(json.dumps(results, indent=1))
        picture = plot_rewards(trainer.state.log_history, folder / "training_curves.png")
        write_card(
            folder,
            results=results,
            base_model=model_config.model_name_or_path,
            data=data,
            args=args,
            objective=data.algorithm,
        )
        if after:
            print_figures(data.algorithm, before, after, console)
        console.print(f"Model, {picture.name}, results.json and README.md are in {folder}", highlight=False)
        if wants_push:
            push(folder, args.hub_model_id, private=bool(args.hub_private_repo), console=console)
    trainer.accelerator.wait_for_everyone()
    return results


def build_trainer(
    algorithm: str,
    model: Any,
    rewards: list[Any],
    args: PPOConfig,
    train: Any,
    held_out: Any,
    tokenizer: Any,
    watched: dict[str, Any] | None,
    lora: Any,
) -> Any:
    """The trainer of an algorithm, all from one PPOConfig."""
    if algorithm == "ppo":
        return PPOTrainer(
            model,
            rewards,
            args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=lora,
            eval_lm_datasets=watched,
        )
    if args.beta and lora is None and not model.config._name_or_path:
        raise ConfigError(f"{algorithm} loads its reference by the model's name, and 'builtin' has none; set beta to 0")
    trainer_class, config_class = TRL_TRAINERS[algorithm]
    trainer = trainer_class(
        model,
        rewards,
        as_config(config_class, args),
        train_dataset=with_prompts(train, "train_dataset"),
        eval_dataset=with_prompts(held_out, "eval_dataset"),
        processing_class=tokenizer,
        peft_config=lora,
    )
    if watched is not None:
        trainer.lm_evaluation = LanguageModelEvaluation(
            watched, tokenizer, max_length=args.eval_lm_max_length, batch_size=args.per_device_eval_batch_size
        )
    return trainer


def as_config(config_class: type, args: PPOConfig) -> Any:
    """TRL's config with the values of a PPOConfig, as far as it has them.

    Raises:
        ConfigError: one answer a prompt, which the algorithm has nothing to compare with.
    """
    if args.num_generations < 2:
        raise ConfigError(
            f"num_generations is {args.num_generations}; RLOO and GRPO compare answers, expected 2 or more"
        )
    known = {one.name for one in dataclasses.fields(config_class) if one.init} - {"generation_batch_size"}
    return config_class(**{one.name: getattr(args, one.name) for one in dataclasses.fields(args) if one.name in known})


def read_reward(name: str) -> str | Callable[..., Any]:
    """A reward by its name: the built-in one, a function of a file, or the folder or id of a reward model.

    Raises:
        ConfigError: no such file or function.
    """
    if name == BUILT_IN:
        return demo.answer_reward
    path, _, function = name.partition(".py:")
    if not function:
        return name
    file = Path(f"{path}.py")
    if not file.exists():
        raise ConfigError(f"reward_funcs names a file that does not exist: {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(found := getattr(module, function, None)):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{file} has no function {function!r}{nearest(function, names)}")
    return found


def evaluate(trainer: Any, tokenizer: Any, asked: list[demo.Question]) -> dict[str, float]:
    """Held-out figures now."""
    figures: dict[str, float] = trainer.evaluate() if trainer.eval_dataset is not None else {}
    if not isinstance(trainer, PPOTrainer) and hasattr(trainer, "lm_evaluation"):
        figures |= trainer.lm_evaluation.measure(trainer.model)
    if asked:
        plain = [question for question in asked if not question.expression]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        figures["eval_exact_match"] = exact_match(policy, tokenizer, plain)[0]
    return figures


def print_plan(data: RewardArguments, given: PPOConfig, trainer: Any, rows: int, console: Console) -> None:
    """What will run, before it does."""
    args = trainer.args
    steps = args.steps_per_generation // args.gradient_accumulation_steps
    console.print(
        f"{data.algorithm}: {rows:,} prompts; {args.generation_batch_size} answers of at most {args.max_completion_length} "
        f"tokens a batch, {args.num_generations} a prompt; {args.num_iterations} epoch(s) of {steps} minibatch(es) on each; "
        f"KL coefficient {args.beta}; rewards {', '.join(trainer.reward_func_names)}",
        highlight=False,
    )
    if data.algorithm != "ppo":
        known = {one.name for one in dataclasses.fields(args)}
        changed = [
            f"{one.name}={getattr(given, one.name)}"
            for one in dataclasses.fields(PPOConfig)
            if one.name not in known and getattr(given, one.name) != one.default
        ]
        if changed:
            console.print(
                f"Left out, since {data.algorithm} has no such setting: {', '.join(changed)}", highlight=False
            )


def print_figures(algorithm: str, before: dict[str, float], after: dict[str, float], console: Console) -> None:
    """Held-out figures before and after."""
    table = Table(title=f"Held out, before and after {algorithm}", title_justify="left", header_style="bold")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    names = dict(FIGURES)
    ending = "_perplexity"
    names |= {key: f"perplexity, {key[5 : -len(ending)]}" for key in sorted(after) if key.endswith(ending)}
    for key, name in names.items():
        if after.get(key) is not None:
            earlier = before.get(key)
            table.add_row(name, "-" if earlier is None else f"{earlier:.4g}", f"{after[key]:.4g}")
    console.print(table)
