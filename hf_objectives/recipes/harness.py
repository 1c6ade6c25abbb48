"""Tasks of lm-evaluation-harness in a run: before, during and after training, beside the other figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import check_tasks, evaluate_tasks
from hf_objectives.types import option


@dataclass(kw_only=True)
class HarnessArguments:
    """Which tasks, and how often."""

    eval_tasks: str | None = option(
        None, "Tasks of lm-evaluation-harness, by commas; at evaluations, before and after too."
    )
    eval_tasks_folder: str | None = option(None, "Folder with YAML files of tasks of one's own.")
    eval_tasks_steps: int = option(0, "During training, tasks at evaluations of every so many steps; 0 at each.")
    eval_tasks_limit: int | None = option(None, "Documents of each task.")


class HarnessCallback(TrainerCallback):
    """Adds the tasks' figures (`eval_<task>_<metric>`) to evaluations.

    Args:
        trainer: its model is evaluated.
        data: the settings; `eval_tasks` is given.

    Raises:
        ConfigError: a sharded model, one that cannot generate (a reward model), or see `check_tasks`.
    """

    def __init__(self, trainer: Any, data: HarnessArguments) -> None:
        self.trainer, self.data = trainer, data
        self.tasks = [name.strip() for name in str(data.eval_tasks).split(",") if name.strip()]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "eval_tasks is not for sharded models; evaluate the saved model with lm_eval, or leave it out"
            )
        if not trainer.accelerator.unwrap_model(trainer.model).can_generate():
            raise ConfigError("eval_tasks is for causal language models; leave it out")
        self.manager = check_tasks(self.tasks, data.eval_tasks_folder)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Run the tasks, add their figures to the metrics, and log them."""
        every = self.data.eval_tasks_steps
        if every and state.global_step % every and self.trainer.is_in_train:
            return
        figures = evaluate_tasks(
            self.trainer.accelerator.unwrap_model(self.trainer.model),
            self.trainer.processing_class,
            self.tasks,
            self.manager,
            limit=self.data.eval_tasks_limit,
            batch_size=args.per_device_eval_batch_size,
        )
        named = {f"eval_{name}": value for name, value in figures.items()}
        if metrics is not None:
            metrics |= named
        self.trainer.log(dict(named))
