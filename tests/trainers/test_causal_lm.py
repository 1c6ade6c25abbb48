"""PerplexityTrainer: the same numbers whatever the batching, and what a checkpoint and a log hold."""

from __future__ import annotations

import inspect
import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, Trainer

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, DataError, NothingSupervisedError
from hf_objectives.evaluation.head import warn_once
from hf_objectives.labels.rows import encode_row
from hf_objectives.preparation.ordered_stream import OrderedStream
from hf_objectives.trainers import PerplexityTrainer
from tests.support.chat_corpus import PLAIN, byte_tokenizer
from tests.support.language_models import TOKENIZER, arguments, by_autograd, chats, llama, mixtral, nats_of, trainer


def test_evaluation_is_the_sum_over_documents_for_every_batch_size(tmp_path):
    model = llama()
    nats, by_source = [], {"even": [], "odd": []}
    for row in chats():
        encoded = encode_row(TOKENIZER, row)
        own = nats_of(model, encoded["input_ids"])
        mine = [own[i - 1] for i in range(1, len(own) + 1) if encoded["labels"][i] != -100]
        nats += mine
        by_source[row["source"]] += mine
    padded = DataCollatorForAssistantOnlyLM(TOKENIZER)
    packed = DataCollatorWithEosPacking(TOKENIZER, max_length=200)
    for collator in (padded, packed):
        for batch_size in (1, 4, 7, 16):
            run = trainer(tmp_path, model=model, collator=collator, per_device_eval_batch_size=batch_size)
            metrics = run.evaluate()
            assert metrics["eval_num_tokens"] == len(nats)
            assert metrics["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
            assert metrics["eval_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
            for name, own in by_source.items():
                assert metrics[f"eval_{name}_loss"] == pytest.approx(sum(own) / len(own), rel=1e-6)
    assert 0 < metrics["eval_stop_probability"] < 1


def test_a_stream_evaluates_to_the_same(tmp_path):
    run = trainer(tmp_path)
    stream = IterableDataset.from_generator(chats)
    assert run.evaluate(stream)["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-9)
    several = run.evaluate({"a": chats(5), "b": chats()})
    assert several["eval_b_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-9)


def test_evaluation_metrics_have_the_parents_keys_too(tmp_path):
    metrics = trainer(tmp_path).evaluate(metric_key_prefix="test")
    assert {"test_loss", "test_runtime", "test_samples_per_second", "test_perplexity"} <= metrics.keys()


def gradient(tmp_path, batch_size, accumulation, collator=None):
    model = llama()
    seen = {}

    class Stop(Exception):
        pass

    class Catch(PerplexityTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
            raise Stop

    run = Catch(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        ),
        collator,
        train_dataset=chats(8),
        processing_class=TOKENIZER,
    )
    with pytest.raises(Stop):
        run.train()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_do_not_depend_on_batching(tmp_path, batch_size, accumulation, packed):
    collator = DataCollatorWithEosPacking(TOKENIZER, max_length=400) if packed else None
    expected, found = by_autograd(), gradient(tmp_path, batch_size, accumulation, collator)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value, atol=1e-5 * scale), name


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # the weights of a step may sum to less than 1
def test_loss_weights_weigh(scale, tmp_path):
    row = encode_row(TOKENIZER, chats()[3])
    model = llama()
    nats = nats_of(model, row["input_ids"])
    trained = [i for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    weights = [0.0] * len(row["labels"])
    for n, i in enumerate(trained):
        weights[i] = scale * (n % 3)
    expected = sum(nats[i - 1] * weights[i] for i in trained) / sum(weights)
    rows = [{**row, "loss_weights": weights}] * 2
    run = trainer(tmp_path, model=model, rows=rows, max_steps=1, learning_rate=0.0)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_loss_by_hand_outside_of_a_run(tmp_path):
    run = trainer(tmp_path, model=mixtral())
    batch = run.data_collator(chats(4))
    with torch.no_grad():
        expected = run.model(**batch, use_cache=False).loss
    count = (batch["labels"][:, 1:] != -100).sum()
    for number in (None, count):
        assert float(run.compute_loss(run.model, dict(batch), num_items_in_batch=number)) == pytest.approx(
            float(expected), rel=1e-6
        )


@pytest.mark.slow
def test_label_smoothing_is_weighed_too(tmp_path):
    row = encode_row(TOKENIZER, chats()[3])
    model = llama()
    trained = [i for i in range(1, len(row["labels"])) if row["labels"][i] != -100]
    weights = [0.0] * len(row["labels"])
    for n, i in enumerate(trained):
        weights[i] = float(n % 3)
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        each = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
    expected = sum(float(each[i - 1]) * weights[i] for i in trained) / sum(weights)
    options = {"max_steps": 1, "learning_rate": 0.0, "label_smoothing_factor": 0.1}
    run = trainer(tmp_path, model=model, rows=[{**row, "loss_weights": weights}] * 2, **options)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_half_precision_of_an_evaluation(tmp_path):
    run = trainer(tmp_path, bf16_full_eval=True)
    run.evaluate()
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.bfloat16}
    run = trainer(tmp_path, bf16_full_eval=True)
    run.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match="not a sharded one; use bf16 or fp16"):
        run.evaluate()


@pytest.mark.slow
def test_smoothing_and_z_loss(tmp_path):
    """Against torch's label smoothing and the definition of z-loss."""
    row = encode_row(TOKENIZER, chats()[3])
    model = llama()
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        z = logits.logsumexp(-1)[labels != -100].square().mean()
    run = trainer(
        tmp_path, model=model, rows=[row] * 2, max_steps=1, learning_rate=0.0, label_smoothing_factor=0.1, z_loss=0.01
    )
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(float(smoothed + 0.01 * z), rel=1e-5)


@pytest.mark.slow
def test_logs(tmp_path):
    run = trainer(tmp_path, rows=chats(4), per_device_train_batch_size=4, max_steps=2)
    run.train()
    first, second = run.state.log_history[:2]
    supervised = sum(label != -100 for row in chats(4) for label in encode_row(TOKENIZER, row)["labels"])
    assert (first["num_supervised_tokens"], second["num_supervised_tokens"]) == (supervised, 2 * supervised)
    assert first["perplexity"] == pytest.approx(math.exp(first["loss"]), rel=1e-6)
    sizes = [len(encode_row(TOKENIZER, row)["input_ids"]) for row in chats(4)]
    assert first["padding_share"] == pytest.approx(1 - sum(sizes) / (4 * max(sizes)))
    assert first["tokens_per_second"] > 0


@pytest.mark.slow
def test_stop_tokens_that_were_trained_stop_the_saved_model(tmp_path):
    """The template ends turns with a token that is not the tokenizer's EOS, as Llama 3's and Gemma's do."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = llama()
    model.generation_config = GenerationConfig(eos_token_id=3)
    run = PerplexityTrainer(model, arguments(tmp_path), train_dataset=chats(), processing_class=tokenizer)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.eos_token_id
    assert stop in saved and tokenizer.eos_token_id in saved


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 5}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class Chats(OrderedStream):
    """Row n is conversation n; keeps which rows were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def rows(self, begin, end):
        for n in range(begin, end):
            self.read.append(n)
            yield chats(n + 1)[n]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_at_its_next_row_as_if_it_had_not_stopped(tmp_path, workers):
    """With dropout, so that the run's random state counts too; at step 3 of 6, and again at step 4 under larger batches."""
    options = {
        **{"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "seed": 5, "gradient_accumulation_steps": 2},
        **{"learning_rate": 1e-3, "dataloader_num_workers": workers},
    }

    def run(checkpoint=None, **more):
        model = llama()
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        run = trainer(tmp_path, model=model, rows=Chats(), **{**options, **more})
        run.train(resume_from_checkpoint=checkpoint and str(tmp_path / f"checkpoint-{checkpoint}"))
        return run

    whole, resumed = run(), run(3)
    assert [log["loss"] for log in whole.state.log_history if "loss" in log] == [
        log["loss"] for log in resumed.state.log_history if "loss" in log
    ]
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    larger = run(4, per_device_train_batch_size=3, max_steps=5)
    if not workers:  # a worker's reading is its own; one batch is read ahead
        assert whole.train_dataset.read == list(range(6 * 4 + 2))
        assert resumed.train_dataset.read == list(range(3 * 4, 6 * 4 + 2))
        assert larger.train_dataset.read == list(range(4 * 4, 4 * 4 + 2 * 3 + 3))


def stream_row(folder, step) -> int:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["train_stream"]["row"]


@pytest.mark.slow
def test_the_place_in_a_stream_counts_each_row_once_whatever_saves_and_however_large_batches_become(tmp_path):
    trainer(tmp_path / "a", rows=Chats(), max_steps=4, save_strategy="epoch").train()
    assert stream_row(tmp_path / "a", 4) == 4 * 2
    larger = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    run = trainer(tmp_path / "a", rows=Chats(), **larger)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert stream_row(tmp_path / "a", 6) == 4 * 2 + 2 * 4
    assert run.train_dataset.read[: 2 * 4] == list(range(8, 16))


def test_batches_that_accelerate_would_split_are_refused_with_a_stream(tmp_path):
    with pytest.raises(ConfigError, match="split_batches"):
        trainer(tmp_path, rows=Chats(), accelerator_config={"split_batches": True})


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_no_checkpoint_of_a_stream(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ConfigError, match="checkpoint of step 1 does not say where its stream stood"):
        trainer(tmp_path, rows=Chats()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.slow
def test_supervised_tokens_are_counted_over_a_resume(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "seed": 5}
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    counts = [
        {log["step"]: log["num_supervised_tokens"] for log in run.state.log_history if "loss" in log}
        for run in (whole, resumed)
    ]
    assert counts[0] == counts[1] and sorted(counts[0]) == [2, 3, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_other_settings_train(tmp_path, options):
    run = trainer(tmp_path, **options)
    assert math.isfinite(run.train().training_loss)


@pytest.mark.slow
@pytest.mark.parametrize("asked_by", [pytest.param("arguments", marks=pytest.mark.long), "accelerate"])
def test_a_compiled_model_has_the_losses_of_the_eager_one(tmp_path, monkeypatch, caplog, asked_by):
    warn_once.cache_clear()
    eager = trainer(tmp_path)
    expected = [eager.train().training_loss, eager.evaluate()["eval_loss"]]
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")  # torch_compile sets it too, and monkeypatch undoes it
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if asked_by == "arguments" else {}
    compiled = trainer(tmp_path, **options)
    assert [compiled.train().training_loss, compiled.evaluate()["eval_loss"]] == pytest.approx(expected, rel=1e-6)
    assert "torch.compile is on; computing full logits" in caplog.text


@pytest.mark.slow
def test_lora_trains_and_saves(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run = trainer(tmp_path, model=model)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    saved = json.loads((tmp_path / "adapter" / "generation_config.json").read_text())
    assert TOKENIZER.eos_token_id in (
        [saved["eos_token_id"]] if isinstance(saved["eos_token_id"], int) else saved["eos_token_id"]
    )


@pytest.mark.slow
def test_raw_rows_of_a_dataset_are_collated_without_further_settings(tmp_path):
    run = trainer(tmp_path, rows=Dataset.from_list([{"messages": PLAIN}] * 4))
    assert math.isfinite(run.train().training_loss)


def test_what_cannot_be_exact_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="never gathered"):
        PerplexityTrainer(llama(), arguments(tmp_path), compute_metrics=lambda _: {})
    run = trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"evaluate\(test_dataset, metric_key_prefix='held_out'\)"):
        run.predict(chats(2), metric_key_prefix="held_out")
    with pytest.raises(NothingSupervisedError, match="no row of the evaluation data"):
        run.evaluate([{"input_ids": [1, 2], "labels": [-100, -100]}])


@pytest.mark.parametrize(
    "name",
    [
        "compute_loss",
        "training_step",
        "evaluation_loop",
        "predict",
        "save_model",
        "get_train_dataloader",
    ],
)
def test_contact_with_transformers(name):
    """If this fails, transformers' Trainer moved: mend hf_objectives/trainers/causal_lm.py."""
    ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (PerplexityTrainer, Trainer))
    assert list(ours.parameters) == list(theirs.parameters), f"Trainer.{name} changed its arguments"


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_of_each_source_is_logged(tmp_path, packed):
    """Nats over trained tokens of each source, over the micro-batches of all steps since the last log."""
    collator = DataCollatorWithEosPacking(TOKENIZER, max_length=400) if packed else None
    rows = chats(16)
    run = trainer(tmp_path, collator=collator, rows=rows, learning_rate=0.0, gradient_accumulation_steps=2, max_steps=4,
                  logging_steps=2, per_device_train_batch_size=2, train_sampling_strategy="sequential")  # fmt: skip
    run.train()
    logs = [log for log in run.state.log_history if "loss" in log]
    for log, part in zip(logs, (rows[:8], rows[8:]), strict=True):
        sums = {}
        for row in part:
            encoded = encode_row(TOKENIZER, row)
            nats = nats_of(llama(), encoded["input_ids"])
            total = sums.setdefault(row["source"], [0.0, 0])
            for value, label in zip(nats, encoded["labels"][1:], strict=True):
                total[0], total[1] = total[0] + value * (label != -100), total[1] + (label != -100)
        for name, (nats, tokens) in sums.items():
            assert log[f"loss/{name}"] == pytest.approx(nats / tokens, rel=1e-5)
    whole = trainer(tmp_path, rows=[{**row, "source": "one"} for row in rows], learning_rate=0.0)
    whole.train()
    assert not any(key.startswith("loss/") for log in whole.state.log_history for key in log)


def test_another_implementation_of_head_and_loss_has_the_same_losses(tmp_path):
    losses = [
        [log["loss"] for log in run.state.log_history if "loss" in log]
        for run in (trainer(tmp_path, head_implementation=name) for name in ("chunked", "torch"))
        if run.train()
    ]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-6)
    with pytest.raises(
        ConfigError, match="implementation 'torch' has no label smoothing, z-loss.*expected one of chunked"
    ):
        trainer(tmp_path, head_implementation="torch", z_loss=1e-4).train()
    with pytest.raises(ConfigError, match="head_implementation is 'tirch'.*did you mean 'torch'"):
        arguments(tmp_path, head_implementation="tirch")


def test_a_label_outside_the_head_is_named_with_row_and_token(tmp_path):
    run = trainer(tmp_path)
    labels = torch.full((2, 6), -100)
    labels[1, 4] = 264
    with pytest.raises(DataError, match="row 1: token 3 is to predict id 264; expected 0 to 263"):
        run.compute_loss(run.model, {"input_ids": torch.ones(2, 6, dtype=torch.long), "labels": labels})
