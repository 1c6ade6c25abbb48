"""A resumed run trains on the rows that an uninterrupted one would, or is refused: transformers skips rows by steps."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.trainers.checkpoints import StepRows, step_rows_of
from hf_objectives.trainers.hf_compat import StepWatch, watch_steps
from tests.support import dpo_worlds, reward_worlds
from tests.support.language_models import chats, trainer
from tests.support.ppo_worlds import ppo

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
EIGHT = {"per_device_train_batch_size": 8, **SAVING}  # 23 or 16 rows: three or two steps an epoch


def language_model(folder, **options):
    return trainer(folder, **options)


def preferences(folder, **options):
    rows = Dataset.from_list(demo.preferences(23))
    model = demo.build_model(dpo_worlds.TOKENIZER, hidden_size=16, num_layers=1)
    return dpo_worlds.ours(model, folder, rows=rows, trainer={"ref_model": copy.deepcopy(model)}, **options)


def reward_model(folder, **options):
    return reward_worlds.trainer(folder, train_sampling_strategy="random", eval_strategy="no", **options)


class Rows(StepWatch):
    """The rows of each step, whatever the order of its micro-batches."""

    def __init__(self, run):
        self.steps = []
        watch_steps(run, self)

    def step_ends(self, batches, grad_norm):
        rows = [row for inputs, _ in batches for row in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        self.steps.append(sorted(tuple(ids[mask == 1].tolist()) for ids, mask in rows))


def rows_of(run, checkpoint=None):
    seen = Rows(run)
    run.train(resume_from_checkpoint=checkpoint)
    return seen.steps


@pytest.mark.slow
@pytest.mark.parametrize("make", [language_model, preferences, reward_model])
def test_the_same_product_goes_on_with_the_same_rows(make, tmp_path):
    whole = rows_of(make(tmp_path, **EIGHT))
    checkpoint = str(tmp_path / "checkpoint-4")
    assert step_rows_of(Path(checkpoint)) == StepRows(8, 1, 1) and whole[4] != whole[5]
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        options = {**EIGHT, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert rows_of(make(tmp_path / "again", **options), checkpoint) == whole[4:]


@pytest.mark.slow
@pytest.mark.parametrize("make", [language_model, preferences, reward_model])
def test_another_product_within_an_epoch_is_refused(make, tmp_path):
    make(tmp_path, **EIGHT, gradient_accumulation_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    for batch, accumulation in ((6, 1), (8, 3)):
        options = {**EIGHT, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        told = (
            f"checkpoint-4 was trained with 8 x 1 x 1 = 8 rows a step, this run with {batch} x {accumulation} x 1 = "
            f"{batch * accumulation} rows a step .*or to a product of 8; or begin the epoch anew with ignore_data_skip=True"
        )
        if make is reward_model and accumulation == 3:  # an epoch of one step: four epochs are over
            continue
        with pytest.raises(ConfigError, match=told):
            make(tmp_path, **options).train(resume_from_checkpoint=checkpoint)
    run = make(tmp_path, **{**EIGHT, "per_device_train_batch_size": 6}, ignore_data_skip=True)
    assert run.train(resume_from_checkpoint=checkpoint).global_step == 6


@pytest.mark.slow
@pytest.mark.parametrize("make", [preferences, reward_model])
def test_tokens_are_counted_on(make, tmp_path):
    """TRL's count of tokens, also where the checkpoint is of a step between two logs."""
    options = {**EIGHT, "logging_steps": 3, "save_steps": 2}
    whole = make(tmp_path, **options)
    whole.train()
    again = make(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counts = [[log["num_tokens"] for log in run.state.log_history if "loss" in log] for run in (whole, again)]
    assert counts[0] == counts[1] and len(counts[0]) == 2 and 0 < counts[0][0] < counts[0][1]


@pytest.mark.slow
def test_an_epochs_end(tmp_path):
    """23 rows in batches of 4 are six steps, and in batches of 8 three: where steps are counted, both begin an epoch."""
    four = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, **four, max_steps=6).train()
    checkpoint, eight = str(tmp_path / "checkpoint-6"), {**four, "per_device_train_batch_size": 8}
    steps = rows_of(trainer(tmp_path / "again", **eight, max_steps=9), checkpoint)
    assert [len(step) for step in steps] == [8, 8, 7] and len({row for step in steps for row in step}) > 20
    # By epochs, six steps would be two of them, and the run would end after one where two are left.
    with pytest.raises(ConfigError, match="4 x 1 x 1 = 4 rows a step, this run with 8 x 1 x 1 = 8"):
        trainer(tmp_path, **eight, max_steps=-1, num_train_epochs=3).train(resume_from_checkpoint=checkpoint)
    # Three epochs of four steps: after six steps the second is half done.
    with pytest.raises(ConfigError, match="4 x 1 x 1 = 4 rows a step, this run with 6 x 1 x 1 = 6"):
        trainer(tmp_path, **{**four, "per_device_train_batch_size": 6}, max_steps=9).train(
            resume_from_checkpoint=checkpoint
        )


