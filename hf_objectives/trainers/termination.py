"""A run that is told to end (SIGTERM) saves a checkpoint first, on all ranks."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from transformers import TrainerCallback

from hf_objectives.distributed import any_rank

logger = logging.getLogger(__name__)


class RunTerminated(SystemExit):
    """A run ended at SIGTERM, with a checkpoint to go on from. The exit code is EX_TEMPFAIL, 75: start it again to go on."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


class SaveOnTermination(TrainerCallback):
    """Within it, SIGTERM to any rank ends training on all of them after the step that is running, with a checkpoint.

    A second SIGTERM ends the process at once. A handler that the program has set stays, and a thread that is not the main one
    can set none; then SIGTERM is not looked for. It is a context manager and a callback of the Trainer.

    Attributes:
        has_ended: whether training was ended before its last step.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self._is_asked = self._is_set = False

    def __enter__(self) -> SaveOnTermination:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._ask)
            self._is_set = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_set:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._is_set = False

    def _ask(self, number: int, frame: Any) -> None:
        if self._is_asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._is_asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask all ranks, and end training with a save where one of them was told to."""
        if not any_rank(self._is_asked):
            return
        self.has_ended = state.global_step < state.max_steps
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        if state.is_world_process_zero:
            logger.warning("SIGTERM: saving checkpoint-%d, then ending", state.global_step)


def _forget() -> None:
    """Let SIGTERM end a worker that was forked, as those who make workers expect."""
    handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(handler, SaveOnTermination):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
