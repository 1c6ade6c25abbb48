"""A card that passes the Hub's own reader, and a push that fails without harm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console

from hf_objectives.publishing.hub import push, write_card

RESULTS = {
    "before": {"eval_perplexity": 10.0, "eval_num_tokens": 7},
    "after": {"eval_perplexity": 5.0, "eval_num_tokens": 7},
    "ledger": {"chats": {"rows_in": 3, "tokens_in": 30, "trained": 9, "dropped_tokens": {"too long": 4}}},
}
DATA = SimpleNamespace(max_length=128, packing=True, overlength="drop", train_on="assistant")
ARGS = SimpleNamespace(learning_rate=1e-4, per_device_train_batch_size=2, gradient_accumulation_steps=1, seed=42)


def card(folder, base_model):
    return ModelCard.load(write_card(folder, results=RESULTS, base_model=base_model, data=DATA, args=ARGS))


def test_card_holds_measured_facts_only(tmp_path):
    read = card(tmp_path, "org/base")
    assert read.data.base_model == "org/base" and read.data.license is None
    assert "| perplexity | 7 | 10 | 5 |" in read.text and "| chats | 3 | 30 | 9 | 4 |" in read.text


def test_a_card_is_utf_8_whatever_the_machine_writes(tmp_path, monkeypatch):
    usual, encodings = Path.write_text, []

    def write_text(path, text, encoding="cp1252", **options):
        encodings.append(encoding)
        return usual(path, text, encoding=encoding, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    (tmp_path / "模型").mkdir()
    assert "# 模型" in card(tmp_path / "模型", None).text and encodings == ["utf-8"]


def test_licence_is_read_from_the_base_and_a_local_base_is_not_called_a_hub_id(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    read = card(tmp_path, str(base))
    assert read.data.license == "mit" and read.data.base_model is None
    assert str(tmp_path) not in read.text


def test_what_was_trained_on_and_checkpoints_are_not_pushed(tmp_path, monkeypatch):
    for name in ("model.safetensors", "prepared/0a1b/ready.json", "prepared/0a1b/train/data.arrow",
                 "prepared/.lock", "checkpoint-3/model.safetensors"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    sent = []

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns):
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        sent.extend(filter_repo_objects(files, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(
        "hf_objectives.publishing.hub.HfApi.create_repo", lambda *_, **__: SimpleNamespace(repo_id="org/model")
    )
    monkeypatch.setattr("hf_objectives.publishing.hub.HfApi.upload_folder", upload_folder)
    assert push(tmp_path, "org/model", private=False, console=Console(quiet=True))
    assert sent == ["model.safetensors"]


def test_a_failing_push_leaves_the_run_and_says_how_to_try_again(tmp_path):
    console = Console(record=True, width=300)
    assert push(tmp_path, "org/model", private=False, console=console) is False  # tests are offline
    printed = console.export_text()
    assert "The push failed" in printed and f"hf upload org/model {tmp_path}" in printed
    assert "'prepared/*'" in printed
