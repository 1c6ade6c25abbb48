"""Counts of batches and texts, against one-document-at-a-time arithmetic in float64."""

from __future__ import annotations

import gc
import math
import tracemalloc

import numpy as np
import pytest
import torch
from tqdm.auto import tqdm

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, DataError, FormatError, NothingSupervisedError
from hf_objectives.evaluation.counts import TokenCount
from hf_objectives.evaluation.perplexity import EvaluationCounts, compute_perplexity, count_batch
from tests.support.chat_corpus import PLAIN
from tests.support.language_models import TOKENIZER, llama, nats_of

TEXTS = ["The quick brown fox jumps over the lazy dog.", "naïve 日本", "a", "", "To be, or not to be " * 4, "xy"]


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_texts_one_at_a_time(batch_tokens):
    model = llama()
    each = [nats_of(model, TOKENIZER(text)["input_ids"]) for text in TEXTS if len(text) > 1]
    result = compute_perplexity(model, TOKENIZER, TEXTS, batch_tokens=batch_tokens)
    assert result.nll == pytest.approx(sum(map(sum, each)), rel=1e-6)
    assert result.num_tokens == sum(map(len, each))
    assert result.perplexity == pytest.approx(math.exp(sum(map(sum, each)) / sum(map(len, each))), rel=1e-6)
    # One token per byte: all but the first byte of each text that has two.
    assert result.num_bytes == sum(len(text.encode()) - 1 for text in TEXTS if len(text) > 1)
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2) / result.num_bytes)


def test_cut_documents():
    model, text = llama(), TEXTS[4]
    ids = TOKENIZER(text)["input_ids"]
    result = compute_perplexity(model, TOKENIZER, [text], max_length=20)
    assert result.nll == pytest.approx(sum(nats_of(model, ids[:20])), rel=1e-6) and result.num_tokens == 19


@pytest.mark.parametrize(("max_length", "stride"), [(16, 5), (20, 19), (7, 1)])
def test_a_sliding_window_scores_each_token_once_with_full_context(max_length, stride):
    model, text = llama(), TEXTS[4]
    ids = TOKENIZER(text)["input_ids"]
    expected, at = nats_of(model, ids[:max_length]), max_length
    while at < len(ids):
        end = min(at + stride, len(ids))
        expected += nats_of(model, ids[end - max_length : end], scored=max_length - (end - at))
        at = end
    result = compute_perplexity(model, TOKENIZER, [text], max_length=max_length, stride=stride)
    assert result.num_tokens == len(ids) - 1 == len(expected)
    assert result.nll == pytest.approx(sum(expected), rel=1e-6)


def test_texts_that_are_read_in_parts_have_the_same_sums(monkeypatch):
    model = llama()
    whole = compute_perplexity(model, TOKENIZER, TEXTS, max_length=16, stride=5, batch_tokens=64)
    for name, size in (("_READ", 30), ("_BUFFERED", 25)):
        monkeypatch.setattr(f"hf_objectives.evaluation.perplexity.{name}", size)
    parts = compute_perplexity(model, TOKENIZER, iter(TEXTS), max_length=16, stride=5, batch_tokens=64)
    assert (parts.num_tokens, parts.num_bytes) == (whole.num_tokens, whole.num_bytes)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-7)


