"""Fine-tune a chat model on what it has to produce, and report exact perplexity before and after.

    accelerate launch recipes/sft.py --config quickstart
    accelerate launch recipes/sft.py --config smollm2_lora \\
        --model_name_or_path path/or/id --dataset_name chats.jsonl --output_dir runs/mine
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from hf_objectives import demo
from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError
from hf_objectives.inspection import save_label_preview
from hf_objectives.recipes.answers import AnswersCallback
from hf_objectives.recipes.built_in import Marks, is_built_in, is_right
from hf_objectives.recipes.data import Prepared, digest, digest_of_stream, mix_rows, prepare
from hf_objectives.recipes.data_arguments import DataArguments
from hf_objectives.recipes.models import TrustedModel, load_model, with_lora
from hf_objectives.recipes.preview import check_stops, print_preview
from hf_objectives.recipes.run import Recipe
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments


class Sft(Recipe):
    """Fine-tuning."""

    arguments = (TrustedModel, DataArguments, PerplexityTrainingArguments)
    figures: ClassVar[dict[str, str]] = {
        "eval_bits_per_byte": "bits per byte",
        "eval_stop_probability": "probability of stopping at a turn's end",
        "eval_answers_exact_match": "exact match, held-out answers",
        "eval_exact_match": "exact match, unseen questions",
        "eval_exact_match_trained": "exact match, questions of the training split",
        "eval_exact_match_facts": "exact match, facts in other words",
    }
    of_model_alone = r"eval_(?!runtime|model_preparation_time|\w+_per_second).+"
    prepared: Prepared
    marks: Marks | None = None

    def load_rows(self, tokenizer: Any) -> None:
        """Prepare the rows and mix them where weights ask for it."""
        data, seed = self.data, self.args.seed
        kept = not self.reads_again
        self.prepared = prepare(data, tokenizer, seed=seed, output_dir=self.args.output_dir, keep=kept)
        self.train_rows, self.num_rows = self.prepared.train, len(self.prepared.train)
        self.rows_digest = digest(self.train_rows)
        if (settings := data.mixture_settings()) is not None:
            self.train_rows = self.mixture = mix_rows(
                settings, self.prepared.train, max_length=data.max_length, packing=data.packing, seed=seed
            )
            self.rows_digest = digest_of_stream(self.mixture, self.rows_digest, seed)

    def build_trainer(self) -> PerplexityTrainer:
        """Load the model and the rows."""
        data, args = self.data, self.args
        model, self.tokenizer = load_model(self.model_config, **self.loading)
        self.load_rows(self.tokenizer)
        check_stops(self.tokenizer, self.prepared.examples, allow_no_stop=data.allow_no_stop)
        self.results["ledger"] = self.prepared.ledger.to_dict()
        if self.mixture is not None and args.max_steps <= 0:
            raise ConfigError("a mixture has no length; say how long with max_steps")
        model = with_lora(model, self.model_config, gradient_checkpointing=args.gradient_checkpointing)
        # The rows are encoded: their labels say what is trained, of texts all of it.
        collator: Any = DataCollatorForAssistantOnlyLM(self.tokenizer, train_on="all")
        if data.packing:
            collator = DataCollatorWithEosPacking(self.tokenizer, max_length=data.max_length, train_on="all")
        trainer = PerplexityTrainer(
            model,
            args,
            collator,
            train_dataset=self.train_rows,
            eval_dataset=self.prepared.evaluation,
            processing_class=self.tokenizer,
        )
        if data.eval_answers:
            trainer.add_callback(AnswersCallback(trainer, data.eval_answers, data.eval_max_new_tokens, self.console))
        return trainer

    def introduce(self, trainer: Any) -> None:
        """Print the plan and what is trained; keep the latter for the report."""
        super().introduce(trainer)
        for note in self.mixture.notes if self.mixture is not None else ():
            self.console.print(note, highlight=False, markup=False)
        print_preview(self.tokenizer, self.prepared.examples, self.prepared.ledger, self.console)
        save_label_preview(self.tokenizer, self.prepared.examples, Path(self.args.output_dir) / "labels.json")

    def evaluate(self, trainer: Any) -> dict[str, Any]:
        """Exact perplexity; of the built-in corpus also the share of right answers."""
        metrics = super().evaluate(trainer)
        if any(is_built_in(place.path) for place in self.data.places().values()):
            self.marks = self.examine(trainer, trained=True)
            metrics |= {f"eval_{name}": value for name, value in self.marks.figures().items()}
            self.results["exact_match_by_skill"] = self.marks.by_skill()
        return metrics

    def print_figures(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Print the figures, and a few answers."""
        super().print_figures(before, after)
        if self.marks is None:
            return
        self.console.print(self.marks.table())
        for question, said in self.marks.unseen[:: len(self.marks.unseen) // 8]:
            verdict = "right" if is_right(question, said) else f"wrong, it is {demo.expected(question)!r}"
            self.console.print(f"  {question.question} -> {said!r} ({verdict})", highlight=False, markup=False)


main = Sft.run
