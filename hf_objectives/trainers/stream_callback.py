"""A callback that carries an `OrderedStream` through a Trainer: its place in checkpoints, and its figures in logs."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from transformers import TrainerCallback

from hf_objectives.errors import ConfigError
from hf_objectives.preparation import OrderedStream
from hf_objectives.trainers.hf_compat import copies_of_rows

logger = logging.getLogger(__name__)


class OrderedStreamCallback(TrainerCallback):
    """Keeps a stream's place in the checkpoints of a Trainer, and resumes there.

    `PerplexityTrainer` adds it by itself. Add it to transformers' own Trainer, and set `ignore_data_skip=True`: the stream
    skips rows by itself. TRL's `SFTTrainer` takes only datasets of `datasets` (1.16).

    Args:
        stream: the `train_dataset`.

    Raises (when training begins):
        ConfigError: a checkpoint of other data, or settings under which rows would be read twice.

    Example:
        mixture = build_mixture("mixture.yaml", tokenizer=tokenizer)
        Trainer(model, args, train_dataset=mixture, callbacks=[OrderedStreamCallback(mixture)]).train()
    """

    state_name: ClassVar[str] = "train_stream"  # of the stream's state in that of the Trainer, which checkpoints hold

    def __init__(self, stream: OrderedStream) -> None:
        self.stream = stream
        self.rows_taken = 0  # by all ranks, from the stream's row 0

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Find the place, and log what lies ahead."""
        if not args.ignore_data_skip:
            raise ConfigError(
                "ignore_data_skip is off, so that a resumed run would skip rows that a stream skips already"
            )
        dispatches = args.accelerator_config.dispatch_batches is not False
        if dispatches and args.world_size > 1 and args.dataloader_num_workers > 1:
            raise ConfigError(
                "accelerate hands out the batches of one process, whose loader workers take turns by all ranks' rows; set "
                "accelerator_config={'dispatch_batches': False}, or dataloader_num_workers to 0 or 1"
            )
        # Not `args.train_batch_size`, which `auto_find_batch_size` leaves as it was.
        self.stream.batch_rows = train_dataloader.batch_size * args.world_size // copies_of_rows()
        kept = state.stateful_callbacks.get(self.state_name)
        if state.global_step and kept is None:
            raise ConfigError(
                f"the checkpoint of step {state.global_step} does not say where its stream stood; "
                "it was made on other data"
            )
        self.stream.load_state_dict(kept or self.stream.state_dict(0))
        self.rows_taken = self.stream.state_dict()["row"]
        left = (state.max_steps - state.global_step) * self._rows_per_step(args)
        for line in self.stream.expect(self.rows_taken + left):
            if state.is_world_process_zero:
                logger.warning(line)

    def _rows_per_step(self, args: Any) -> int:
        # After a resume `state.train_batch_size` is that of the checkpoint, so it is not used here.
        return (self.stream.batch_rows or 1) * args.gradient_accumulation_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the rows that all ranks took."""
        self.rows_taken += self._rows_per_step(args)
        # A Trainer counts the steps of a loader without a length as one epoch, after a resume from 0 again.
        state.epoch = state.global_step / state.max_steps
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the place into a checkpoint that is about to be written."""
        if control.should_save:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the place into the state that is saved last."""
        if args.should_save:  # where accelerate hands batches out, other processes read nothing
            state.stateful_callbacks[self.state_name] = self.stream.state_dict(self.rows_taken)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures of the stream."""
        if logs and "loss" in logs and state.log_history and state.is_world_process_zero:
            for name, value in self.stream.metrics(self.rows_taken).items():
                logs.setdefault(name, value)
                state.log_history[-1].setdefault(name, value)
