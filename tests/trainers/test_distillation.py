"""The distillation trainer: its loss and gradient by hand, on given answers and on the student's own."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_objectives.errors import ConfigError
from hf_objectives.trainers import distillation as module
from tests.support.distillation_worlds import (
    CHATS,
    LETTERS,
    ROWS,
    by_hand,
    distillation,
    divergence,
    encoded,
    loud,
    student,
    teacher,
)
from tests.support.ppo_worlds import logged

ALL = {"per_device_train_batch_size": len(ROWS), "max_steps": 1, "shuffle_dataset": False}


def given_batch(run):
    """All rows as one batch, of the answers that they have."""
    run.model.train()
    return run.given_answers([*run.train_dataset])


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.3, 1.7), (1.0, 0.6)])
def test_the_loss_is_the_papers(tmp_path, beta, temperature):
    run = distillation(tmp_path, lmbda=0.0, beta=beta, temperature=temperature, **ALL)
    sums = by_hand(run, encoded(CHATS))
    assert sums["tokens"] == 20 and sums["divergence"] > 1
    loss = run.compute_loss(run.model, given_batch(run)).detach()
    assert float(loss) == pytest.approx(sums["divergence"] / sums["tokens"], rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_the_loss(tmp_path, beta):
    """Against autograd in float64, of rows without padding; the teacher has none."""
    run = distillation(tmp_path, lmbda=0.0, beta=beta, temperature=1.3, **ALL)
    run.compute_loss(run.model, given_batch(run)).backward()
    model, other = (copy.deepcopy(one).double() for one in (run.model, run.teacher_model))
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in encoded(CHATS):
        trained = torch.tensor(labels[1:]) != -100
        log_q, log_p = (
            (one(input_ids=torch.tensor([ids])).logits[0, :-1][trained] / 1.3).log_softmax(-1) for one in (model, other)
        )
        log_p = log_p.detach()
        if beta in (0.0, 1.0):
            a, b = (log_p, log_q) if beta == 0.0 else (log_q, log_p)
            total = total + (a.exp() * (a - b)).sum()
        else:
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            total = total + beta * (log_p.exp() * (log_p - log_m)).sum()
            total = total + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum()
    (total / 20).backward()
    expected = dict(model.named_parameters())
    scale = max(float(one.grad.abs().max()) for one in expected.values())
    for name, parameter in run.model.named_parameters():
        assert torch.allclose(parameter.grad.double(), expected[name].grad, atol=1e-5 * scale), name
    assert all(parameter.grad is None for parameter in run.teacher_model.parameters())


def test_the_ends_of_beta_are_the_two_kl_divergences():
    """JSD(beta) / beta and JSD(beta) / (1 - beta) of the paper, section 2, by the loops that the tests compare with."""
    p, q = [0.3, -1.0, 2.0, 0.0], [1.1, 0.4, -0.5, 0.2]
    assert divergence(p, q, 1e-6) / 1e-6 == pytest.approx(divergence(p, q, 0.0), rel=1e-4)
    assert divergence(p, q, 1 - 1e-6) / 1e-6 == pytest.approx(divergence(p, q, 1.0), rel=1e-4)
    assert divergence(p, q, 0.5) == pytest.approx(divergence(q, p, 0.5)) and divergence(p, q, 0.5) < math.log(2)


def test_what_is_trained_of_a_row(tmp_path):
    """Both answers of the second chat and not the question between; nothing after the last answer."""
    rows = [{"messages": [*CHATS[1], {"role": "user", "content": "d"}]}] * 2
    run = distillation(tmp_path, rows, lmbda=0.0)
    batch = run.given_answers([*run.train_dataset][:1])
    words = {name: LETTERS.decode(batch[f"{name}_ids"][0]) for name in ("prompt", "completion")}
    assert words == {"prompt": "u c ask", "completion": "d e <eos> u a ask b c <eos>"}
    assert batch["tool_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 1, 1, 1]]


def test_the_students_own_answers(tmp_path):
    """The loss of a step on them, with the tokens that it drew."""
    seen = []

    class Noted(module.PerplexityDistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(({**inputs}, copy.deepcopy(model).eval()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = distillation(tmp_path, kind=Noted, beta=0.4, per_device_train_batch_size=3, gradient_accumulation_steps=2,
                       max_steps=2, learning_rate=0.1, rows=[{"prompt": chat[:1]} for chat in CHATS])  # fmt: skip
    run.train()
    assert logged(run, "on_policy") == [1.0, 1.0]
    for step, loss in enumerate(logged(run, "loss")):
        rows, run.model = [], seen[2 * step][1]
        for batch, _ in seen[2 * step : 2 * step + 2]:
            for i in range(3):
                begin, answer = (
                    batch[f"{name}_ids"][i][batch[f"{name}_mask"][i].bool()].tolist()
                    for name in ("prompt", "completion")
                )
                assert LETTERS.decode(begin).endswith("ask") and 1 <= len(answer) <= 4
                rows.append((begin + answer, [-100] * len(begin) + answer))
        sums = by_hand(run, rows)
        assert loss == pytest.approx(sums["divergence"] / sums["tokens"], rel=1e-5)
        assert logged(run, "entropy")[step] == pytest.approx(sums["entropy"] / sums["tokens"], rel=1e-5)


@pytest.mark.slow
def test_a_share_of_the_steps_is_on_own_answers(tmp_path):
    run = distillation(tmp_path, lmbda=0.4, max_steps=40)
    run.train()
    draws = [np.random.default_rng((run.args.seed, step)).random() < 0.4 for step in range(1, 41)]
    assert logged(run, "on_policy") == [float(one) for one in draws] and 5 < sum(draws) < 30


@pytest.mark.slow
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_the_student_learns(tmp_path, lmbda):
    run = distillation(tmp_path, lmbda=lmbda, beta=0.5, max_steps=60, learning_rate=2e-2, eval_dataset=ROWS,
                       per_device_train_batch_size=6)  # fmt: skip
    name = "eval_on_policy_divergence" if lmbda else "eval_divergence"
    before = run.evaluate()[name]
    run.train()
    assert run.evaluate()[name] < before / 2


@pytest.mark.parametrize("bf16", [False, True])
def test_both_models_run_in_the_dtype_of_the_run(tmp_path, monkeypatch, bf16):
    """TRL's own loss leaves autocast, and so `bf16`, aside."""
    found, usual = [], module.token_divergences

    def note(head, other, **options):
        found.append(torch.is_autocast_enabled("cpu"))
        return usual(head, other, **options)

    monkeypatch.setattr(module, "token_divergences", note)
    distillation(tmp_path, bf16=bf16, max_steps=1).train()
    assert found == [bf16]


