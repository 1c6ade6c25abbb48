"""Distil a teacher into a student, on the student's own answers, and report before and after.

    accelerate launch recipes/distill.py --config distill_quickstart --model_name_or_path runs/student
    accelerate launch recipes/distill.py --model_name_or_path path/or/id --teacher_model_name_or_path path/or/id \\
        --dataset_name chats.jsonl --lmbda 0.5 --output_dir runs/mine
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from datasets import Dataset
from trl import get_peft_config

from hf_objectives.errors import ConfigError
from hf_objectives.labels import Account
from hf_objectives.recipes.arguments import BUILT_IN
from hf_objectives.recipes.data import Rows, digest, set_template, split_rows, usable_rows
from hf_objectives.recipes.data_arguments import WatchedArguments
from hf_objectives.recipes.models import RecipeModel, load_policy
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import (
    PerplexityDistillationConfig,
    PerplexityDistillationTrainer,
    encode_distillation_row,
)
from hf_objectives.types import option


@dataclass
class DistillData(WatchedArguments):
    """Where the prompts and their answers come from, and what is watched beside them."""

    chat_template: str | None = option(None, "A template, or the path of a .jinja file.")
    overlength = "a turn that the end cuts is not trained"  # what the plan says


class Distill(Recipe):
    """Distillation."""

    arguments = (RecipeModel, DistillData, PerplexityDistillationConfig)
    objective = "distill"
    figures: ClassVar[dict[str, str]] = {
        "eval_divergence": "divergence to the teacher (nats per token)",
        "eval_on_policy_divergence": "  on the student's own answers",
        "eval_exact_match": "exact match, unseen questions",
        "eval_teacher_exact_match": "  of the teacher",
        "eval_completions/mean_length": "tokens of an answer",
        "eval_completions/clipped_ratio": "answers that did not stop",
    }
    teacher_exact_match: float | None = None

    def load_rows(self, tokenizer: Any) -> None:
        """Load and encode the rows."""
        set_template(tokenizer, self.data.chat_template)
        rows, held_out = split_rows(self.data, seed=self.args.seed, built_in=(8_000, 200))
        account = Account()
        self.train_rows = self.encode(rows, tokenizer, account)
        self.held_out = self.encode(held_out, tokenizer) if held_out else None
        self.num_rows, self.rows_digest = len(self.train_rows), digest(self.train_rows)
        self.results |= {"num_rows": self.num_rows, "rows_left_out": account.dropped_examples}

    def encode(self, rows: Rows, tokenizer: Any, account: Account | None = None) -> Dataset:
        """Rows as the trainer takes them, with their `source` and `row`."""
        names = ("lmbda", "max_length", "train_on", "control_tokens")
        options = {name: getattr(self.args, name) for name in names}
        options["template_kwargs"] = self.args.chat_template_kwargs
        made = usable_rows(
            *(self.data, rows),
            lambda row: encode_distillation_row(tokenizer, row, source=row["source"], row_index=row["row"], **options),
            account,
        )
        return Dataset.from_list(list(made))

    def build_trainer(self) -> PerplexityDistillationTrainer:
        """Load both models and the rows."""
        args, config = self.args, self.model_config
        if not args.teacher_model_name_or_path:
            raise ConfigError("teacher_model_name_or_path is missing; give a Hub id, a folder, or 'builtin'")
        model, tokenizer = load_policy(config, **self.loading)
        self.load_rows(tokenizer)
        # Adapters and quantisation are the student's: they would change the distribution that is to be learnt.
        theirs = replace(
            config, model_name_or_path=args.teacher_model_name_or_path, model_revision=args.teacher_model_revision or "main",
            use_peft=False, load_in_4bit=False, load_in_8bit=False,
        )  # fmt: skip
        self.results["teacher"] = args.teacher_model_name_or_path
        teacher, teachers = load_policy(theirs, **self.loading)
        return PerplexityDistillationTrainer(
            model,
            args.teacher_model_name_or_path if args.teacher_model_init_kwargs else teacher,
            args,
            train_dataset=self.train_rows,
            eval_dataset=self.held_out,
            processing_class=tokenizer,
            peft_config=get_peft_config(config),
            teacher_processing_class=teachers,
            eval_lm_datasets=self.data.watched(),
        )

    def introduce(self, trainer: Any) -> None:
        """Print the plan, and what is learnt from whom."""
        super().introduce(trainer)
        args = trainer.args
        self.console.print(
            f"Teacher {args.teacher_model_name_or_path}; {args.lmbda:.0%} of the steps on answers of the student, of at most "
            f"{args.max_completion_length} tokens at temperature {args.temperature:g}; divergence with beta {args.beta:g}",
            highlight=False,
            markup=False,
        )

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Held-out figures; of the built-in corpus also the shares of right answers of student and teacher."""
        metrics = super().evaluate(trainer)
        if self.data.dataset_name == BUILT_IN:
            metrics |= {f"eval_{name}": value for name, value in self.examine(trainer).figures().items()}
            if self.teacher_exact_match is None:
                self.teacher_exact_match = self.examine(trainer, trainer.teacher_model).figures()["exact_match"]
            metrics["eval_teacher_exact_match"] = self.teacher_exact_match
        return metrics


main = Distill.run
