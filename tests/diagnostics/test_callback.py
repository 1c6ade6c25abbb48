"""The live monitor in real training: ours, transformers' and TRL's trainers."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from hf_objectives import (
    DiagnosticsCallback,
    demo,
)
from hf_objectives.errors import ConfigError, NonFiniteError
from tests.support.monitored_runs import BAD, SETTINGS, STEPS, events, trainer_of


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "accumulation"), [("ours", 2), ("transformers", 1), ("trl", 2)])
def test_the_bad_batch_is_written_with_its_examples(kind, accumulation, tmp_path, caplog):
    trainer = trainer_of(kind, tmp_path, accumulation=accumulation)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    (event,) = events(tmp_path).values()
    assert (event["step"], event["kind"], event["rank"]) == (BAD, "spike", 0)
    logged = next(log["loss"] for log in trainer.state.log_history if log["step"] == BAD)
    assert event["loss"] == pytest.approx(logged, rel=1e-3) and event["loss"] > event["limit"] > event["level"]
    assert event["grad_norm"] > 0 and event["learning_rate"] > 0
    examples = event["examples"]
    assert len(examples) == 2 * accumulation and all(one["suspect"] for one in examples)
    assert sum(one["loss"] for one in examples) / len(examples) == pytest.approx(logged, rel=1e-2)
    if kind == "ours":
        numbers = [(BAD - 1) * 2 * accumulation + i for i in range(2 * accumulation)]
        assert [one["row"] for one in examples] == numbers
        assert json.loads((tmp_path / "diagnostics" / "blocklist.json").read_text()) == {"web": numbers}
        assert f"row {numbers[0]}" in caplog.text
    assert f"step {BAD}: loss" in caplog.text
    assert "training_step" not in vars(trainer) and "_get_grad_norm" not in vars(trainer)


@pytest.mark.slow
def test_one_bad_row_among_good_ones_is_named(tmp_path):
    trainer = trainer_of("ours", tmp_path, per_device_train_batch_size=8, max_steps=120)
    draw, tokenizer = random.Random(1), demo.build_tokenizer()
    lines = [(tokenizer(row["text"])["input_ids"] * 20)[:48] for row in demo.texts(960)]
    bad = 8 * (115 - 1) + 3
    lines[bad] = [draw.randrange(100, 250) for _ in range(48)]
    data = [{"input_ids": ids, "labels": list(ids), "source": "web", "row": i} for i, ids in enumerate(lines)]
    trainer.train_dataset = Dataset.from_list(data)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    found = {
        name: [one["row"] for one in event["examples"] if one["suspect"]] for name, event in events(tmp_path).items()
    }
    assert found == {"step_115_rank_0": [bad]}


@pytest.mark.slow
def test_the_callback_changes_nothing(tmp_path):
    histories = []
    for watched in (False, True):
        trainer = trainer_of("ours", tmp_path / str(watched))
        if watched:
            trainer.add_callback(DiagnosticsCallback(trainer, sample_every=5))
        trainer.train()
        histories.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log])
    assert histories[0] == histories[1]


@pytest.mark.slow
def test_skip_leaves_weights_and_moments_alone(tmp_path):
    trainer = trainer_of("ours", tmp_path, stop_on_non_finite=False)
    seen = {}

    class Watch(DiagnosticsCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (BAD - 1, BAD, BAD + 1):
                parameter = next(self.trainer.model.parameters())
                moments = self.trainer.optimizer.state[parameter]
                seen[state.global_step] = [
                    parameter.detach().clone(),
                    moments["exp_avg"].clone(),
                    float(moments["step"]),
                ]

    trainer.add_callback(Watch(trainer, on_spike="skip"))
    trainer.train()
    before, at, after = seen[BAD - 1], seen[BAD], seen[BAD + 1]
    assert torch.equal(before[0], at[0]) and torch.equal(before[1], at[1]) and before[2] == at[2]
    assert not torch.equal(at[0], after[0]) and after[2] == at[2] + 1
    assert trainer.state.global_step == STEPS


@pytest.mark.slow
def test_stop_ends_training_before_the_weights_change(tmp_path):
    trainer = trainer_of("transformers", tmp_path)
    step = trainer.compute_loss

    def broken(model, inputs, **options):
        loss = step(model, inputs, **options)
        return loss * math.nan if trainer.state.global_step == 9 else loss

    trainer.compute_loss = broken
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="stop"))
    trainer.train()
    assert trainer.state.global_step == 10
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_preference_batches_with_a_references_figures(tmp_path):
    tokenizer = demo.build_tokenizer()
    pair = {"prompt": "What comes after Monday?", "chosen": " Tuesday.", "rejected": " Friday, and no other day."}
    settings = {**SETTINGS, "max_steps": 2, "precompute_ref_log_probs": True}
    settings = {name: value for name, value in settings.items() if name != "train_sampling_strategy"}
    args = DPOConfig(str(tmp_path), max_length=48, **settings)
    data = Dataset.from_list([pair] * 8)
    trainer = DPOTrainer(demo.build_model(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)
    callback = DiagnosticsCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert (
        callback._spent > 0 and not callback._looks_failed
    )  # two pairs were looked at: what was chosen and what was not


@pytest.mark.slow
@pytest.mark.parametrize("stops", [True, False])
def test_a_loss_that_is_not_finite_is_written_also_where_the_trainer_stops(stops, tmp_path):
    trainer = trainer_of("ours", tmp_path, stop_on_non_finite=stops)
    trainer.add_callback(DiagnosticsCallback(trainer, on_spike="log" if stops else "skip"))
    step = trainer.compute_loss

    def broken(model, inputs, **options):
        loss = step(model, inputs, **options)
        return loss * math.nan if trainer.state.global_step == 9 else loss

    trainer.compute_loss = broken
    if stops:
        with pytest.raises(NonFiniteError, match="step 10"):
            trainer.train()
        assert events(tmp_path)["step_10_rank_0"]["kind"] == "non_finite" and "training_step" not in vars(trainer)
        return
    trainer.train()
    assert events(tmp_path)["step_10_rank_0"]["kind"] == "non_finite"
    assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_findings_of_the_log_are_said_once(tmp_path, caplog):
    trainer = trainer_of("transformers", tmp_path, learning_rate=0.0)
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "diagnostics" / "findings.jsonl").read_text().splitlines()]
    found = [line["kind"] for line in lines]
    assert found.count("schedule_fault") == 1 and "the learning rate is 0 at every step" in caplog.text


@pytest.mark.slow
def test_no_more_events_than_asked_are_written(tmp_path, caplog):
    trainer = trainer_of("transformers", tmp_path)
    trainer.add_callback(DiagnosticsCallback(trainer, max_events=0))
    trainer.train()
    assert events(tmp_path) == {} and "1 spikes in all; the first 0 were written" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_spike": "explode"}, "on_spike is 'explode'; expected one of log, skip, stop"),
        ({"on_spike": "skip"}, "set stop_on_non_finite=False"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        DiagnosticsCallback(trainer_of("ours", tmp_path), **options)
