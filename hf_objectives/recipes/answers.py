"""Generated answers at every evaluation of a run: figures beside the others, and samples in the log."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import Asked, evaluate_answers, find_answers
from hf_objectives.inspection import visible
from hf_objectives.trainers import log_samples, stop_ids

_SHOWN, _CHARACTERS = 3, 300


class AnswersCallback(TrainerCallback):
    """Adds `eval_answers_exact_match` and what belongs to it to every evaluation, so that the best checkpoint may go by it.

    Args:
        trainer: its model answers; its evaluation rows have the prompts.
        count: prompts, at most.
        max_new_tokens: where an answer is cut.
        console: where a few answers are printed, the same prompts every time; trackers that take texts have them too.

    Raises:
        ConfigError: rows that are no mapped dataset, or a sharded model, which cannot generate as a whole.
    """

    def __init__(self, trainer: Any, count: int, max_new_tokens: int, console: Console) -> None:
        rows = trainer.eval_dataset
        if rows is None or not hasattr(rows, "column_names"):
            raise ConfigError("eval_answers needs held-out rows; set eval_share, or leave it out")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("eval_answers is not for sharded models; evaluate the saved model, or leave it out")
        self.trainer, self.max_new_tokens, self.console = trainer, max_new_tokens, console
        tokenizer = trainer.processing_class
        self.stops = sorted({*stop_ids(trainer.model.generation_config), *stop_ids(tokenizer)})
        self.asked: list[Asked] = find_answers(rows, count, self.stops)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Answer, add the figures to the metrics, log them, and show a few answers."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        figures, answers = evaluate_answers(
            model,
            self.trainer.processing_class,
            self.asked,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stops,
            batch_size=args.per_device_eval_batch_size,
        )
        named = {f"eval_{name}": value for name, value in figures.items()}
        if metrics is not None:
            metrics |= named
        self.trainer.log(dict(named))
        if state.is_world_process_zero:
            table = Table(
                "prompt", "said", "expected", title=f"Answers after step {state.global_step}", title_justify="left"
            )
            samples = [
                {"prompt": answer.prompt, "said": answer.said, "expected": answer.expected}
                for answer in answers[:_SHOWN]
            ]
            for sample in samples:
                texts = sample["prompt"][-_CHARACTERS:], sample["said"][:_CHARACTERS], sample["expected"][:_CHARACTERS]
                table.add_row(*(Text(visible(text)) for text in texts))
            self.console.print(table)
            log_samples(self.trainer, "eval/answers", samples, state.global_step)
