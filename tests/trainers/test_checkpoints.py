"""Which checkpoint is whole, how it comes to its name, and which one is gone on from; on folders made by hand."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_objectives.errors import CheckpointError
from hf_objectives.trainers import checkpoints, find_checkpoint
from hf_objectives.trainers.checkpoints import clear_staging, fault_of, lacks, publish, rotate, staging_folder

ALONE = {"saves": True, "together": True}


def written(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """A checkpoint as the Trainer writes it, small."""
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"name": name, "values": torch.arange(300.0)}, folder / name)
    save_file({"weight": torch.arange(200.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    for name in without:
        (folder / name).unlink()
    return folder


def published(run: Path, step: int, **options) -> Path:
    publish(written(staging_folder(run, step), **options), run, **ALONE)
    return run / f"checkpoint-{step}"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-70])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(torch.tensor(150.0).numpy().tobytes())  # among the values, not in a header
    data[place] ^= 1
    path.write_bytes(data)


def test_a_published_checkpoint(tmp_path):
    """The sum of "123456789" is the check value of CRC-32 in the literature."""
    staged = written(staging_folder(tmp_path, 7))
    assert staged == tmp_path / "_tmp-checkpoint-7" / "checkpoint-7"
    assert fault_of(staged) == "it was being written when its run ended"
    (staged / "pytorch_model_fsdp_0").mkdir()
    (staged / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"123456789")
    publish(staged, tmp_path, **ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    manifest = json.loads((tmp_path / "checkpoint-7" / "manifest.json").read_text())
    assert manifest["files"]["pytorch_model_fsdp_0/.metadata"] == {"size": 9, "crc32": "cbf43926"}
    assert manifest["files"].keys() == {
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"),
        *("trainer_state.json", "pytorch_model_fsdp_0/.metadata"),
    }
    assert manifest["processes"] == 1 and fault_of(tmp_path / "checkpoint-7") is None


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    staged, calls = written(staging_folder(tmp_path, 3)), []
    (staged / "folder").mkdir()
    (staged / "folder" / "part").touch()
    sync, rename = os.fsync, Path.rename

    def synced(descriptor):
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    def renamed(path, target):
        calls.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    everything = {staged, *staged.rglob("*"), staged / "manifest.json"}
    publish(staged, tmp_path, **ALONE)
    at = calls.index("renamed")
    assert {*calls[:at]} == everything and calls[at:] == ["renamed", tmp_path]


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path):
    published(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "old").touch()
    published(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "old").exists() and fault_of(tmp_path / "checkpoint-4") is None


def test_a_checkpoint_that_was_to_be_replaced_comes_back(tmp_path, monkeypatch):
    published(tmp_path, 4)
    staged, rename = written(staging_folder(tmp_path, 4)), Path.rename

    def renamed(path, target):
        if path == staged:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(KeyboardInterrupt):
        publish(staged, tmp_path, **ALONE)
    assert fault_of(tmp_path / "checkpoint-4") is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: cut(folder / "scheduler.pt"), r"scheduler.pt has \d+ bytes; manifest.json says \d+"),
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors was changed: its CRC-32 is [0-9a-f]{8}"),
        (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt was changed"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json was changed"),
        (lambda folder: cut(folder / "manifest.json"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"config.json": 3}}'), "manifest.json is damaged"),
    ],
)  # fmt: skip
def test_damage_under_a_manifest(tmp_path, damage, words):
    folder = published(tmp_path, 2)
    (folder / "notes.txt").write_text("somebody's own file is no damage")
    assert fault_of(folder) is None
    damage(folder)
    with pytest.raises(CheckpointError, match=f"checkpoint-2 is no checkpoint to resume from: {words}"):
        find_checkpoint(str(folder), tmp_path)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "it has no trainer_state.json, which is written last"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no weights"),
        (sharded, "model-1.safetensors is missing, which model.safetensors.index.json names"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors cannot be read"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt cannot be read"),
        (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt cannot be read"),
        (lambda folder: (folder / "scheduler.pt").write_bytes(b""), "scheduler.pt cannot be read"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "it has no optimizer. A resume would take its weights and"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "it has no scheduler. A resume would"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "it has no random states. A resume .* resume_incomplete=True"),
    ],
)  # fmt: skip
def test_damage_without_a_manifest(tmp_path, damage, words):
    """Checkpoints that were made before, or by others."""
    folder = written(tmp_path / "checkpoint-2")
    assert find_checkpoint(True, tmp_path) == str(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=f"checkpoint-2 is no checkpoint to resume from: {words}"):
        find_checkpoint(folder, tmp_path)


def test_layouts_of_other_savers_are_whole(tmp_path):
    """Adapters, shards of FSDP2 and of DeepSpeed."""
    adapter = written(tmp_path / "a", without=("model.safetensors",))
    save_file({"lora": torch.ones(3)}, adapter / "adapter_model.safetensors")
    fsdp = written(tmp_path / "b", without=("model.safetensors", "optimizer.pt"))
    deepspeed = written(tmp_path / "c", without=("model.safetensors", "optimizer.pt", "scheduler.pt"))
    (deepspeed / "latest").write_text("global_step2")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / name).mkdir()
    assert fault_of(deepspeed) == "it has no weights"
    (deepspeed / "global_step2").mkdir()
    assert [fault_of(folder) for folder in (adapter, fsdp, deepspeed)] == [None] * 3


def test_the_newest_whole_one_is_taken_and_the_others_are_named_once(tmp_path, caplog):
    for step in (2, 4, 10, 12, 14):
        published(tmp_path, step)
    for step, name in ((10, "optimizer.pt"), (14, "rng_state.pth")):
        (tmp_path / f"checkpoint-{step}" / name).unlink()
    written(staging_folder(tmp_path, 16))
    (tmp_path / "checkpoint-best").mkdir()
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(True, tmp_path, stranger=lambda folder: "left" if folder.name[-2:] == "12" else None)
    assert found == str(tmp_path / "checkpoint-4")
    assert [record.getMessage() for record in caplog.records] == [
        f"resuming from {tmp_path / 'checkpoint-4'}; passed over: checkpoint-14 (rng_state.pth is missing); checkpoint-12 "
        "(left); checkpoint-10 (optimizer.pt is missing)"
    ]
    caplog.clear()
    assert find_checkpoint(str(tmp_path / "checkpoint-2"), tmp_path) == str(tmp_path / "checkpoint-2")
    assert not caplog.records
    # What was found whole is not read again, and none is no checkpoint.
    (tmp_path / "checkpoint-4" / "config.json").unlink()
    assert find_checkpoint(found, tmp_path) is found
    assert find_checkpoint(None, tmp_path) is find_checkpoint(False, tmp_path) is None


def test_no_whole_one(tmp_path):
    with pytest.raises(CheckpointError, match=f"^no checkpoint to resume from in {tmp_path / 'none'}$"):
        find_checkpoint(True, tmp_path / "none")
    (published(tmp_path, 2) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"in .*: checkpoint-2 \(config.json is missing\)$"):
        find_checkpoint(True, tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint-9 is no checkpoint to resume from: no such folder"):
        find_checkpoint(str(tmp_path / "checkpoint-9"), tmp_path)


def test_weights_alone_are_taken_when_asked_for(tmp_path, caplog):
    names = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    published(tmp_path, 1)
    folder = published(tmp_path, 2, without=names)
    assert lacks(folder) == ["optimizer", "scheduler", "random states"]
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-1")
    caplog.clear()
    assert find_checkpoint(True, tmp_path, incomplete=True) == str(folder)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"resuming from {folder}; it has no optimizer and no scheduler and no random states. The resume will take its "
        "weights and its step, and begin optimizer, learning-rate schedule and random states anew"
    )


def test_files_of_a_trainer_and_of_another_number_of_processes(tmp_path, caplog):
    old = written(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="checkpoint-1 is no .*: critic.pt is missing"):
        find_checkpoint(str(old), tmp_path, own_files=["config.json", "critic.pt"])
    # Under a manifest it is the trainer that says which kind of run made the checkpoint.
    assert find_checkpoint(published(tmp_path, 2), tmp_path, own_files=["critic.pt"])
    (old / "rng_state.pth").rename(old / "rng_state_0.pth")
    assert find_checkpoint(old, tmp_path) and "it has no rng_state.pth: other processes" in caplog.text


def test_a_checkpoint_that_only_lacked_its_name_gets_it(tmp_path, monkeypatch):
    published(tmp_path, 2)
    staged = written(staging_folder(tmp_path, 4))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, target: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish(staged, tmp_path, **ALONE)
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-4")
    # A damaged one does not, nor does it take the place of one that is there.
    for step in (4, 6):
        (written(staging_folder(tmp_path, step)) / "manifest.json").write_text("{")
    assert find_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-4")
    clear_staging(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def aged(run: Path, *steps: int) -> list[Path]:
    """Checkpoints, the oldest first, seconds apart."""
    folders = [run / f"checkpoint-{step}" for step in steps]
    for age, folder in enumerate(folders):
        folder.mkdir()
        os.utime(folder, (age * 10, age * 10))
    return folders


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [6], [2, 4, 6, 8]), (0, [6], [2, 4, 6, 8]), (4, [6], [2, 4, 6, 8]), (2, [6], [4, 6]), (1, [6], [6]),
        (1, [6, 2], [2, 6]), (2, [6, 8], [6, 8]), (3, [6, 8], [4, 6, 8]),
    ],
)  # fmt: skip
def test_rotation_removes_the_oldest_and_never_what_is_kept(tmp_path, limit, keep, left):
    """Step 8 is left from before a resume at step 2: older than 4 and 6, and maybe not whole."""
    aged(tmp_path, 8, 2, 4, 6)
    rotate(tmp_path, limit, [tmp_path / f"checkpoint-{step}" for step in keep])
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == left


def test_a_removal_that_is_killed_leaves_no_checkpoint(tmp_path, monkeypatch):
    old, new = aged(tmp_path, 2, 4)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *args, **options: None)
    rotate(tmp_path, 1, [new])
    assert new.exists() and not old.exists() and not [*tmp_path.glob("checkpoint-2*")]
    monkeypatch.undo()
    clear_staging(tmp_path)
    assert [*tmp_path.iterdir()] == [new]
