"""Contacts with private parts of transformers' Trainer that save a checkpoint and go on from one.

`tests/trainers/test_hf_checkpoints.py` holds these contacts against the installed release.
"""

from __future__ import annotations

import errno
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import SaveStrategy, has_length

from hf_objectives.distributed import any_rank, gather_objects, rank
from hf_objectives.errors import ConfigError, DiskFullError
from hf_objectives.trainers.checkpoints import (
    StepRows,
    clear_staging,
    find_checkpoint,
    publish,
    rotate,
    staging_folder,
    step_rows_of,
)
from hf_objectives.trainers.hf_hub import HubPushes
from hf_objectives.trainers.termination import RunTerminated, SaveOnTermination

logger = logging.getLogger(__name__)

_COUNTERS = "counters"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WholeCheckpoints(HubPushes):
    """Checkpoints that are whole or not there; a mixin that stands before the Trainer.

    The Trainer writes into a staging folder. When all ranks have written, the folder is renamed; then come rotation and push.
    """

    args: Any
    state: Any
    control: Any
    _staging: Path | None = None
    _is_finished = False
    #: Attributes that count over a whole run, which the Trainer's state keeps in checkpoints; JSON values.
    counters: ClassVar[tuple[str, ...]] = ()

    # -- for subclasses ------------------------------------------------------------------------------------------

    def save_extra_state(self, folder: Path) -> None:
        """Write state of the subclass into a checkpoint that is about to be saved with its optimizer."""

    def load_extra_state(self, folder: Path) -> None:
        """Read what `save_extra_state` wrote, when a run is resumed."""

    def load_best_state(self, folder: Path) -> None:
        """Read what belongs to the weights of the best checkpoint, which the Trainer loads at the end."""

    def extra_state_files(self) -> list[str]:
        """Names of the files that `load_extra_state` reads on this rank."""
        return []

    # -- going on ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """Train as the parent does, from the beginning or from a whole checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one in `output_dir`; a warning names
                those that were passed over, and why. A finished run takes no step; it is evaluated if `eval_strategy` is set.
            trial, ignore_keys_for_eval: see the parent.

        Raises:
            CheckpointError: a checkpoint that is unfinished or damaged, or has no optimizer, scheduler or random states while
                `resume_incomplete` is off; names file and reason.
            ConfigError: a step takes another number of rows than in the run that saved the checkpoint, so that rows would be
                skipped or trained twice. Data that keep their own place (`OrderedStream`) go on by rows.
            DiskFullError: no space is left for a checkpoint. Those before it are kept.
            RunTerminated: SIGTERM came; a checkpoint of the step that was running is saved. It ends the program.
        """
        found = find_checkpoint(
            resume_from_checkpoint,
            Path(self.args.output_dir),
            incomplete=getattr(self.args, "resume_incomplete", False),
            own_files=self.extra_state_files(),
        )
        self._is_finished = False
        parent: Any = super()
        trainer: Any = self
        with terminating(trainer) as termination:
            result = parent.train(found, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        if termination.has_ended:
            raise RunTerminated
        if self._is_finished and self.args.eval_strategy != "no":
            trainer.evaluate(ignore_keys=ignore_keys_for_eval)
        return result

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, checkpoint: Any, trial: Any
    ) -> tuple[int, int]:
        parent: Any = super()
        places = parent._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        if checkpoint is not None and self.state.global_step and not self.args.ignore_data_skip:
            self._refuse_other_rows(Path(checkpoint), num_update_steps_per_epoch)
        return places

    def _step_rows(self) -> StepRows:
        """The rows of a step of this run."""
        trainer: Any = self
        batch, accumulation = trainer._train_batch_size, self.args.gradient_accumulation_steps
        total = trainer.get_total_train_batch_size(self.args)
        processes = 1 if self.args.accelerator_config.split_batches else total // (batch * accumulation)
        return StepRows(batch, accumulation, processes)

    def _refuse_other_rows(self, checkpoint: Path, steps: int) -> None:
        """Refuse a checkpoint whose step does not stand for the same rows here: transformers skips rows by steps.

        Args:
            checkpoint: its folder; `state` has been read from there.
            steps: steps of an epoch in this run.
        """
        step, epoch, now = self.state.global_step, float(self.state.epoch or 0), self._step_rows()
        by_steps = self.args.max_steps > 0
        if step >= self.state.max_steps and (by_steps or epoch >= self.args.num_train_epochs):
            return  # finished
        epochs, beyond = divmod(step, steps)
        if not beyond and epoch.is_integer() and (by_steps or epoch == epochs):
            return  # no row of an epoch is left out
        saved = step_rows_of(checkpoint)
        if saved is not None:
            # Other samplers order rows by batches, `drop_last` drops batches, and PPO keeps answers by batches.
            by_rows = self.args.train_sampling_strategy in ("random", "sequential")
            by_rows = by_rows and not self.args.dataloader_drop_last and not hasattr(self.args, "steps_per_generation")
            if saved == now or (by_rows and saved.total == now.total):
                return
            told = f"{saved}, this run with {now} (batch x accumulation x processes)"
        else:
            # Without a manifest a state tells the batch, and which share of an epoch its steps were.
            batch, share = self.state.train_batch_size, epoch - epochs
            batches = beyond * now.accumulation / share if share > 0 else 0.0  # of an epoch
            fits = beyond > 0 and (steps - 1) * now.accumulation + 0.5 < batches < steps * now.accumulation + 0.5
            if batch in (None, now.batch) and (fits or not has_length(getattr(self, "train_dataset", None))):
                return
            told = (
                f"batches of {batch} rows, and step {step} was at epoch {epoch:.6g}; this run takes {now} "
                f"(batch x accumulation x processes), and {steps} steps an epoch"
            )
        raise ConfigError(
            f"{checkpoint} was trained with {told}: the rest of the epoch would have other rows, some twice and some never. "
            "Set per_device_train_batch_size, gradient_accumulation_steps and the number of processes as they were"
            f"{'' if saved is None or saved.total == now.total else f', or to a product of {saved.total}'}; or begin the "
            "epoch anew with ignore_data_skip=True"
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        # The Trainer loads the weights first, and begins at step 0 where the state has gone since.
        if not self.state.global_step:
            raise ConfigError(
                f"{checkpoint} lost its trainer_state.json while it was read; end the run that still writes there"
            )
        for name, value in self.state.stateful_callbacks.get(_COUNTERS, {}).items():
            if name in self.counters:
                setattr(self, name, value)
        self.load_extra_state(Path(checkpoint))
        self._is_finished = self.state.global_step >= self.state.max_steps
        if self._is_finished and rank() == 0:
            logger.warning(
                "%s is of step %d of %d: the run is finished, and no step is taken. Raise max_steps or num_train_epochs to "
                "train on",
                *(checkpoint, self.state.global_step, self.state.max_steps),
            )

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self.load_best_state(Path(self.state.best_model_checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_finished:  # the Trainer looks for the end after a step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    # -- saving --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, saves = Path(self._get_output_dir(trial)), self.args.should_save
        staged = staging_folder(run, self.state.global_step)
        if saves:
            clear_staging(run)
        any_rank(False)  # nobody writes before
        self._staging = staged.parent  # in which the Trainer makes its `checkpoint-N`
        # The Trainer's save may wait for all ranks inside; a rank that failed there does not find the others again.
        trainer: Any = self
        waits = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or self.state.best_global_step
        together = not self.args.save_on_each_node
        try:
            self._on_all_ranks(lambda: self._write(model, trial, staged, run), staged, agree=not waits)
            facts: dict[str, Any] = {"saves": saves, "together": together, "step_rows": self._step_rows()}
            self._on_all_ranks(lambda: publish(staged, run, **facts), staged, agree=True)
        finally:
            self._staging = None
        final = run / staged.name
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if saves:
            best = self.state.best_model_checkpoint
            rotate(run, self.args.save_total_limit, [final, *([Path(best)] if best else [])])

    def _write(self, model: Any, trial: Any, staged: Path, run: Path) -> None:
        staged.mkdir(parents=True, exist_ok=True)
        if not self.args.save_only_model:
            self.save_extra_state(staged)
        if self.counters:
            self.state.stateful_callbacks[_COUNTERS] = {name: getattr(self, name) for name in self.counters}
        super()._save_checkpoint(model, trial)  # type: ignore[misc]  # it does not push, and finds nothing to rotate
        # The Trainer looked for the best checkpoint in the staging folder. What it wrote is to name the final one.
        best = self.state.best_global_step
        if best and self.args.save_strategy != SaveStrategy.NO:
            folder = run / f"checkpoint-{best}"
            if best == self.state.global_step or folder.exists():
                self.state.best_model_checkpoint = str(folder)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))

    def _on_all_ranks(self, work: Callable[[], Any], staged: Path, *, agree: bool) -> None:
        """Do a part of a save on every rank. No space on one ends the run on all; other errors stay as they are."""
        error, reason = None, None
        try:
            work()
        except BaseException as caught:
            error, reason = caught, no_space(caught)
            if reason is None:
                self._discard(staged)
                raise
        if error is None or agree:
            reason = next(filter(None, gather_objects(reason)), None)
        if reason is not None:
            self._discard(staged)
            run = staged.parent.parent
            steps = [int(path.name[11:]) for path in run.glob("checkpoint-*") if path.name[11:].isdigit()]
            kept = f"checkpoint-{max(steps)} is kept" if steps else "there is no checkpoint before it"
            raise DiskFullError(
                f"no space left to write {staged.name} in {run} ({reason}; {shutil.disk_usage(run).free >> 20} MiB are "
                f"free); {kept}. Make space there, or set another output_dir, and resume"
            ) from error

    def _discard(self, staged: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)


@contextmanager
def terminating(trainer: Any) -> Iterator[SaveOnTermination]:
    """Within it, SIGTERM ends the trainer's run with a checkpoint; `enable_jit_checkpoint` asks for the same.

    Transformers' own handler would make the checkpoint's folder before it saves, and each rank would decide alone.
    """
    theirs = trainer.pop_callback(JITCheckpointCallback)
    if theirs is not None and theirs.jit_manager is not None:
        signal.signal(signal.SIGTERM, theirs.jit_manager._original_sigterm_handler)
    with SaveOnTermination() as termination:
        trainer.add_callback(termination)
        try:
            yield termination
        finally:
            trainer.remove_callback(termination)


def no_space(error: BaseException) -> str | None:
    """The words of the error by which writing ended for want of space, among those behind an error; None: it was none."""
    for origin in _origins(error):
        words = str(origin).splitlines()[0] if str(origin) else ""
        is_full = isinstance(origin, OSError) and origin.errno in _FULL
        # safetensors gives the number in words, and the writer of torch.save only says that it did not write.
        is_full = is_full or any(f"(os error {number})" in words for number in _FULL)
        if is_full or "PytorchStreamWriter" in words or "inline_container.cc" in words:
            return words
    return None


def _origins(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        for failure, _ in (getattr(error, "_failures", None) or {}).values():  # torch.distributed.checkpoint, by ranks
            yield from _origins(failure)
        error = error.__cause__ or error.__context__