def learned_positions(seed: int, width: int):
    torch.manual_seed(seed)
    sizes = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": None, "eos_token_id": 1}
    config = GPT2Config(vocab_size=len(LETTERS), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, pad_token_id=0, **sizes)
    return loud(GPT2LMHeadModel(config).eval(), seed)


def test_positions_begin_behind_the_padding(tmp_path):
    """TRL counts the padding before a prompt, so that the loss of a row depends on the longest prompt of its batch."""
    run = distillation(tmp_path, lmbda=0.0, model=learned_positions(1, 16), of=learned_positions(2, 24), **ALL)
    sums = by_hand(run, encoded(CHATS))
    assert float(run.compute_loss(run.model, given_batch(run)).detach()) == pytest.approx(
        sums["divergence"] / 20, rel=1e-5
    )


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapters(tmp_path, saved):
    """Adapters alone, and a head that is trained and saved whole beside them."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    run = distillation(tmp_path, lmbda=0.0, peft_config=lora, learning_rate=0.1, beta=0.2, **{**ALL, "max_steps": 3})
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    changed = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name or ("lm_head" in name and saved) for name in changed)
    assert any("lm_head" in name for name in changed) == bool(saved)
    sums = by_hand(run, encoded(CHATS))
    assert float(run.compute_loss(run.model, given_batch(run)).detach()) == pytest.approx(
        sums["divergence"] / 20, rel=1e-5
    )


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path):
    lora = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        distillation(tmp_path, peft_config=lora)


def test_the_student_stops_where_the_teacher_does(tmp_path, caplog):
    other = teacher()
    other.generation_config.eos_token_id = [1, LETTERS.convert_tokens_to_ids("e")]
    with caplog.at_level(logging.WARNING):
        run = distillation(tmp_path, of=other, max_steps=1)
    assert "added 'e' to the generation config's EOS ids" in caplog.text
    assert run.generation_config.eos_token_id == [1, 8] and run.model.generation_config.eos_token_id == [1, 8]
    run.save_model()
    assert type(run.model).from_pretrained(tmp_path).generation_config.eos_token_id == [1, 8]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Also within an epoch, with both kinds of steps, and of weights to the bit."""
    options = {"lmbda": 0.5, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2,
               "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "eval_dataset": ROWS,
               "eval_strategy": "steps", "eval_steps": 2}  # fmt: skip
    dropped = {"attention_dropout": 0.2}
    whole = distillation(tmp_path / "whole", model=student(**dropped), **options)
    whole.train()
    assert {*logged(whole, "on_policy")} == {0.0, 1.0}
    for step in (2, 4):
        again = distillation(tmp_path / f"from {step}", model=student(**dropped), **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), name
        for key in ("loss", "grad_norm", "eval_loss", "eval_perplexity", "num_tokens"):
            assert logged(again, key) == logged(whole, key), key