def test_memory_does_not_grow_with_the_number_of_texts(monkeypatch):
    for name in ("_READ", "_BUFFERED"):
        monkeypatch.setattr(f"hf_objectives.evaluation.perplexity.{name}", 40_000)
    monkeypatch.setattr(
        "hf_objectives.evaluation.perplexity.count_batch", lambda *_, **__: EvaluationCounts(TokenCount(1.0, 1, 1))
    )
    model, peaks = llama(), []
    for count in (200, 200, 2000):  # the first warms up
        gc.collect()  # what earlier tests left is not of this one
        tracemalloc.start()
        compute_perplexity(model, TOKENIZER, (f"{i} is a text, " * 40 for i in range(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


def test_groups_add_up():
    rows = [{"text": text, "kind": "long" if len(text) > 20 else "short"} for text in TEXTS]
    result = compute_perplexity(llama(), TOKENIZER, rows, group_by="kind")
    assert set(result.groups) == {"long", "short"}
    assert sum(group.nll for group in result.groups.values()) == pytest.approx(result.nll)
    assert sum(group.num_tokens for group in result.groups.values()) == result.num_tokens


def test_the_model_is_left_in_its_mode():
    model = llama().train()
    compute_perplexity(model, TOKENIZER, TEXTS)
    assert model.training


@pytest.mark.parametrize(
    ("texts", "options", "error", "words"),
    [
        (TEXTS, {"max_length": 1}, ConfigError, "at least 2"),
        (TEXTS, {"stride": 4}, ConfigError, "stride is 4, max_length None"),
        (TEXTS, {"max_length": 8, "stride": 8}, ConfigError, "1 to max_length - 1"),
        ("text", {}, FormatError, "a single string"),
        ([{"txt": "a"}], {}, FormatError, "row 0"),
        ([{"text": "a"}], {"group_by": "kind"}, FormatError, "no column 'kind'"),
        (["a", ""], {}, NothingSupervisedError, "two tokens"),
    ],
)
def test_bad_arguments_are_named(texts, options, error, words):
    with pytest.raises(error, match=words):
        compute_perplexity(llama(), TOKENIZER, texts, **options)


def test_batches_count_by_source_and_by_stop():
    model = llama()
    rows = [{"messages": PLAIN, "source": "a"}, {"messages": PLAIN[:2], "source": "b"}]
    stop = TOKENIZER.eos_token_id
    expected: dict[str, list[float]] = {"a": [], "b": []}
    stops = []
    for row in rows:
        batch = DataCollatorForAssistantOnlyLM(TOKENIZER)([row])
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        nats = nats_of(model, ids)
        expected[row["source"]] += [nats[i - 1] for i in range(1, len(ids)) if labels[i] != -100]
        stops += [math.exp(-nats[i - 1]) for i in range(1, len(ids)) if labels[i] == stop]
    lengths = np.ones(len(TOKENIZER), dtype=np.int64)
    for collate in (
        DataCollatorForAssistantOnlyLM(TOKENIZER, return_source=True),
        DataCollatorWithEosPacking(TOKENIZER, max_length=256, return_source=True),
    ):
        counts = count_batch(model, collate(rows), byte_lengths=lengths, stop_ids=[stop])
        assert counts.total.nll == pytest.approx(sum(map(sum, expected.values())), rel=1e-6)
        for name, nats in expected.items():
            assert counts.sources[name].nll == pytest.approx(sum(nats), rel=1e-6)
            assert counts.sources[name].num_tokens == counts.sources[name].num_bytes == len(nats)
        assert counts.num_stops == len(stops) == 3
        assert counts.stop_probability == pytest.approx(sum(stops), rel=1e-5)
        metrics = counts.metrics("eval")
        assert metrics["eval_stop_probability"] == pytest.approx(sum(stops) / 3, rel=1e-5)
        assert metrics["eval_a_num_tokens"] == len(expected["a"])


def test_a_target_that_the_tokenizer_does_not_know_is_named():
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}
    with pytest.raises(DataError, match="id 3 is to be predicted, and the tokenizer has 3 tokens"):
        count_batch(llama(), batch, byte_lengths=np.ones(3, np.int64))


def test_no_tensor_of_all_positions_and_the_vocabulary_is_made():
    model, largest = llama(), 0
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER)([{"messages": PLAIN}] * 4)
    count_batch(model, batch)  # the first one proves head and loss in one, on a few logits

    def watch(module, args, output):
        nonlocal largest
        tensor = output if torch.is_tensor(output) else getattr(output, "logits", None)
        largest = max(largest, tensor.numel() if tensor is not None else 0)

    for module in model.modules():
        module.register_forward_hook(watch)
    count_batch(model, batch)
    trained = int((batch["labels"][:, 1:] != -100).sum())
    assert 0 < largest < trained * model.config.vocab_size


def test_empty_counts():
    assert math.isnan(EvaluationCounts().metrics("eval")["eval_loss"])
    assert "eval_stop_probability" not in EvaluationCounts().metrics("eval")


def test_a_bar_is_shown_on_terminals_alone(monkeypatch, capsys):
    model, texts, options = llama(), ["one text", "another text"], {}

    def at_once(**given):
        options.update(given)
        return tqdm(
            **{**given, "delay": 0, "mininterval": 0, "disable": False if options["shown"] else given["disable"]}
        )

    monkeypatch.setattr("hf_objectives.evaluation.perplexity.tqdm", at_once)
    for shown in (False, True):  # the stream of a test is no terminal
        options["shown"] = shown
        compute_perplexity(model, TOKENIZER, texts)
        assert ("Perplexity: 100%" in capsys.readouterr().err) == shown
    assert options["disable"] is None and options["delay"] == 5
