"""Every tracker's names under the Trainer's own."""

from __future__ import annotations

import pytest

from hf_objectives.diagnostics.log_names import canonical, is_curve, of_split, step_of


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train_loss", "loss"),
        ("train/loss", "loss"),
        ("Loss/train", "loss"),
        ("loss/train", "loss"),
        ("Train/Loss", "loss"),
        ("Training Loss", "loss"),
        ("train_loss_step", "loss"),
        ("train/loss_step", "loss"),
        ("train/train_loss", "train_loss"),
        ("train_loss_epoch", "train_loss"),
        ("val_loss", "eval_loss"),
        ("eval/loss", "eval_loss"),
        ("loss/val", "eval_loss"),
        ("validation/loss", "eval_loss"),
        ("Validation Loss", "eval_loss"),
        ("val/val_loss", "eval_loss"),
        ("Loss/test", "test_loss"),
        ("test/loss", "test_loss"),
        ("eval/web_perplexity", "eval_web_perplexity"),
        ("train/rewards/chosen", "rewards/chosen"),
        ("lr", "learning_rate"),
        ("train/learning-rate", "learning_rate"),
        ("loss/policy_avg", "loss/policy_avg"),
        ("mixture/Web/share", "mixture/Web/share"),
        ("eval_Wiki_loss", "eval_Wiki_loss"),
    ],
)
def test_names_are_the_trainers(key, name):
    assert canonical(key) == name


def test_a_split_names_what_it_measured():
    assert [of_split("loss", split) for split in ("train", "Val", "test", "wiki")] == [
        "loss",
        "eval_loss",
        "test_loss",
        "eval_wiki_loss",
    ]
    assert of_split("epoch", "val") == "epoch" and of_split("eval_loss", "val") == "eval_loss"


def test_the_trainers_step_comes_first():
    assert step_of(("_step", "train/global_step", "loss")) == "train/global_step"
    assert step_of(("Step", "loss")) == "Step" and step_of(("loss", 3)) is None
    assert [is_curve(key) for key in ("loss", "_step", "Wall time", "split", "", "Unnamed: 0")] == [True] + [False] * 5
