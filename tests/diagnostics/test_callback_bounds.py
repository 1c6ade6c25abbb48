"""Where the monitor has to stand back: trainers of other kinds, its own failures, runs that go wrong as a whole."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from hf_objectives import DiagnosticsCallback, PerplexityDPOConfig, PerplexityDPOTrainer, demo
from hf_objectives.diagnostics import callback as callback_module
from hf_objectives.errors import ConfigError, NonFiniteError
from tests.support.monitored_runs import BAD, SETTINGS, events, trainer_of


def spoil(trainer, factor, steps):
    """Multiply the loss of some steps (their numbers from 0)."""
    usual = trainer.compute_loss

    def compute_loss(model, inputs, **options):
        loss = usual(model, inputs, **options)
        return loss * factor if trainer.state.global_step in steps else loss

    trainer.compute_loss = compute_loss


def blocklist(folder):
    path = folder / "diagnostics" / "blocklist.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.slow
def test_our_pairs_are_told_by_their_rows(tmp_path):
    tokenizer = demo.build_tokenizer()
    args = PerplexityDPOConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = PerplexityDPOTrainer(
        demo.build_model(tokenizer), demo.build_model(tokenizer), args=args,
        train_dataset=Dataset.from_list(demo.preferences(40)), processing_class=tokenizer,
    )  # fmt: skip
    callback = DiagnosticsCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback._spent > 0 and not callback._looks_failed


@pytest.mark.slow
def test_a_classifier_is_watched_without_a_look_at_its_examples(tmp_path):
    tokenizer = demo.build_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=2, pad_token_id=tokenizer.pad_token_id, **sizes)
    rows = [
        {"input_ids": tokenizer(row["text"])["input_ids"][:16], "labels": i % 2} for i, row in enumerate(demo.texts(64))
    ]
    trainer = Trainer(
        AutoModelForSequenceClassification.from_config(config), TrainingArguments(str(tmp_path), **SETTINGS),
        DataCollatorWithPadding(tokenizer), train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    spoil(trainer, math.nan, {20})
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="skip"))
    trainer.train()
    event = events(tmp_path)["step_21_rank_0"]
    assert event["kind"] == "non_finite" and event["examples"] == [] and event["loss"] == "nan"


@pytest.mark.slow
def test_the_loss_of_a_policy_is_no_measure(tmp_path):
    """GRPO, RLOO and PPO: only what is not finite is an event."""
    trainer = trainer_of("transformers", tmp_path)
    trainer.reward_funcs = []
    spoil(trainer, math.nan, {5})
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="skip"))
    trainer.train()
    assert list(events(tmp_path)) == ["step_6_rank_0"]  # not step BAD


@pytest.mark.slow
def test_a_batch_of_which_nothing_is_trained_says_so(tmp_path, caplog):
    trainer = trainer_of("transformers", tmp_path)
    rows = trainer.train_dataset.to_list()
    for row in rows[2 * (BAD - 1) : 2 * BAD]:
        row["labels"] = [-100] * len(row["labels"])
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="skip"))
    trainer.train()
    event = events(tmp_path)[f"step_{BAD}_rank_0"]
    assert [(one["tokens"], one["loss"]) for one in event["examples"]] == [(0, None)] * 2
    assert all(one["text"] for one in event["examples"])
    assert "No token of this batch is trained: every label is masked" in caplog.text


@pytest.mark.slow
def test_a_monitor_that_fails_does_not_end_the_run(tmp_path, caplog):
    trainer = trainer_of("ours", tmp_path)
    (tmp_path / "diagnostics").write_text("a file where the folder should be")
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    assert trainer.state.global_step == SETTINGS["max_steps"] and "the monitor failed" in caplog.text


@pytest.mark.slow
def test_a_look_that_fails_leaves_the_record(tmp_path, monkeypatch, caplog):
    """As where there is no memory for a further forward pass."""

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(callback_module, "describe_examples", no_memory)
    trainer = trainer_of("ours", tmp_path, stop_on_non_finite=False)
    spoil(trainer, math.nan, {19})
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="skip"))
    trainer.train()
    assert events(tmp_path)["step_20_rank_0"]["examples"] == []
    assert caplog.text.count("its examples cannot be looked at") == 1


@pytest.mark.slow
def test_a_second_training_begins_anew(tmp_path):
    trainer = trainer_of("ours", tmp_path)
    callback = DiagnosticsCallback(trainer, max_events=1)
    trainer.add_callback(callback)
    trainer.train()
    trainer.train()
    assert callback.events == 1 and list(events(tmp_path)) == [f"step_{BAD}_rank_0"]


@pytest.mark.slow
def test_the_trainer_is_left_as_it_was(tmp_path):
    trainer = trainer_of("transformers", tmp_path, max_steps=2)
    usual = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: usual(*args, **kwargs)
    mine = trainer.training_step
    trainer.add_callback(DiagnosticsCallback(trainer))
    with pytest.raises(ConfigError, match="has a DiagnosticsCallback already"):
        DiagnosticsCallback(trainer)
    trainer.train()
    assert trainer.training_step is mine

    def out_of_memory(*args, **kwargs):
        raise MemoryError

    trainer.training_step = out_of_memory
    with pytest.raises(MemoryError):
        trainer.train()
    assert trainer.training_step is out_of_memory and "_get_grad_norm" not in vars(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["sample_every", "max_events"])
def test_numbers_below_zero_are_refused_and_zero_is_never(option, tmp_path):
    trainer = trainer_of("transformers", tmp_path, max_steps=3)
    with pytest.raises(ConfigError, match=f"{option} is -1; expected 0 or more"):
        DiagnosticsCallback(trainer, **{option: -1})
    callback = DiagnosticsCallback(trainer, sample_every=0)
    trainer.add_callback(callback)
    trainer.train()
    assert callback._spent == 0


@pytest.mark.slow
def test_rows_of_a_run_that_is_broken_are_not_blocked(tmp_path):
    """One NaN reaches the weights, and from then on every batch is NaN, whatever its rows."""
    trainer = trainer_of("ours", tmp_path, stop_on_non_finite=False)
    spoil(trainer, math.nan, {20})
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    assert len(events(tmp_path)) > 10 and blocklist(tmp_path) == {}


@pytest.mark.slow
def test_rows_that_were_blocked_before_stay_blocked(tmp_path):
    (tmp_path / "diagnostics").mkdir()
    (tmp_path / "diagnostics" / "blocklist.json").write_text('{"web": [3]}')
    trainer = trainer_of("ours", tmp_path)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    assert blocklist(tmp_path) == {"web": [3, 2 * (BAD - 1), 2 * BAD - 1]}


@pytest.mark.slow
def test_a_line_that_was_cut_off_does_not_hinder_a_resume(tmp_path):
    trainer = trainer_of("transformers", tmp_path, learning_rate=0.0, save_strategy="steps", save_steps=24)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    path = tmp_path / "diagnostics" / "findings.jsonl"
    before = path.read_text()
    path.write_text(before + '{"kind": "plat')
    again = trainer_of("transformers", tmp_path, learning_rate=0.0)
    again.add_callback(DiagnosticsCallback(again))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert again.state.global_step == SETTINGS["max_steps"]
    assert path.read_text().count("schedule_fault") == before.count("schedule_fault") == 1  # said before
    again.callback_handler.callbacks[-1]._append("findings.jsonl", {"kind": "new", "step": 40})
    assert json.loads(path.read_text().splitlines()[-1]) == {"kind": "new", "step": 40}  # not behind the cut-off line


@pytest.mark.slow
def test_skipping_for_ever_is_an_error(tmp_path):
    trainer = trainer_of("transformers", tmp_path)
    spoil(trainer, math.nan, set(range(8, 100)))
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="skip"))
    with pytest.raises(NonFiniteError, match="the last 21 steps were left out, nothing is trained any more"):
        trainer.train()
    assert trainer.state.global_step == 28


@pytest.mark.slow
def test_the_whole_log_is_looked_at_when_training_ends(tmp_path):
    """A run of few logged lines, of which the last look before it says nothing."""
    trainer = trainer_of("transformers", tmp_path, learning_rate=0.0, logging_steps=5)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    lines = (tmp_path / "diagnostics" / "findings.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["schedule_fault"]


def test_looks_without_need_stay_within_their_share_of_the_time(tmp_path):
    callback = DiagnosticsCallback(trainer_of("transformers", tmp_path))
    callback._began = time.perf_counter()  # no time has passed
    for height, free in ((3.0, 3), (2.0, 1), (1.0, -1)):
        callback._monitor.height, callback._last = height, 1.0
        due = []
        for spent in range(12):
            callback._spent = float(spent)
            due += [spent] if callback._is_due(7) else []
        assert due == list(range(free + 1))
    assert callback._is_due(100)
