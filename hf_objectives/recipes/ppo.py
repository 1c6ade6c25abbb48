"""Train a policy by reward with PPO, or with TRL's RLOO or GRPO from the same config, and report before and after.

    accelerate launch recipes/ppo.py --config ppo_quickstart --model_name_or_path runs/quickstart
    accelerate launch recipes/ppo.py --config ppo_quickstart --algorithm rloo ...
    accelerate launch recipes/ppo.py --model_name_or_path path/or/id --dataset_name prompts.jsonl \\
        --reward_funcs rewards.py:my_reward runs/reward --reward_weights 1.0 0.5 --output_dir runs/mine
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, get_peft_config

from hf_objectives import demo
from hf_objectives.diagnostics import plot_rewards
from hf_objectives.errors import ConfigError, nearest
from hf_objectives.evaluation import LanguageModelEvaluation
from hf_objectives.labels import Account, to_prompt, with_prompts
from hf_objectives.recipes.arguments import BUILT_IN
from hf_objectives.recipes.data import Rows, split_rows, usable_rows
from hf_objectives.recipes.data_arguments import WatchedArguments
from hf_objectives.recipes.models import RecipeModel, load_policy
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import PPOConfig, PPOTrainer
from hf_objectives.types import Row, check_one_of, option

TRL_TRAINERS: dict[str, tuple[type, type]] = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


@dataclass
class PpoData(WatchedArguments):
    """Prompts, rewards and the algorithm."""

    algorithm: str = option("ppo", "ppo, or TRL's rloo or grpo from the same config.")
    reward_funcs: list[str] = field(
        default_factory=lambda: [BUILT_IN],
        metadata={"help": "'builtin', file.py:function in TRL's signature, or the folder or id of a reward model."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("algorithm", self.algorithm, ("ppo", *TRL_TRAINERS))


class Ppo(Recipe):
    """Reinforcement learning, by PPO or another algorithm with the same options."""

    arguments = (RecipeModel, PpoData, PPOConfig)
    figures: ClassVar[dict[str, str]] = {
        "eval_reward": "mean reward",
        "eval_exact_match": "exact match, unseen questions",
        "eval_kl": "KL to the reference (nats per token)",
        "eval_kl_per_answer": "KL to the reference (nats per answer)",
        "eval_completions/mean_length": "tokens of an answer",
        "eval_completions/finished": "finished answers",
    }

    @property
    def objective(self) -> str:  # type: ignore[override]
        """The algorithm."""
        return self.data.algorithm

    def build_trainer(self) -> Any:
        """Load the policy, the prompts and the rewards."""
        data, args = self.data, self.args
        if data.dataset_name != BUILT_IN and args.metric_for_best_model in ("exact_match", "eval_exact_match"):
            raise ConfigError(
                "metric_for_best_model: exact_match is measured on the built-in corpus alone; expected another metric of the "
                "evaluation, such as reward"
            )
        model, tokenizer = load_policy(self.model_config, **self.loading)
        account = Account()
        # Facts too: what is not asked for may be forgotten.
        asked = [name for name in demo.SKILLS if name not in (*demo.HARD, "multiplication")]
        rows, held_out = split_rows(data, seed=args.seed, built_in=(10_000, 200), skills=asked)
        train, held_out = (
            list(usable_rows(data, part, _with_prompt, counted))
            for part, counted in ((rows, account), (held_out, None))
        )
        self.num_rows, self.results["algorithm"] = len(train), data.algorithm
        self.results["prompts_left_out"] = account.dropped_examples
        rewards = [read_reward(name) for name in data.reward_funcs]
        lora = get_peft_config(self.model_config)
        if data.algorithm in TRL_TRAINERS:
            if args.beta and lora is None and not model.config._name_or_path:
                raise ConfigError(
                    f"{data.algorithm} loads its reference by the model's name, and 'builtin' has none; set beta to 0"
                )
            return self._answering(self._trl_trainer(model, rewards, train, held_out or None, tokenizer, lora))
        trainer = PPOTrainer(
            model,
            rewards,
            args,
            train_dataset=train,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
            peft_config=lora,
            eval_lm_datasets=data.watched(),
        )
        return self._answering(trainer)

    def _answering(self, trainer: Any) -> Any:
        """On the built-in corpus every evaluation of the trainer has the share of right answers: it may choose the best."""
        evaluate = trainer.evaluation_loop

        def evaluation_loop(*args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            output = evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            marks = self.examine(trainer).figures()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in marks.items()})
            return output

        if self.data.dataset_name == BUILT_IN:
            trainer.evaluation_loop = evaluation_loop
        return trainer

    def _trl_trainer(
        self, model: Any, rewards: list[Any], train: Rows, held_out: Rows | None, tokenizer: Any, lora: Any
    ) -> Any:
        trainer_class, config_class = TRL_TRAINERS[self.data.algorithm]
        trainer = trainer_class(
            model,
            rewards,
            as_config(config_class, self.args),
            train_dataset=with_prompts(train, "train_dataset"),
            eval_dataset=with_prompts(held_out, "eval_dataset"),
            processing_class=tokenizer,
            peft_config=lora,
        )
        if (watched := self.data.watched()) is not None:
            length, size = self.args.eval_lm_max_length, self.args.per_device_eval_batch_size
            trainer.lm_evaluation = LanguageModelEvaluation(watched, tokenizer, max_length=length, batch_size=size)
        return trainer

    def introduce(self, trainer: Any) -> None:
        """Print what will run, and which settings the algorithm does not have."""
        args, algorithm = trainer.args, self.data.algorithm
        minibatches = args.steps_per_generation // args.gradient_accumulation_steps
        self.console.print(
            f"{algorithm}: {self.num_rows:,} prompts; {args.generation_batch_size} answers of at most "
            f"{args.max_completion_length} tokens a batch, {args.num_generations} a prompt; {args.num_iterations} epoch(s) "
            f"of {minibatches} minibatch(es) on each; KL coefficient {args.beta}; rewards "
            f"{', '.join(trainer.reward_func_names)}",
            highlight=False,
        )
        known = {f.name for f in fields(args)}
        changed = [
            f"{f.name}={getattr(self.args, f.name)}"
            for f in fields(PPOConfig)
            if f.name not in known and getattr(self.args, f.name) != f.default
        ]
        if changed:
            line = f"Left out, since {algorithm} has no such setting: {', '.join(changed)}"
            self.console.print(line, highlight=False)

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Held-out figures; those of the built-in corpus have the share of right answers."""
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        if not isinstance(trainer, PPOTrainer) and hasattr(trainer, "lm_evaluation"):
            metrics |= trainer.lm_evaluation.measure(trainer.model)
        return metrics

    def draw(self, trainer: Any, before: Mapping[str, Any], path: Path) -> Path:
        """Draw rewards and the distance from the reference."""
        return plot_rewards(trainer.state.log_history, path)


def _with_prompt(row: Row) -> Row:
    """The row, which has to have a prompt."""
    to_prompt(row, source=row["source"], row_index=row["row"])
    return row


def as_config(config_class: type, args: PPOConfig) -> Any:
    """The values of a PPOConfig as TRL's config, as far as it has them."""
    if args.num_generations < 2:
        raise ConfigError(
            f"num_generations is {args.num_generations}; RLOO and GRPO compare answers, expected 2 or more"
        )
    known = {f.name for f in fields(config_class) if f.init} - {"generation_batch_size"}
    return config_class(**{f.name: getattr(args, f.name) for f in fields(args) if f.name in known})


def read_reward(name: str) -> str | Callable[..., Any]:
    """A reward by its name: the built-in one, a function of a file, or the folder or id of a reward model."""
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
    found = getattr(module, function, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(f"{file} has no function {function!r}{nearest(function, names)}")
    return found


main = Ppo.run
