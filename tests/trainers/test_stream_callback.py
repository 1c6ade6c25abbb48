"""A mixture through a Trainer: its place in checkpoints, its shares in logs, in ours and in transformers' own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_objectives.errors import ConfigError
from hf_objectives.mixture.report import SourceReport
from hf_objectives.trainers import OrderedStreamCallback
from tests.support.language_models import llama, trainer
from tests.support.mixtures import mixture, taken


class Collate:
    """Padded batches of folded ids; remembers which rows they were."""

    def __init__(self):
        self.seen: list[tuple] = []

    def __call__(self, rows):
        self.seen += [(row["source"], row["n"]) for row in rows]
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), 1)
        labels = torch.full((len(rows), width), -100)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"] % 250 + 2)
            labels[i, : len(row["input_ids"])] = ids[i, : len(row["input_ids"])]
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 1).long()}


def ours(folder, made, collate, **options):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **options}
    return trainer(folder, model=llama(), rows=made, collator=collate, check_isolation=False, **options)


def plain(folder, made, collate, *, callback=True, **options):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **options}
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True,
        remove_unused_columns=False, **{"ignore_data_skip": True, **options},
    )  # fmt: skip
    return Trainer(llama(), args, collate, made, callbacks=[OrderedStreamCallback(made)] * callback)


@pytest.fixture(params=[ours, plain], ids=["ours", "transformers"])
def make(request):
    return request.param


@pytest.mark.slow
def test_rows_are_those_of_the_batch_size_that_fits(make, tmp_path):
    run = make(tmp_path, mixture(), Collate(), auto_find_batch_size=True, max_steps=2, gradient_accumulation_steps=1)
    step = run.training_step

    def fits_one_row(model, inputs, *given):
        if len(inputs["input_ids"]) > 1:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *given)

    run.training_step = fits_one_row
    run.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["train_stream"]["row"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
def test_a_resumed_run_sees_the_rows_that_it_would_have_seen(make, streams, tmp_path):
    runs = []
    for checkpoint in (None, 4):
        collate = Collate()
        run = make(tmp_path, mixture(streams=streams), collate)
        run.train(resume_from_checkpoint=checkpoint and str(tmp_path / f"checkpoint-{checkpoint}"))
        runs.append((run, collate.seen))
        state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["train_stream"]["row"] == 24
    (whole, rows), (resumed, rest) = runs
    assert rows[:24] == taken(mixture(streams=streams), 24) and rest[:8] == rows[16:24]
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run, _ in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    for run, _ in runs:  # of the same steps, also after a resume
        assert [log["epoch"] for log in run.state.log_history if "loss" in log] == [step / 6 for step in range(1, 7)]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_logs_and_checkpoints_say_what_each_source_has_given(make, tmp_path):
    run = make(tmp_path, mixture(), Collate())
    run.train()
    reference = mixture()
    for log in run.state.log_history:
        if "loss" in log:
            expected = reference.report(log["step"] * 4)
            assert [SourceReport(name, **figures_of(log, name)) for name in "abc"] == expected.sources
    kept = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"][
        "train_stream"
    ]
    assert kept["row"] == 24 and kept["order"]["given"]["tokens"] == [one.tokens for one in reference.report(24)]


def figures_of(log, name) -> dict:
    start = f"mixture/{name}/"
    return {key.removeprefix(start): value for key, value in log.items() if key.startswith(start)}


@pytest.mark.slow
def test_what_will_happen_is_said_before_the_first_step(make, tmp_path, caplog):
    make(tmp_path, mixture(), Collate(), max_steps=150, save_strategy="no").train()
    assert "source 'c' will be repeated" in caplog.text and "times in 600 rows" in caplog.text
    finite = mixture({"unit": "examples"}, max_epochs={"a": 1, "b": 1, "c": 1})
    run = make(tmp_path, finite, collate := Collate(), max_steps=19)
    with pytest.raises(
        ConfigError, match="every source with a weight reaches its max_epochs after 72 rows, and the run takes 76"
    ):
        run.train()
    assert not collate.seen or run.state.global_step == 0


@pytest.mark.slow
def test_a_checkpoint_of_another_mixture_is_refused(make, tmp_path):
    make(tmp_path, mixture(), Collate()).train()
    with pytest.raises(ConfigError, match="the state is of another mixture: unit: tokens there, examples here"):
        make(tmp_path, mixture({"unit": "examples"}), Collate()).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_a_trainer_that_would_skip_rows_as_well_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="ignore_data_skip is off"):
        plain(tmp_path, mixture(), Collate(), ignore_data_skip=False).train()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_without_the_callback_is_refused(tmp_path, workers):
    """It would train, save checkpoints without the place, and read the first rows again when it resumes."""
    plain(tmp_path, mixture(), Collate()).train()
    for checkpoint in (None, str(tmp_path / "checkpoint-4")):
        run = plain(tmp_path, mixture(), seen := Collate(), callback=False, dataloader_num_workers=workers)
        with pytest.raises(ConfigError, match="add OrderedStreamCallback.stream. to its callbacks"):
            run.train(resume_from_checkpoint=checkpoint)
        assert not seen.seen


def test_a_stream_without_an_end_is_no_evaluation_set(tmp_path):
    run = ours(tmp_path, mixture(), Collate())
    with pytest.raises(ConfigError, match="evaluation needs rows that end; a mixture's are in its eval_dataset"):
        run.evaluate(mixture())


def test_workers_behind_a_process_that_hands_out_batches_are_refused(tmp_path):
    made = mixture()
    callback = OrderedStreamCallback(made)
    told = {"dispatch_batches": None}
    args = SimpleNamespace(
        ignore_data_skip=True, world_size=2, dataloader_num_workers=2, accelerator_config=SimpleNamespace(**told)
    )
    with pytest.raises(ConfigError, match="set accelerator_config={'dispatch_batches': False}"):
        callback.on_train_begin(args, None, None)
