"""What a run writes for `verify`."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_objectives import demo
from hf_objectives.recipes.evaluated import checksums, read_evaluated, rows_checksum, write_evaluated


def test_round_trip(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    accelerator = SimpleNamespace(mixed_precision="bf16")
    trainer = SimpleNamespace(processing_class=demo.build_tokenizer(), eval_dataset=rows, accelerator=accelerator)
    write_evaluated(tmp_path, "sft", {"seed": 1}, trainer, {"eval_loss": 1.5, "eval_note": "x"})
    facts = read_evaluated(tmp_path)
    assert facts["figures"] == {"eval_loss": 1.5} and facts["settings"] == {"seed": 1}
    assert facts["weights"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()} == checksums(tmp_path)
    assert facts["mixed_precision"] == "bf16"
    assert facts["rows"] == rows_checksum(rows) != rows_checksum(Dataset.from_list([{"input_ids": [1], "labels": [1]}]))


def test_what_is_not_there_or_damaged(tmp_path):
    with pytest.raises(ValueError, match="has no evaluated.json"):
        read_evaluated(tmp_path)
    (tmp_path / "evaluated.json").write_text("[]")
    with pytest.raises(ValueError, match="is damaged; expected the keys recipe"):
        read_evaluated(tmp_path)
    assert rows_checksum(None) is None
