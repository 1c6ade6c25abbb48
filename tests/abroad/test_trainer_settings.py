"""Settings of transformers' Trainer and of ours, with our collators: every row once, with its labels and its loss by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_objectives import PerplexityTrainer, PerplexityTrainingArguments
from hf_objectives.errors import ConfigError
from tests.support.hosts import ALONE, EXPECTED, PACKING, PADDING, RAW, TOKENIZER, arguments, documents, rows
from tests.support.language_models import llama, nats_of

pytestmark = pytest.mark.slow
HOSTS = {"transformers": (Trainer, TrainingArguments), "ours": (PerplexityTrainer, PerplexityTrainingArguments)}
ROWS = {"padded": ("unpacked", PADDING), "packed": ("packed", PACKING)}
both_hosts = pytest.mark.parametrize("host", HOSTS)
both_kinds = pytest.mark.parametrize("kind", ROWS)


def make(host, kind, folder, *, raw=False, processing_class=TOKENIZER, trainer=None, **options):
    """A Trainer that takes one epoch without learning, so that every loss is one of the first weights."""
    trainer_class, config = HOSTS[host]
    data, collator = ROWS[kind]
    settings = {
        "max_steps": -1,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "logging_steps": 1,
        **(ALONE if raw else {}),
    }
    made = trainer_class(
        llama(), arguments(config, folder, **{**settings, **options}), collator, train_dataset=RAW if raw else rows(data),
        processing_class=processing_class, **(trainer or {}),
    )  # fmt: skip
    return made, watched(made)


def watched(trainer, fits=None):
    """The batches of each step that the model was trained on; a batch of more rows than fit is out of memory."""
    seen, step = [], trainer.training_step

    def training_step(model, inputs, *rest):
        if fits is not None and len(inputs["input_ids"]) > fits:
            seen.clear()
            raise RuntimeError("CUDA out of memory.")
        seen.append(dict(inputs))
        return step(model, inputs, *rest)

    trainer.training_step = training_step
    return seen


def chats_of(batch):
    return {ids: labels for ids, labels in documents(batch).items() if set(ids) != {TOKENIZER.eos_token_id}}


def loss_by_hand(model, found):
    """Nats over tokens in float64, one document at a time."""
    nats = [
        nat
        for ids, labels in found.items()
        for nat, label in zip(nats_of(model, list(ids)), labels[1:], strict=True)
        if label != -100
    ]
    return sum(nats) / len(nats)


def check_steps(trainer, seen, epochs=1):
    """Each epoch has each chat once, with its labels; each logged loss is that of its step's chats."""
    found = [chats_of(batch) for batch in seen]
    assert all(labels == EXPECTED[ids] for step in found for ids, labels in step.items())
    assert sorted(ids for step in found for ids in step) == sorted([*EXPECTED] * epochs)
    model = llama()
    expected = {frozenset(step): loss_by_hand(model, step) for step in found}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([expected[frozenset(step)] for step in found], rel=1e-6)


SETTINGS = {
    "by length": {"train_sampling_strategy": "group_by_length"},
    "forked workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "num_train_epochs": 2},
}


COMPILED = [
    ("ours", "packed"),
    *(pytest.param("transformers", kind, marks=pytest.mark.long) for kind in ("padded", "packed")),
]


@pytest.mark.parametrize(("host", "kind"), COMPILED)
def test_a_compiled_model(host, kind, tmp_path, monkeypatch):
    """The fourth cell is in the tests of our trainer."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")  # torch_compile sets it too, and monkeypatch undoes it
    trainer, seen = make(host, kind, tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    check_steps(trainer, seen)


@pytest.mark.parametrize(
    ("host", "kind", "setting"),
    [
        *((host, kind, "by length") for host in HOSTS for kind in ROWS),
        # What workers do to a kind of rows does not depend on the Trainer, and starting them takes seconds.
        ("transformers", "packed", "forked workers"),
        ("ours", "padded", "forked workers"),
    ],
)
def test_every_row_once_with_its_loss(host, kind, setting, tmp_path):
    trainer, seen = make(host, kind, tmp_path, **SETTINGS[setting])
    trainer.train()
    check_steps(trainer, seen, SETTINGS[setting].get("num_train_epochs", 1))


@pytest.mark.long
def test_spawned_workers_collate_raw_rows(tmp_path):
    # One worker, here and below: it is pickling and importing anew that is tried, and importing takes seconds.
    options = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn"}
    trainer, seen = make("ours", "packed", tmp_path, raw=True, **options)
    trainer.train()
    check_steps(trainer, seen)


@both_kinds
def test_the_mean_of_one_process_is_that_of_its_tokens(kind, tmp_path):
    trainer, seen = make("transformers", kind, tmp_path, average_tokens_across_devices=False)
    trainer.train()
    check_steps(trainer, seen)


@both_hosts
@both_kinds
def test_a_batch_size_that_fits_is_found(host, kind, tmp_path):
    trainer, seen = make(host, kind, tmp_path, auto_find_batch_size=True)
    del trainer.training_step
    seen = watched(trainer, fits=3)
    trainer.train()
    assert {len(batch["input_ids"]) for batch in seen} <= {1, 2, 3}
    check_steps(trainer, seen)


@both_hosts
def test_rows_without_ids_have_no_length(host, tmp_path):
    trainer, _ = make(host, "padded", tmp_path, raw=True, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="'input_ids' key"):
        trainer.train()


@both_hosts
@both_kinds
def test_input_tokens_are_those_of_the_batches(host, kind, tmp_path):
    trainer, seen = make(host, kind, tmp_path, include_num_input_tokens_seen="all")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(batch["input_ids"].numel() for batch in seen)


def test_input_tokens_without_padding(tmp_path):
    trainer, _ = make("transformers", "padded", tmp_path, include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(map(len, EXPECTED))
    with pytest.raises(ConfigError, match="include_num_input_tokens_seen is 'non_padding'"):
        make("ours", "padded", tmp_path, include_num_input_tokens_seen="non_padding")


# -- NEFTune -------------------------------------------------------------------------------------------------------------

ALPHA = 5.0


class Embeddings(TrainerCallback):
    """What the first layer gets in training and in evaluation: a hook that comes after NEFTune's."""

    def __init__(self):
        self.trained, self.evaluated = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def keep(module, inputs, output):
            kept = self.trained if module.training else self.evaluated
            kept.append((inputs[0], output.detach()))

        model.get_input_embeddings().register_forward_hook(keep)


