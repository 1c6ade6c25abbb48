"""Selective checkpointing and offloading in our trainer: the same gradients, or a line that says what to change."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from transformers import TrainerCallback

from hf_objectives import PerplexityTrainer, PerplexityTrainingArguments
from hf_objectives.errors import ConfigError
from hf_objectives.trainers.long_rows import saved_activations
from tests.support.language_models import llama

ROWS = [{"input_ids": [*range(3, 20)], "labels": [*range(3, 20)], "attention_mask": [1] * 17}] * 4


def stack(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = [parameter.grad.clone() for parameter in model.parameters()]


def gradients(folder, **options):
    settings = {"use_cpu": True, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
    arguments = PerplexityTrainingArguments(str(folder), **settings, **options)
    callback = Gradients()
    PerplexityTrainer(llama(), arguments, stack, train_dataset=ROWS, callbacks=[callback]).train()
    return callback.seen


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_selective_checkpointing_keeps_attention_and_every_gradient(tmp_path, monkeypatch, name):
    import trl.models.selective_activation_checkpointing as theirs

    kept, usual = set(), theirs._build_policy_fn

    def recorded(operations):
        policy = usual(operations)

        def decide(context, operation, *args, **kwargs):
            decision = policy(context, operation, *args, **kwargs)
            kept.update({str(operation)} if decision == CheckpointPolicy.MUST_SAVE else ())
            return decision

        return decide

    monkeypatch.setattr(theirs, "_build_policy_fn", recorded)
    plain = gradients(tmp_path / "plain")
    selective = gradients(tmp_path / "own", **{name: True}, **{f"{name}_kwargs": {"selective": True}})
    assert all(torch.equal(p, q) for p, q in zip(plain, selective, strict=True))
    assert kept and all("attention" in name for name in kept)


def test_off_is_no_key_for_torch(tmp_path):
    plain = gradients(tmp_path / "plain", gradient_checkpointing=True)
    off = gradients(tmp_path / "own", gradient_checkpointing=True, gradient_checkpointing_kwargs={"selective": False})
    assert all(torch.equal(p, q) for p, q in zip(plain, off, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "needs activation_checkpointing=True"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True, "use_reentrant": True}},
         "no use_reentrant"),
        ({"activation_offloading": True}, "leave it off on a CPU"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        gradients(tmp_path, **options)


def test_offloading_takes_trls_context(tmp_path, monkeypatch):
    """A CPU has nothing to move: what TRL gives is stood in for."""
    entered = []

    class Context:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    monkeypatch.setattr("hf_objectives.trainers.trl_compat.get_act_offloading_ctx_manager", lambda model: Context())
    monkeypatch.setattr(PerplexityTrainingArguments, "device", torch.device("meta"))

    arguments = PerplexityTrainingArguments(str(tmp_path), activation_offloading=True, report_to="none")

    with saved_activations(arguments, None):
        assert entered == ["in"]
    assert entered == ["in", "out"]