@pytest.mark.slow
def test_a_run_is_finished_by_its_own_count(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": -1, "num_train_epochs": 1}
    trainer(tmp_path, **options, per_device_train_batch_size=4).train()
    larger = {**options, "per_device_train_batch_size": 8}
    # Half of the epoch is left, but three steps of eight rows would be all.
    with pytest.raises(ConfigError, match="4 x 1 x 1 = 4 rows a step, this run with 8 x 1 x 1 = 8"):
        trainer(tmp_path, **larger).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    run = trainer(tmp_path, **larger)
    assert run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6")).global_step == 6
    assert rows_of(trainer(tmp_path, **larger), str(tmp_path / "checkpoint-6")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"dataloader_drop_last": True}, {"train_sampling_strategy": "group_by_length"}], ids=str
)
def test_orders_that_depend_on_the_split(changed, tmp_path):
    rows = Dataset.from_list([{**row, "length": len(str(row))} for row in chats()])
    whole = rows_of(trainer(tmp_path, rows=rows, **EIGHT, **changed))
    checkpoint = str(tmp_path / "checkpoint-4")
    assert len(rows_of(trainer(tmp_path / "again", rows=rows, **EIGHT, **changed), checkpoint)) == len(whole[4:]) == 2
    other = {**EIGHT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    if "dataloader_drop_last" in changed:  # 23 rows without 7 of them, or without one
        other["max_steps"] = 7
    with pytest.raises(ConfigError, match=r"8 x 1 x 1 = 8 rows a step, this run with 2 x 4 x 1 = 8.*as they were; or"):
        trainer(tmp_path, rows=rows, **other, **changed).train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
def test_answers_of_ppo_are_kept_by_batches(tmp_path):
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "rows": [{"prompt": f"ask {letter}"} for letter in "abcdeabc"],
    }
    ppo(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    with pytest.raises(ConfigError, match="4 x 1 x 1 = 4 rows a step, this run with 2 x 2 x 1 = 4.*as they were; or"):
        ppo(tmp_path, **options, **halves).train(resume_from_checkpoint=checkpoint)
    assert ppo(tmp_path, **options).train(resume_from_checkpoint=checkpoint).global_step == 2


@pytest.mark.slow
def test_a_checkpoint_without_a_manifest_is_known_by_its_state(tmp_path):
    whole = rows_of(trainer(tmp_path, **EIGHT))
    folder = tmp_path / "checkpoint-4"
    (folder / "manifest.json").unlink()
    assert rows_of(trainer(tmp_path / "again", **EIGHT), str(folder)) == whole[4:]
    words = "was trained with batches of 8 rows, and step 4 was at epoch 1.33333; this run takes {}"
    for changed, told in (
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, "4 x 2 x 1 = 8"),
        ({"gradient_accumulation_steps": 2}, "8 x 2 x 1 = 16"),
        ({"train": 40}, "8 x 1 x 1 = 8"),  # other rows
    ):
        changed = dict(changed)
        rows = chats(changed.pop("train", 23))
        with pytest.raises(ConfigError, match=re.escape(words.format(told))):
            trainer(tmp_path, rows=rows, **{**EIGHT, **changed}).train(resume_from_checkpoint=str(folder))


@pytest.mark.slow
def test_a_manifest_of_an_earlier_release_says_nothing_of_batches(tmp_path):
    whole = rows_of(trainer(tmp_path, **EIGHT))
    manifest = tmp_path / "checkpoint-4" / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert facts.pop("step_rows") == {"batch": 8, "accumulation": 1, "processes": 1}
    manifest.write_text(json.dumps(facts))
    assert rows_of(trainer(tmp_path / "again", **EIGHT), str(manifest.parent)) == whole[4:]


@pytest.mark.slow
def test_a_stream_without_a_length(tmp_path):
    """Its epoch is as long as the run, so that a longer run says nothing of other batches."""
    make = lambda **options: trainer(tmp_path, rows=IterableDataset.from_generator(chats), **{**EIGHT, **options})  # noqa: E731
    whole = rows_of(make(max_steps=2, save_steps=1))
    checkpoint = tmp_path / "checkpoint-1"
    assert rows_of(
        make(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2), str(checkpoint)
    ) == [whole[1]]
    with pytest.raises(ConfigError, match="8 x 1 x 1 = 8 rows a step, this run with 4 x 1 x 1 = 4"):
        make(per_device_train_batch_size=4, max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "manifest.json").unlink()
    assert make(max_steps=3).train(resume_from_checkpoint=str(checkpoint)).global_step == 3
