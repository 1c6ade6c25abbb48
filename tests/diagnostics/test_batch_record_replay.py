"""A batch that was written is computed again."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_objectives import DiagnosticsCallback, demo
from hf_objectives.cli.main import main
from hf_objectives.diagnostics.batch_record import replay
from hf_objectives.errors import ConfigError, FileFormatError
from tests.support.monitored_runs import BAD, SETTINGS, trainer_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of("ours", folder, save_strategy="steps", save_steps=10)
    trainer.add_callback(DiagnosticsCallback(trainer, save_weights=True))
    trainer.train()
    return folder, folder / "diagnostics" / f"step_{BAD}_rank_0"


@pytest.mark.slow
def test_with_the_weights_of_the_step_the_losses_are_the_same(run):
    done = replay(run[1])
    assert done.exact and len(done.examples) == 2 and done.largest_difference < 1e-5
    assert done.examples[0]["loss"] > done.event["limit"]


def test_without_them_the_checkpoint_before_is_taken(run, tmp_path):
    _, event = run
    whole = json.loads((event / "event.json").read_text())
    (event / "event.json").write_text(json.dumps({**whole, "weights": None}))
    done = replay(event)
    assert done.model.endswith("checkpoint-20") and not done.exact and done.largest_difference > 1e-5
    (event / "event.json").write_text(json.dumps(whole))


def test_a_model_in_memory(run):
    model = demo.build_model(demo.build_tokenizer())
    done = replay(run[1], model)
    assert done.model == type(model).__name__ and not done.exact


def test_command_line(run, capsys):
    main(["replay", str(run[1])])
    said = " ".join(capsys.readouterr().out.split())
    assert f"step {BAD}, spike: loss" in said and "reproduced" in said and "suspect" in said


def test_what_cannot_be_replayed_is_a_line(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["replay", str(tmp_path)])
    assert stop.value.code == 2 and "holds no event.json" in capsys.readouterr().err
    folder = tmp_path / "diagnostics" / "step_5_rank_0"
    folder.mkdir(parents=True)
    for path in run[1].glob("*.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    event = json.loads((run[1] / "event.json").read_text())
    (folder / "event.json").write_text(json.dumps({**event, "weights": None, "step": 5}))
    with pytest.raises(ConfigError, match="no checkpoint before step 5 and no model; name one with --model"):
        replay(folder)
    (folder / "event.json").write_text(json.dumps({**event, "examples": []}))
    with pytest.raises(ConfigError, match="neither labels nor a mask"):
        replay(folder)
    (folder / "event.json").write_text(
        json.dumps({**event, "weights": None, "step": BAD, "examples": event["examples"] * 2})
    )
    with pytest.raises(FileFormatError, match="4 documents are named, 2 are there"):
        replay(folder, demo.build_model(demo.build_tokenizer()))


@pytest.mark.slow
def test_the_precision_of_the_run_is_that_of_the_replay(tmp_path):
    trainer = trainer_of("ours", tmp_path, bf16=True)
    trainer.add_callback(DiagnosticsCallback(trainer, save_weights=True))
    trainer.train()
    done = replay(tmp_path / "diagnostics" / f"step_{BAD}_rank_0")
    assert (done.event["autocast"], done.event["dtype"]) == ("bfloat16", "float32")
    assert done.exact and done.largest_difference < 1e-5


@pytest.mark.slow
def test_dropout_draws_what_it_drew(tmp_path):
    """The loss of the step itself, in training mode, from the random states that were written."""
    trainer = trainer_of("transformers", tmp_path, gradient_accumulation_steps=2)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(demo.build_tokenizer()), resid_pdrop=0.3, **sizes))
    args = TrainingArguments(str(tmp_path), **{**SETTINGS, "gradient_accumulation_steps": 2, "max_steps": 15})
    trainer = Trainer(model, args, trainer.data_collator, train_dataset=trainer.train_dataset)
    trainer.add_callback(DiagnosticsCallback(trainer, save_weights=True, on_spike="skip"))
    clean = []
    trainer.compute_loss = watch(trainer, trainer.compute_loss, clean)
    trainer.train()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    done = replay(tmp_path / "diagnostics" / "step_15_rank_0")
    assert torch.equal(torch.get_rng_state(), before)
    # transformers divides by all labels, the first token's among them, which nothing predicts: 48 of 47 targets a row.
    assert done.loss == pytest.approx(sum(clean) * 48 / 47, abs=1e-5) and done.largest_difference < 1e-5
    tokens = sum(one["tokens"] for one in done.examples)
    without = sum(one["loss"] * one["tokens"] for one in done.examples) / tokens
    assert abs(done.loss - without) > 1e-3  # dropout was on


def watch(trainer, usual, clean):
    """Make the last step infinite, and keep the losses that it would have had."""

    def compute_loss(model, inputs, **options):
        loss = usual(model, inputs, **options)
        if trainer.state.global_step == 14:
            clean.append(float(loss.detach()))
            return loss * torch.inf
        return loss

    return compute_loss
