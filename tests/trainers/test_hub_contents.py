"""What of a folder goes to the Hub."""

from __future__ import annotations

from hf_objectives.trainers.hub_contents import MODEL_FILES, checkpoint_files, listed_files, model_files


def test_files_are_taken_by_name(tmp_path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model.bin",
        "a/model.safetensors",
        "additional_chat_templates/x.jinja",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert model_files(tmp_path) == ["additional_chat_templates/x.jinja", "model-00001-of-00002.safetensors"]


def test_a_link_is_left_out(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "config.json").symlink_to(tmp_path / "secret")
    assert listed_files(tmp_path, MODEL_FILES) == []


def test_nothing_that_is_pickled_is_among_what_a_model_is_made_of():
    assert not [name for name in MODEL_FILES if name.endswith((".bin", ".pt", ".pth"))]


def test_a_checkpoint_is_what_its_manifest_lists(tmp_path):
    (tmp_path / "manifest.json").write_text('{"files": {"optimizer.pt": {}, "a/b.pt": {}}}')
    (tmp_path / "other").touch()
    assert checkpoint_files(tmp_path) == ["a/b.pt", "manifest.json", "optimizer.pt"]
