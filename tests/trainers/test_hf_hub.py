"""What `hf_hub` relies on in transformers, and what a Trainer leaves on disk and on the Hub."""

from __future__ import annotations

import inspect
import logging
import time
from importlib.metadata import version

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import PushInProgress

from hf_objectives.errors import PushError
from hf_objectives.trainers import PerplexityDPOTrainer, PerplexityTrainer, PPOTrainer, RewardModelTrainer
from hf_objectives.trainers.hf_hub import HubPushes
from tests.support.hub_server import TOKEN
from tests.support.language_models import trainer

MOVED = (
    f"transformers {version('transformers')} has changed: {{}}; hf_objectives/trainers/hf_hub.py is written for "
    "transformers>=5.23,<6: install such a release, or adapt the file"
)
METHODS = {
    "_save": ["self", "output_dir", "state_dict"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "init_hf_repo": ["self", "token", "private"],
    "push_to_hub": ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
    "_finish_current_push": ["self"],
}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "push_to_hub": True, "hub_token": TOKEN}


def in_the_end(holds):
    """Whether something holds soon: the thread that pushes ends after those who wait for it have gone on."""
    until = time.monotonic() + 30
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters) if hasattr(Trainer, name) else None
    assert found == METHODS[name], MOVED.format(f"Trainer.{name} takes {found}")


def test_the_token_is_pickled_in_these_places_alone():
    """A new place would write it again."""
    source = inspect.getsource(inspect.getmodule(Trainer))
    assert source.count("torch.save(self.args") == 2, MOVED.format("it saves its arguments elsewhere")
    assert "self.hub_model_id = None" in source and callable(PushInProgress([]).is_done), MOVED.format("PushInProgress")


@pytest.mark.parametrize("kind", [PerplexityTrainer, PerplexityDPOTrainer, RewardModelTrainer, PPOTrainer])
def test_the_methods_of_the_mixin_stand_before_those_of_the_libraries(kind):
    classes = kind.__mro__
    others = [
        cls for cls in classes if cls.__module__.startswith(("transformers.", "trl.")) and {*METHODS} & {*vars(cls)}
    ]
    assert Trainer in others and all(classes.index(HubPushes) < classes.index(cls) for cls in others)


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_pushes_along_the_way(hub, tmp_path, strategy, folders):
    made = trainer(tmp_path / "mine", hub_strategy=strategy, hub_always_push=True, hub_private_repo=True, **SAVING)
    (tmp_path / "mine" / "notes.txt").write_text("marked text")
    made.train()
    made._finish_current_push()
    files = hub.repos["me/mine"].files["main"]
    own = {name for name in files if "/" not in name}
    assert own >= MODEL if strategy != "end" else not files
    assert {name.split("/")[0] for name in files if "/" in name} == folders and hub.repos["me/mine"].private
    for folder in folders:  # what a resume needs
        kept = {name.split("/")[1] for name in files if name.startswith(folder)}
        assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors"} <= kept
    assert not [name for name in files if name.endswith(("training_args.bin", "notes.txt"))]
    sent = b"".join(hub.bodies)
    assert TOKEN.encode() not in sent and b"marked text" not in sent
    assert in_the_end(lambda: not (tmp_path / "mine" / "_push").exists())