def test_a_model_of_texts_is_watched(tmp_path):
    run = distillation(tmp_path, eval_lm_datasets=[{"text": "a b c d"}], max_perplexity_increase=1e-9, learning_rate=0.1,
                       eval_strategy="steps", eval_steps=1, max_steps=9, eval_dataset=ROWS)  # fmt: skip
    run.train()
    assert {"eval_lm_perplexity", "eval_perplexity"} <= {key for log in run.state.log_history for key in log}
    assert run.state.global_step < 9


def test_rows_of_a_dataset_and_of_a_stream(tmp_path):
    """The same steps from both, where the stream is not shuffled."""
    runs = []
    for rows in (Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()):
        run = distillation(
            tmp_path, rows, shuffle_dataset=False, lmbda=0.5, max_steps=3, learning_rate=0.1, remove_unused_columns=True
        )
        run.train()
        runs.append(logged(run, "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"of": student(), "model": student()}, "gives the student's own logits"),
        ({"tools": [len]}, "tools are not supported"),
        ({"per_device_train_batch_size": 7}, "train_dataset has 6 rows and a step takes 7"),
        ({"rows": []}, "train_dataset has no rows"),
        (
            {"max_completion_length": 26, "max_steps": 3},
            "the prompt of row 1 has 9 tokens, which with max_completion_length=26 is over",
        ),
        ({"rows": Dataset.from_list(ROWS).to_iterable_dataset(), "eval_dataset": 3}, "eval_dataset is int"),
    ],
)
def test_what_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        distillation(tmp_path, **options).train()


def test_one_model_as_both_is_refused(tmp_path):
    model = student()
    with pytest.raises(ConfigError, match="gives the student's own logits"):
        distillation(tmp_path, model=model, of=model)


def test_a_teacher_is_needed_and_a_config_of_ours(tmp_path):
    args = distillation(tmp_path).args
    with pytest.raises(ConfigError, match="teacher_model is missing"):
        module.PerplexityDistillationTrainer(student(), None, args, train_dataset=ROWS, processing_class=LETTERS)
    with pytest.raises(ConfigError, match="args is DistillationConfig; expected PerplexityDistillationConfig"):
        parent = type(args).__mro__[2]
        theirs = parent(str(tmp_path), use_cpu=True, bf16=False)
        module.PerplexityDistillationTrainer(student(), teacher(), theirs, train_dataset=ROWS)
    run = distillation(tmp_path)
    with pytest.raises(ConfigError, match="logits are never made whole"):
        run.compute_loss(run.model, given_batch(run), return_outputs=True)


def test_checkpointed_activations_change_nothing(tmp_path):
    runs = []
    for gradient_checkpointing in (False, True):
        run = distillation(
            tmp_path, lmbda=0.5, max_steps=3, learning_rate=0.1, gradient_checkpointing=gradient_checkpointing
        )
        run.train()
        runs.append([logged(run, key) for key in ("loss", "grad_norm")])
    assert runs[0] == [pytest.approx(values, rel=1e-5) for values in runs[1]]


def test_the_auxiliary_loss_of_experts_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
    config = MixtralConfig(
        vocab_size=len(LETTERS), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes, **experts
    )
    run = distillation(tmp_path, model=MixtralForCausalLM(config))
    assert run.teacher_model is not None
    config.output_router_logits = True
    with pytest.raises(ConfigError, match="set output_router_logits=False"):
        distillation(tmp_path, model=MixtralForCausalLM(config))


def test_a_frozen_student_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no parameter of the student requires a gradient"):
        distillation(tmp_path, model=student().requires_grad_(False))
