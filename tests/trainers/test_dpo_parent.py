"""PerplexityDPOTrainer in its parent's place: losses, gradients, metrics and signature."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_objectives import PerplexityDPOTrainer
from tests.support.dpo_worlds import BATCH, TOKENIZER, build, load

# -- the parent's ------------------------------------------------------------------------------------------------------

LOSSES = {
    **{
        name: {"loss_type": [name]}
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
    },
    **{name: {"loss_type": [name]} for name in ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "several": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_the_parents(name, folders, tmp_path):
    found = []
    for kind in (DPOTrainer, PerplexityDPOTrainer):
        run = build(kind, load(folders[0]), tmp_path, trainer={"ref_model": load(folders[1])}, **LOSSES[name])
        run.model.train()  # else the parent writes the metrics of an evaluation
        loss = run.compute_loss(run.model, dict(BATCH))
        loss.backward()
        gradient = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradient, dict(run._metrics["train"])))
    (loss, gradient, metrics), (our_loss, our_gradient, our_metrics) = found
    assert our_loss == pytest.approx(loss, abs=1e-6) and math.isfinite(loss)
    assert our_gradient.keys() == gradient.keys() and gradient
    for key, value in gradient.items():
        assert torch.allclose(our_gradient[key], value, atol=1e-6 * float(value.abs().max()) + 1e-12), key
    assert metrics and {key: our_metrics[key] for key in metrics} == metrics


def test_every_loss_of_the_parent_is_among_them():
    source = inspect.getsource(DPOTrainer._compute_loss)
    known = source.split("Should be one of [")[1].split("]")[0]
    listed = {word.strip(" '\"\n") for word in known.split(",")}
    assert {word for word in listed if word} <= set(LOSSES)


def test_signature_is_the_parents():
    theirs, own = (inspect.signature(kind.__init__).parameters for kind in (DPOTrainer, PerplexityDPOTrainer))
    assert list(own) == [*theirs, "eval_lm_datasets"]
    assert [own[name].default for name in theirs] == [parameter.default for parameter in theirs.values()]


@pytest.mark.slow
def test_the_parents_collator_and_the_parents_arguments_give_the_parents_run(folders, tmp_path):
    """A plain DPOConfig, plain text and TRL's collator: the logs of both trainers are equal."""
    rows = [{"prompt": f"{i} and {i} is", "chosen": f" {2 * i}", "rejected": f" {i}{i}."} for i in range(1, 9)]
    logs = []
    for kind in (DPOTrainer, PerplexityDPOTrainer):
        collator = DataCollatorForPreference(TOKENIZER.pad_token_id)
        run = build(
            kind,
            folders[0],
            tmp_path,
            rows=Dataset.from_list(rows),
            config=DPOConfig,
            trainer={"data_collator": collator},
        )
        run.train()
        logs.append([log for log in run.state.log_history if "loss" in log])
    for theirs, own in zip(*logs, strict=True):
        for key, value in theirs.items():
            assert own[key] == pytest.approx(value, abs=1e-6), key
