"""What is written about a batch, against losses that the model itself computes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_objectives import demo
from hf_objectives.diagnostics.batch_record import (
    describe_examples,
    marked_text,
    random_state,
    read_event,
    restore_random_state,
    with_labels,
    write_event,
)
from hf_objectives.errors import FileFormatError


@pytest.fixture(scope="module")
def tokenizer():
    return demo.build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return demo.build_model(tokenizer).eval()


def batch(tokenizer, texts=("Monday comes before Tuesday.", "One and one is two."), masked=3):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :masked] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_losses_are_those_of_the_model(model, tokenizer):
    whole = batch(tokenizer)
    described = describe_examples(model, whole, tokenizer)
    for i, one in enumerate(described):
        row = {key: value[i : i + 1] for key, value in whole.items()}
        with torch.no_grad():
            assert one["loss"] == pytest.approx(float(model(**row).loss), rel=1e-5)
        assert one["tokens"] == int((row["labels"][:, 1:] != -100).sum()) and one["batch_row"] == i
        assert (one["source"], one["row"]) == (None, None)
    assert described[1]["text"].count("⟦") == 1 and described[1]["text"].endswith("is two.⟧")


def test_packed_documents_are_told_apart(model, tokenizer):
    first, second = (tokenizer(text)["input_ids"] for text in ("Monday comes before Tuesday.", "One and one is two."))
    ids = torch.tensor([first + second])
    labels = ids.clone()
    labels[0, len(first)] = -100  # a document's first token is context
    riders = {
        "source_ids": torch.tensor([[0] * len(first) + [1] * len(second)]),
        "source_names": ["a", "b"],
        "row_ids": torch.tensor([[7] * len(first) + [9] * len(second)]),
    }
    places = torch.tensor([[*range(len(first)), *range(len(second))]])
    described = describe_examples(
        model, {"input_ids": ids, "labels": labels, "position_ids": places, **riders}, tokenizer
    )
    assert [(one["source"], one["row"]) for one in described] == [("a", 7), ("b", 9)]
    assert [one["tokens"] for one in described] == [len(first) - 1, len(second) - 1]


def test_a_mask_stands_for_labels_and_neither_gives_nothing(model, tokenizer):
    whole = batch(tokenizer)
    masked = {**whole, "completion_mask": (whole["labels"] != -100).long()}
    del masked["labels"]
    assert torch.equal(with_labels(masked)["labels"], whole["labels"]) and "completion_mask" not in with_labels(masked)
    del masked["completion_mask"]
    assert with_labels(masked) is None and describe_examples(model, masked, tokenizer) == []
    assert with_labels({"prompt": ["text"]}) is None


def test_marked_text_keeps_every_character(tokenizer):
    ids = tokenizer("Monday comes before Tuesday.")["input_ids"]
    labels = [-100, *ids[1:3], *([-100] * (len(ids) - 3))]
    text = marked_text(tokenizer, ids, labels)
    assert text.replace("⟦", "").replace("⟧", "") == tokenizer.decode(ids) and text.count("⟦") == 1
    assert f"⟦{tokenizer.decode(ids[1:3])}⟧" in text


def test_events_are_written_and_read(tmp_path, tokenizer):
    state = random_state()
    drawn = random.random(), float(np.random.rand()), float(torch.rand(1))
    write_event(tmp_path / "step_1_rank_0", {"step": 1, "loss": float("nan")}, [batch(tokenizer)], state)
    event, (whole,), kept = read_event(tmp_path / "step_1_rank_0")
    assert event["step"] == 1 and torch.equal(whole["input_ids"], batch(tokenizer)["input_ids"])
    restore_random_state(kept)
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == drawn


def test_a_folder_without_an_event_says_what_is_expected(tmp_path):
    with pytest.raises(FileFormatError, match="holds no event.json; expected a folder that DiagnosticsCallback wrote"):
        read_event(tmp_path)
    (tmp_path / "event.json").write_text("{")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_event(tmp_path)