@both_hosts
@both_kinds
def test_neftune_is_in_training_alone(host, kind, tmp_path):
    found = Embeddings()
    options = {
        "neftune_noise_alpha": ALPHA,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 64,
    }
    trainer, seen = make(
        host,
        kind,
        tmp_path,
        trainer={"eval_dataset": rows(ROWS[kind][0]), "callbacks": [found]},
        max_steps=2,
        **options,
    )
    trainer.train()
    model = llama()
    table = model.get_input_embeddings().weight
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    for batch, loss in zip(seen, losses, strict=True):
        (noisy,) = [output for ids, output in found.trained if ids is batch["input_ids"] or (
            ids.shape == batch["input_ids"].shape and torch.equal(ids, batch["input_ids"]))]  # fmt: skip
        noise = (noisy - table[batch["input_ids"]]).abs()
        bound = ALPHA / (noisy.shape[1] * noisy.shape[2]) ** 0.5  # Jain et al., arXiv 2310.05914, algorithm 1
        assert 0.9 * bound < noise.max().item() <= bound * (1 + 1e-5)
        own = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        with torch.no_grad():
            logits = model(inputs_embeds=noisy, use_cache=False, **own).logits[:, :-1].double()
        expected = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert loss == pytest.approx(float(expected), rel=1e-6)
        assert abs(loss - loss_by_hand(model, chats_of(batch))) > 1e-3
    assert found.evaluated and all(torch.equal(output, table[ids]) for ids, output in found.evaluated)
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated == pytest.approx([loss_by_hand(model, EXPECTED)] * 2, rel=1e-6)


# -- predictions -----------------------------------------------------------------------------------------------------------


@both_kinds
def test_predictions_of_an_evaluation_in_batches(kind, tmp_path):
    """`compute_metrics` sees the logits and the labels of every chat, batch by batch."""
    sums = torch.zeros(2, dtype=torch.float64)

    def metrics(prediction, compute_result):
        logits, labels = prediction.predictions[:, :-1].double(), prediction.label_ids[:, 1:]
        sums[0] += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        sums[1] += (labels != -100).sum()
        return {"nats": float(sums[0] / sums[1])} if compute_result else {}

    held = {"eval_dataset": RAW, "compute_metrics": metrics}
    trainer, _ = make(
        "transformers", kind, tmp_path, raw=True, trainer=held, batch_eval_metrics=True, per_device_eval_batch_size=5
    )
    assert trainer.evaluate()["eval_nats"] == pytest.approx(loss_by_hand(llama(), EXPECTED), rel=1e-6)


def test_our_trainer_has_no_predictions(tmp_path):
    with pytest.raises(ConfigError, match="batch_eval_metrics is True"):
        make("ours", "padded", tmp_path, batch_eval_metrics=True)


@pytest.mark.parametrize(
    ("host", "workers", "context"),
    [
        *(("transformers", *how) for how in ((0, None), (1, "fork"))),
        ("ours", 0, None),
        *(pytest.param(host, 1, "spawn", marks=pytest.mark.long) for host in ("transformers", "ours")),
    ],
)
def test_weights_of_tokens_where_nobody_applies_them(host, workers, context, tmp_path):
    weighted = rows("unpacked").map(lambda row: {"loss_weights": [0.5] * len(row["input_ids"])})
    trainer_class, config = HOSTS[host]
    settings = {
        "max_steps": 1,
        "dataloader_num_workers": workers,
        "dataloader_multiprocessing_context": context,
        **ALONE,
    }
    trainer = trainer_class(llama(), arguments(config, tmp_path, **settings), PADDING, train_dataset=weighted)
    if host == "ours":
        trainer.train()
        return
    with pytest.raises(ConfigError, match="hands loss_weights to the model, which ignores them; use PerplexityTrainer"):
        trainer.train()
    if workers:
        return
    # A weight of a token that is not trained changes nothing.
    ones = rows("unpacked").map(lambda row: {"loss_weights": [float(label != -100) for label in row["labels"]]})
    trainer_class(llama(), arguments(config, tmp_path, **settings), PADDING, train_dataset=ones).train()
