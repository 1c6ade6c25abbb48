"""Tasks of lm-evaluation-harness on a live model (Biderman et al., arXiv 2405.14782); the extra `eval`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_objectives.distributed import world_size
from hf_objectives.errors import ConfigError, nearest


def check_tasks(tasks: Sequence[str], folder: str | None = None) -> Any:
    """Check that tasks are known, before anything is trained.

    Args:
        tasks: names of tasks or groups.
        folder: YAML files of tasks of one's own; None for none.

    Returns:
        lm-eval's task manager.

    Raises:
        ConfigError: lm-eval is not installed, a task is not known, or several processes run.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"eval_tasks needs lm-eval ({error}); pip install 'hf-objectives[eval]'") from error
    if world_size() > 1:
        raise ConfigError("eval_tasks runs in one process; evaluate the saved model with lm_eval, or leave it out")
    manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ConfigError(f"eval_tasks: lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}")
    return manager


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Run tasks on a model as it is; its mode and all random states stay as they were.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups.
        manager: see `check_tasks`.
        limit: documents of each task; None for all.
        batch_size: documents at a time.

    Returns:
        Each metric of each task as `<task>_<metric>`, filters after the first named (`gsm8k_exact_match_flexible-extract`);
        standard errors as `<task>_<metric>_stderr`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training, device = model.training, str(next(model.parameters()).device)
    with _random_states():
        model.eval()
        harness = HFLM(pretrained=model, tokenizer=tokenizer, device=device, batch_size=batch_size)
        settings: dict[str, Any] = {"task_manager": manager, "limit": limit, "log_samples": False, "bootstrap_iters": 0}
        done = simple_evaluate(harness, tasks=list(tasks), verbosity="ERROR", **settings)
        model.train(was_training)
    figures = {}
    for task, found in done["results"].items():
        for key, value in found.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key:
                metric, _, name = key.partition(",")
                figures[f"{task}_{metric}" + ("" if name == "none" else f"_{name}")] = float(value)
    return figures


@contextmanager
def _random_states() -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else ()):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
