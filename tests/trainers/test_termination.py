"""SIGTERM ends a run with a checkpoint that it goes on from, on all ranks, and with an exit code of its own."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from hf_objectives.trainers.termination import RunTerminated, SaveOnTermination
from tests.support.language_models import llama, trainer
from tests.support.terminations import Terminate


@pytest.fixture(autouse=True)
def no_handler():
    """What runs before in this process may have left one: Ray's ends the process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def make(folder, terminate_in=None, **options):
    run = trainer(folder, model=llama(attention_dropout=0.1), max_steps=6, learning_rate=1e-2, **options)
    if terminate_in is not None:
        run.add_callback(Terminate(terminate_in))
    return run


def losses(run):
    return [log["loss"] for log in run.state.log_history if "loss" in log]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"save_strategy": "no"}, {"enable_jit_checkpoint": True}, {"eval_strategy": "steps", "eval_steps": 1}],
)
def test_a_run_that_is_terminated_goes_on_as_if_it_had_not_been(options, tmp_path, caplog):
    whole = make(tmp_path / "whole")
    whole.train()
    run = make(tmp_path / "run", 4, **options)
    with pytest.raises(RunTerminated) as ended:
        run.train()
    assert ended.value.code == 75 and issubclass(RunTerminated, SystemExit)
    assert "SIGTERM: saving checkpoint-4, then ending" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # later ones end the program, as they do
    assert run.state.global_step == 4 and (tmp_path / "run" / "checkpoint-4" / "manifest.json").exists()
    resumed = make(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


def test_one_that_comes_in_the_last_step_ends_nothing_early(tmp_path):
    run = make(tmp_path, 6)
    run.train()
    assert run.state.global_step == 6 and (tmp_path / "checkpoint-6").exists()


def test_a_second_one_ends_the_process_at_once(tmp_path):
    def twice():
        with SaveOnTermination():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=twice)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


def test_workers_that_were_forked_can_be_ended():
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def work():
        begun.set()
        time.sleep(60)

    with SaveOnTermination():
        worker = context.Process(target=work)
        worker.start()
        begun.wait(30)
        worker.terminate()
        worker.join(30)
    assert worker.exitcode == -signal.SIGTERM


def test_a_handler_of_the_programs_own_stays():
    own = []
    signal.signal(signal.SIGTERM, lambda number, frame: own.append(number))
    try:
        with SaveOnTermination() as termination:
            os.kill(os.getpid(), signal.SIGTERM)
        control = SimpleNamespace(should_save=False)
        termination.on_step_end(None, SimpleNamespace(), control)
        assert own == [signal.SIGTERM] and not control.should_save
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_thread_that_can_set_no_handler_trains():
    raised = []

    def enter():
        try:
            with SaveOnTermination():
                pass
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(30)
    assert not raised and not thread.is_alive()


def test_transformers_own_handler_is_where_it_was():
    assert "_original_sigterm_handler" in vars(CheckpointManager(None)), "transformers' CheckpointManager has changed"
    assert "jit_manager" in inspect.getsource(JITCheckpointCallback.set_trainer), "JITCheckpointCallback has changed"
