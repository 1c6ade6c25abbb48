"""What `hf_checkpoints` relies on in transformers, and what it does in a run: staging, resuming, a full disk."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import resource
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers.trainer
from transformers import Trainer, TrainerState

from hf_objectives.errors import CheckpointError, ConfigError, DiskFullError
from hf_objectives.trainers import (
    PerplexityDistillationTrainer,
    PerplexityDPOTrainer,
    PerplexityTrainer,
    PPOTrainer,
    RewardModelTrainer,
)
from hf_objectives.trainers.checkpoints import fault_of
from hf_objectives.trainers.hf_checkpoints import WholeCheckpoints, no_space
from hf_objectives.trainers.hf_hub import HubPushes
from tests.support.language_models import trainer

MOVED = (
    f"transformers {version('transformers')} has changed: {{}}; hf_objectives/trainers/hf_checkpoints.py is written for "
    "transformers>=5.23,<6: install such a release, or adapt the file"
)
METHODS = {
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_init_training_state": [
        "self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_get_output_dir": ["self", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_load_best_model": ["self"],
}  # fmt: skip
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "learning_rate": 1e-2}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    method = getattr(Trainer, name, None)
    assert method is not None, MOVED.format(f"Trainer has no {name}")
    found = list(inspect.signature(method).parameters)
    assert found == METHODS[name], MOVED.format(f"Trainer.{name} takes {found}")


@pytest.mark.parametrize(
    "kind", [PerplexityTrainer, PerplexityDPOTrainer, RewardModelTrainer, PPOTrainer, PerplexityDistillationTrainer]
)
def test_every_trainer_saves_whole_checkpoints(kind):
    """The methods of the mixin stand before those of transformers and TRL."""
    for name in (*METHODS, "_run_epoch"):
        holder = next(part for part in kind.__mro__ if name in vars(part))
        assert holder is WholeCheckpoints, f"{kind.__name__}.{name} is that of {holder.__name__}"


def test_the_order_of_a_save():
    source = inspect.getsource(Trainer._save_checkpoint)
    steps = [
        "run_dir = self._get_output_dir(trial=trial)", "output_dir = os.path.join(run_dir, checkpoint_folder)",
        "self.state.best_model_checkpoint = best_checkpoint_dir", "self.state.save_to_json(",
        "self._push_from_checkpoint(output_dir)", "rotate_checkpoints(\n                output_dir=run_dir,",
    ]  # fmt: skip
    at = [source.find(step) for step in steps]
    assert at == sorted(at) and at[0] > 0, MOVED.format("its _save_checkpoint does other things, or in another order")
    epochs = inspect.getsource(Trainer._inner_training_loop)
    assert "self._run_epoch(" in epochs and "if self.control.should_training_stop:" in epochs, MOVED.format("its loop")


# -- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_that_another_run_deletes_while_it_is_read(tmp_path, monkeypatch):
    trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    read = TrainerState.load_from_json

    def read_once(path):
        state = read(path)
        Path(path).unlink()
        return state

    monkeypatch.setattr(TrainerState, "load_from_json", read_once)
    with pytest.raises(ConfigError, match="checkpoint-1 lost its trainer_state.json while it was read"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_a_checkpoint_with_the_trainers_state_is_whole(tmp_path, monkeypatch):
    run, there = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1), []
    save = TrainerState.save_to_json

    def saved(self, path):
        there.append((Path(path).parent / "extra").exists())
        save(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", saved)
    run.save_extra_state = lambda folder: (folder / "extra").touch()
    run.train()
    assert there == [True]


@pytest.mark.slow
def test_push_and_rotation_wait_for_the_name(tmp_path, monkeypatch):
    """And so does `on_save`; with `save_total_limit=1` there is never a moment without a whole checkpoint."""
    seen = []

    def whole() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("checkpoint-*") if fault_of(path) is None)

    save = TrainerState.save_to_json

    def saved(self, path):
        save(self, path)
        seen.append(("written", whole()))

    monkeypatch.setattr(TrainerState, "save_to_json", saved)
    monkeypatch.setattr(HubPushes, "_push_from_checkpoint", lambda self, path: seen.append((Path(path).name, whole())))
    run = trainer(tmp_path, **{**SAVING, "max_steps": 4}, save_total_limit=1)
    run.args.push_to_hub = True
    run.train()
    assert seen == [
        ("written", []), ("checkpoint-2", ["checkpoint-2"]),
        ("written", ["checkpoint-2"]), ("checkpoint-4", ["checkpoint-2", "checkpoint-4"]),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-4"]


@pytest.mark.slow
def test_the_best_checkpoint_is_named_by_its_final_path(tmp_path):
    run = trainer(
        tmp_path, **SAVING, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1
    )
    evaluate, values = run.evaluate, iter((3.0, 1.0, 2.0))  # the second is the best
    run.evaluate = lambda **options: {**evaluate(**options), "eval_loss": next(values)}
    run.train()
    best = tmp_path / "checkpoint-4"
    assert run.state.best_model_checkpoint == str(best) and [*tmp_path.glob("checkpoint-*")] == [best]
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert not [path for path in best.rglob("*.json") if "_tmp" in path.read_text()] and fault_of(best) is None


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10_000, 250_000], ids=["weights", "optimizer"])
def test_a_full_disk_ends_the_run_with_one_line(tmp_path, limit):
    """Files may not grow over a limit of the process: safetensors, then torch, fails as on a full disk."""
    run = trainer(tmp_path, **SAVING)
    save = run._save_checkpoint
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def saved(model, trial):
        if run.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        save(model, trial)

    run._save_checkpoint = saved
    try:
        with pytest.raises(DiskFullError) as caught:
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    words = str(caught.value)
    assert words.startswith(f"no space left to write checkpoint-4 in {tmp_path} (") and "\n" not in words
    assert "MiB are free); checkpoint-2 is kept. Make space there, or set another output_dir, and resume" in words
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"] and fault_of(
        tmp_path / "checkpoint-2"
    ) is None


@pytest.mark.slow
def test_other_errors_of_a_save_stay_as_they_are(tmp_path, monkeypatch):
    run = trainer(tmp_path, **{**SAVING, "save_steps": 1})
    run.save_extra_state = lambda folder: (folder / "extra").mkdir() or 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not [*tmp_path.iterdir()]
    run = trainer(tmp_path, **SAVING)
    monkeypatch.setattr(transformers.trainer.torch, "save", lambda *args, **options: fail(errno.ENOSPC))
    with pytest.raises(DiskFullError, match="No space left on device.*there is no checkpoint before it"):
        run.train()


def fail(number: int) -> None:
    raise OSError(number, "No space left on device")


def test_which_errors_say_that_the_disk_is_full(tmp_path):
    def chained(inner: BaseException) -> BaseException:
        try:
            try:
                raise inner
            except type(inner):
                raise ValueError("outer")  # noqa: B904
        except ValueError as error:
            return error

    full = OSError(errno.ENOSPC, "No space left on device")
    assert no_space(chained(full)) == no_space(full) == "[Errno 28] No space left on device"
    assert no_space(OSError(errno.EDQUOT, "quota")) and no_space(OSError(errno.EACCES, "denied")) is None
    assert no_space(RuntimeError("out of memory")) is None
    of_ranks = torch.distributed.checkpoint.api.CheckpointException("failed", {1: (full, None)})
    assert no_space(of_ranks) == "[Errno 28] No space left on device"


# -- going on ----------------------------------------------------------------------------------------------------


def losses(run) -> list[tuple[int, float]]:
    return [(log["step"], log["loss"]) for log in run.state.log_history if "loss" in log]


@pytest.mark.slow
def test_true_takes_the_newest_whole_one(tmp_path, caplog):
    """A state of the optimizer that is missing or cut, which the Trainer passes over in silence or dies of."""
    whole = trainer(tmp_path, **SAVING)
    whole.train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    torch.manual_seed(5)
    resumed = trainer(tmp_path, **SAVING)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 (model.safetensors has 4 bytes" in caplog.text
    assert "checkpoint-4 (optimizer.pt is missing)" in caplog.text
    assert losses(resumed) == losses(whole)
    assert all(fault_of(tmp_path / f"checkpoint-{step}") is None for step in (2, 4, 6))
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-4 is no checkpoint to resume from: scheduler.pt is missing"):
        trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.slow
def test_checkpoints_without_a_manifest_still_resume(tmp_path):
    whole = trainer(tmp_path, **SAVING)
    whole.train()
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    resumed = trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_weights_alone(tmp_path, caplog):
    """What the words say: the step goes on, and the schedule begins anew, here with its warm-up to 1e-2 over 2 steps."""
    options = {**SAVING, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup"}
    trainer(tmp_path, **{**options, "max_steps": 4}, save_only_model=True).train()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 \(it has no optimizer and no scheduler and no random states"
    ):
        trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    run = trainer(tmp_path, **options, resume_incomplete=True)
    run.train(resume_from_checkpoint=True)
    assert "begin optimizer, learning-rate schedule and random states anew" in caplog.text
    rates = [(log["step"], log["learning_rate"]) for log in run.state.log_history if "loss" in log]
    assert rates[-2:] == [(5, 0.0), (6, pytest.approx(5e-3))]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 1}], ids=["within", "epoch"])
def test_a_finished_run_takes_no_step(tmp_path, caplog, steps):
    """It says so, and evaluates the weights of the checkpoint."""
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 6,
        **steps,
    }
    run = trainer(tmp_path, **options)
    run.train()
    last = run.state.global_step
    assert last == 4 and run.evaluate()["eval_loss"] != trainer(tmp_path).evaluate()["eval_loss"]
    again = trainer(tmp_path, **options, eval_strategy="epoch")
    with caplog.at_level(logging.WARNING):
        outcome = again.train(resume_from_checkpoint=True)
    assert outcome.global_step == again.state.global_step == 4
    assert "checkpoint-4 is of step 4 of 4: the run is finished, and no step is taken" in caplog.text
    for name, value in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert again.state.log_history[-1]["eval_loss"] == run.evaluate()["eval_loss"]
    # With more to do it goes on.
    more = trainer(tmp_path, **{**options, "max_steps": 5})
    assert more.train(resume_from_checkpoint=True).global_step == 5
