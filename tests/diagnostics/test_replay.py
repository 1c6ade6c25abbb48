"""A batch that was written is computed again."""

from __future__ import annotations

import json

import pytest
from test_callback import BAD, trainer_of

from hf_objectives import DiagnosticsCallback, demo
from hf_objectives.cli import main
from hf_objectives.diagnostics.replay import replay
from hf_objectives.errors import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_of("ours", folder, save_strategy="steps", save_steps=10)
    trainer.add_callback(DiagnosticsCallback(trainer, save_weights=True))
    trainer.train()
    return folder, folder / "diagnostics" / f"step_{BAD}_rank_0"


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
