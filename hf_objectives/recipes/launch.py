"""What each launch of a run writes down: all that the order of its rows follows from, beside the rows themselves."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerState

from hf_objectives.distributed import world_size
from hf_objectives.inspection import ENVIRONMENT, save_environment
from hf_objectives.trainers import copies_of_rows, train_batch_size
from hf_objectives.types import parse_json

Launches = list[dict[str, Any]]  # what `LaunchRecord` wrote, from the first launch on


class LaunchRecord(TrainerCallback):
    """Writes `environment.json`, and the launches that led to a step into the state of every checkpoint.

    A launch that resumes adds itself to those of its checkpoint. So checkpoints that another run left in the same folder are
    told from those of this run, and a step from those of a launch with other settings.

    Args:
        trainer: the trainer whose batch size counts: `auto_find_batch_size` changes it.
        known: what `environment.json` holds about the recipe.
        rows_digest: changes when the rows to train on do.
        configs: dataclasses of the settings.
    """

    state_name: ClassVar[str] = "launches"  # of the launches in the state of a Trainer

    def __init__(self, trainer: Any, known: dict[str, Any], rows_digest: str | None, configs: tuple[Any, ...]) -> None:
        self.trainer, self.known, self.rows_digest, self.configs = trainer, known, rows_digest, configs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add this launch; again where `auto_find_batch_size` begins anew."""
        config = args.accelerator_config
        launch = {
            "id": uuid.uuid4().hex,
            "begin": state.global_step,
            "max_steps": state.max_steps,
            "rows_digest": self.rows_digest,
            "readers": world_size() // copies_of_rows(),  # processes that read rows of their own
            "batch_size": train_batch_size(self.trainer),
            "accumulated": args.gradient_accumulation_steps,
            "seed": args.seed if args.data_seed is None else args.data_seed,
            "drop_last": args.dataloader_drop_last,
            "sampling": str(args.train_sampling_strategy),
            "ignore_data_skip": args.ignore_data_skip,
            **{name: getattr(config, name) for name in ("split_batches", "even_batches", "use_seedable_sampler")},
        }
        launches = state.stateful_callbacks[self.state_name] = [
            *state.stateful_callbacks.get(self.state_name, []),
            launch,
        ]
        if state.is_world_process_zero:
            path = Path(args.output_dir) / ENVIRONMENT
            save_environment(path, ({**self.known, "launches": launches}, *self.configs))


def launches_in(folder: Path) -> Launches:
    """The launches of the last run in an output folder; none where its `environment.json` names none."""
    try:
        settings = parse_json((folder / ENVIRONMENT).read_bytes())["settings"]
        return settings[LaunchRecord.state_name]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def state_of(path: Path, launches: Launches) -> TrainerState | None:
    """The state that a Trainer wrote to a file; None where there is none, or it is not of these launches.

    A run that was begun anew in the same folder leaves checkpoints of the one before it, and one that was resumed at an
    earlier checkpoint leaves those that came after it.
    """
    if not path.exists():
        return None
    state = TrainerState.load_from_json(str(path))
    kept: Any = state.stateful_callbacks
    ids, known = ([launch["id"] for launch in part] for part in (kept.get(LaunchRecord.state_name, []), launches))
    ends = [launch["begin"] for launch in launches[len(ids) :]]
    is_theirs = ids and ids == known[: len(ids)] and state.global_step <= min(ends, default=state.global_step)
    return state if is_theirs else None