def test_of_a_checkpoint_what_its_manifest_lists_is_pushed_of_all_ranks_and_nothing_else(hub, tmp_path):
    """States of other ranks are not this rank's to name; what a callback adds later is none of a resume's."""

    class Adds(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (tmp_path / "mine" / f"checkpoint-{state.global_step}" / "rows.jsonl").write_text("marked text")

    made = trainer(tmp_path / "mine", hub_strategy="all_checkpoints", hub_always_push=True, **SAVING)
    made.add_callback(Adds())
    save = made.save_extra_state
    made.save_extra_state = lambda folder: (
        [(folder / f"own_state_{rank}.pt").touch() for rank in (0, 1)] and save(folder)
    )
    made.train()
    made._finish_current_push()
    names = {name.split("/")[1] for name in hub.repos["me/mine"].files["main"] if name.startswith("checkpoint-4/")}
    assert {"own_state_0.pt", "own_state_1.pt", "optimizer.pt", "manifest.json"} <= names and "rows.jsonl" not in names
    assert b"marked text" not in b"".join(hub.bodies)


def test_pushes_along_the_way_go_to_the_branch_that_is_asked_for(hub, tmp_path):
    made = trainer(tmp_path / "mine", hub_revision="v2", **SAVING)
    made.train()
    made._finish_current_push()
    assert "model.safetensors" in hub.repos["me/mine"].files["v2"] and not hub.repos["me/mine"].files["main"]


def test_a_push_that_finds_no_space_for_its_copies_is_told(hub, tmp_path, monkeypatch, caplog):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_objectives.trainers.hf_hub.os.link", full)
    monkeypatch.setattr("hf_objectives.trainers.hf_hub.shutil.copyfile", full)
    made = trainer(tmp_path / "mine", **SAVING)
    made.train()
    assert made.state.global_step == 4 and "checkpoint-2 is not on the Hub (OSError" in caplog.text


def test_the_token_is_in_no_file(hub, tmp_path):
    made = trainer(tmp_path / "mine", hub_strategy="end", **SAVING)
    made.train()
    made.save_model()
    files = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert {"training_args.bin", "optimizer.pt"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert made.args.hub_token == TOKEN
    assert torch.load(tmp_path / "mine" / "training_args.bin", weights_only=False).hub_token is None


def test_a_pushed_checkpoint_is_gone_on_from(hub, tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="no", max_steps=4, push_to_hub=False)
    whole.train()
    made = trainer(tmp_path / "mine", hub_strategy="checkpoint", **{**SAVING, "max_steps": 2})
    made.args.max_steps = 2
    made.train()
    made._finish_current_push()
    pulled = tmp_path / "pulled" / "checkpoint-2"
    pulled.mkdir(parents=True)
    for name, data in hub.repos["me/mine"].files["main"].items():
        if name.startswith("last-checkpoint/"):
            (pulled / name.split("/", 1)[1]).write_bytes(data)
    again = trainer(tmp_path / "again", save_strategy="no", max_steps=4, push_to_hub=False)
    again.train(resume_from_checkpoint=str(pulled))
    assert again.state.global_step == 4


def test_a_push_along_the_way_that_fails_is_told_and_the_run_goes_on(hub, tmp_path, caplog):
    made = trainer(tmp_path / "mine", **SAVING)
    hub.fail = ("/commit/", 500)
    with caplog.at_level(logging.WARNING):
        made.train()
        made._finish_current_push()
        assert in_the_end(lambda: "checkpoint-2 is not on the Hub (HfHubHTTPError" in caplog.text)
    assert made.state.global_step == 4
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    ("given", "fail", "words"),
    [
        ({"hub_model_id": "me/mi ne"}, None, "no repository 'me/mi ne' to push to"),
        ({"hub_token": "hf_" + "B" * 34}, None, "401"),
        ({}, ("repos/create", 0), "no repository 'mine' to push to"),
    ],
)
def test_a_repository_that_cannot_be_is_refused_before_training(hub, tmp_path, given, fail, words):
    hub.fail = fail
    with pytest.raises(PushError, match=words):
        trainer(tmp_path / "mine", **{**SAVING, **given})


def test_push_to_hub_of_a_trainer_uploads_the_model_and_its_card(hub, tmp_path):
    made = trainer(tmp_path / "mine", save_strategy="no", max_steps=1, hub_token=TOKEN)
    made.train()
    (tmp_path / "mine" / "data.jsonl").write_text("marked text")
    (tmp_path / "mine" / "README.md").write_text("---\ntags: [old]\n---\nof an earlier run")
    made.push_to_hub(tags=["mine"])
    files = hub.repos["me/mine"].files["main"]
    assert {*files} >= MODEL | {"README.md"}
    assert b"- mine" in files["README.md"] and b"of an earlier run" not in files["README.md"]
    assert b"marked text" not in b"".join(hub.bodies)
