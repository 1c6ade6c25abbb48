"""What is written about a batch, against losses that the model itself computes."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_objectives import demo
from hf_objectives.diagnostics.batch_record import (
    describe_examples,
    describes,
    excerpt,
    marked_text,
    random_state,
    read_event,
    restored_random_state,
    with_labels,
    write_event,
)
from hf_objectives.errors import FileFormatError

EVENT = {"step": 1, "kind": "spike", "loss": 2.0, "level": 1.0, "grad_norm": None, "weights": None, "examples": []}


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


def test_an_excerpt_shows_where_training_begins():
    assert excerpt("a system prompt ⟦the answer⟧", 100) == "a system prompt ⟦the answer⟧"
    assert excerpt("p" * 50 + "⟦the answer⟧" + "q" * 50, 20) == "…ppppp⟦the answer⟧qqq…"
    assert excerpt("x" * 30, 10) == "xxxxxxxxxx…"


def test_events_are_written_and_read(tmp_path, tokenizer):
    state = random_state()
    drawn = random.random(), float(np.random.rand()), float(torch.rand(1))
    write_event(tmp_path / "step_1_rank_0", {**EVENT, "loss": float("nan")}, [batch(tokenizer)], state)
    event, (whole,), kept = read_event(tmp_path / "step_1_rank_0")
    assert event["step"] == 1 and torch.equal(whole["input_ids"], batch(tokenizer)["input_ids"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with restored_random_state(kept):
        assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == drawn
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generators are as they were


def test_a_folder_without_an_event_says_what_is_expected(tmp_path):
    with pytest.raises(FileFormatError, match="holds no event.json; expected a folder that DiagnosticsCallback wrote"):
        read_event(tmp_path)
    (tmp_path / "event.json").write_text("{")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_event(tmp_path)


def test_what_no_reader_takes_is_left_out_and_named(tmp_path, tokenizer):
    """A numpy array, a path, an object: torch would write them, and refuse to read them without running code of the file."""
    whole = {
        **batch(tokenizer),
        "lengths": np.array([3, 4]),
        "path": tmp_path,
        "odd": object(),
        "names": ["a", ["b", 1]],
    }
    wide = torch.zeros(1_000_000)
    whole["view"] = wide[:2]
    write_event(tmp_path / "e", EVENT, [whole], random_state())
    event, (read,), _ = read_event(tmp_path / "e")
    assert event["left_out"] == ["odd", "path"]
    assert read["lengths"].tolist() == [3, 4] and read["names"] == ["a", ["b", 1]] and read["view"].tolist() == [0, 0]
    assert (tmp_path / "e" / "batches.pt").stat().st_size < 100_000  # not all that the view is a part of


def test_event_json_is_json_for_every_reader(tmp_path, tokenizer):
    examples = [{"loss": float("inf"), "tokens": 3, "deviations": float("inf")}]
    write_event(
        tmp_path / "e", {**EVENT, "loss": float("nan"), "examples": examples}, [batch(tokenizer)], random_state()
    )

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / "e" / "event.json").read_text(), parse_constant=refuse)
    event, _, _ = read_event(tmp_path / "e")
    assert math.isnan(event["loss"]) and event["examples"][0]["loss"] == math.inf


@pytest.mark.parametrize("damage", ["empty batches", "no keys", "a list", "an object in it"])
def test_a_damaged_event_is_named(damage, tmp_path, tokenizer):
    folder = tmp_path / "e"
    write_event(folder, EVENT, [batch(tokenizer)], random_state())
    if damage == "empty batches":
        (folder / "batches.pt").write_bytes(b"")
    elif damage == "an object in it":
        torch.save([{"path": tmp_path}], folder / "batches.pt")
    else:
        (folder / "event.json").write_text({"no keys": "{}", "a list": "[]"}[damage])
    with pytest.raises(FileFormatError, match=str(folder)) as raised:
        read_event(folder)
    assert "weights_only" not in str(raised.value)


def test_rows_and_sources_that_are_one_a_row(model, tokenizer):
    """As the collator of pairs has it: the two answers of a pair share its row."""
    texts = ("Monday comes before Tuesday.", "One and one is two.") * 2
    whole = {**batch(tokenizer, texts), "row_ids": torch.tensor([5, 8])}
    whole |= {"source_ids": torch.tensor([1, 0]), "source_names": ["a", "b"]}
    described = describe_examples(model, whole, tokenizer)
    assert [(one["source"], one["row"]) for one in described] == [("b", 5), ("a", 8)] * 2
    whole["row_ids"] = torch.tensor([-1, 8])  # a row without a number among others
    assert [one["row"] for one in describe_examples(model, whole, tokenizer)] == [None, 8] * 2


def test_a_row_of_which_nothing_is_trained_is_told(model, tokenizer):
    whole = batch(tokenizer)
    whole["labels"][1] = -100
    first, second = describe_examples(model, whole, tokenizer)
    assert first["tokens"] > 0 and (second["tokens"], second["loss"]) == (0, None) and "One and one" in second["text"]


def test_the_beginning_of_a_row_that_goes_on_with_a_document_is_told(model, tokenizer):
    whole = batch(tokenizer, ("Monday comes before Tuesday.",), masked=0)
    length = whole["input_ids"].shape[1]
    for places in (torch.arange(5, 5 + length)[None], torch.tensor([[*range(5, 9), *range(length - 4)]])):
        described = describe_examples(model, {**whole, "position_ids": places}, tokenizer)
        assert sum(one["tokens"] for one in described) == length - 1
        assert len(described) == 1 + int((places == 0).any())


def test_models_whose_documents_cannot_be_told(model, tokenizer):
    tiny = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    seq2seq = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert describes(model) and not describes(BertForMaskedLM(BertConfig(**tiny)))
    assert not describes(T5ForConditionalGeneration(seq2seq)) and not describes(torch.nn.Linear(2, 2))
    assert not describes(LlamaForSequenceClassification(LlamaConfig(**tiny)))
    prompted = get_peft_model(
        demo.build_model(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    assert not describes(prompted)
    assert describes(get_peft_model(demo.build_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", r=2)))
    classes = {**batch(tokenizer), "labels": torch.tensor([0, 1])}
    assert describe_examples(model, classes, tokenizer) == []
