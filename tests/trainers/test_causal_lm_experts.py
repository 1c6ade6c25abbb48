"""A mixture of experts is trained on its own loss: cross-entropy and the balance of its experts."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.trainers import PerplexityTrainer
from tests.support.language_models import TOKENIZER, arguments, chats, trainer

SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.3,
}  # fmt: skip


def experts(kind: str = "mixtral", *, router: bool = True):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=router)
    else:
        config = Qwen3MoeConfig(
            **SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8, output_router_logits=router
        )
    return AutoModelForCausalLM.from_config(config).eval()


def own_loss(model, batches):
    """The model's own loss of a step: cross-entropy over all its tokens, and the mean of the micro-batches' balance."""
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    aux = []
    total = 0.0
    for batch in batches:
        output = model(**batch, num_items_in_batch=count, use_cache=False)
        balance = 0.0 if output.aux_loss is None else SIZES["router_aux_loss_coef"] * output.aux_loss
        total = total + (output.loss - balance) + balance / len(batches)
        aux.append(None if output.aux_loss is None else float(output.aux_loss.detach()))
    return total, aux


def step_of(model, folder, collator, **options):
    """Gradients and log of one step over eight rows."""
    seen = {}

    class Catch(PerplexityTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return super()._get_grad_norm(model, grad_norm)

    run = Catch(
        model,
        arguments(folder, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, train_sampling_strategy="sequential", **options),
        collator,
        train_dataset=[{k: v for k, v in row.items() if k != "source"} for row in chats(8)],
        eval_dataset=chats(8),
        processing_class=TOKENIZER,
    )  # fmt: skip
    run.train()
    return seen, run


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_loss_and_gradient_are_the_models_own(tmp_path, kind, accumulation, packed):
    collator = DataCollatorForAssistantOnlyLM(TOKENIZER)
    if packed:
        collator = DataCollatorWithEosPacking(TOKENIZER, max_length=200)
    rows, size = chats(8), 8 // accumulation
    batches = [collator(rows[i : i + size]) for i in range(0, 8, size)]
    judge = experts(kind)
    expected, aux = own_loss(judge, batches)
    expected.backward()
    found, run = step_of(
        experts(kind), tmp_path, collator, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
    )
    log = run.state.log_history[0]
    assert log["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    assert log["aux_loss"] == pytest.approx(sum(aux) / len(aux), rel=1e-6)
    nats = float(expected.detach()) - SIZES["router_aux_loss_coef"] * sum(aux) / len(aux)
    assert log["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    scale = max(float(p.grad.abs().max()) for p in judge.parameters() if p.grad is not None)
    for name, parameter in judge.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-5 * scale), name


@pytest.mark.slow
def test_without_router_logits_there_is_no_auxiliary_loss_and_an_evaluation_never_has_it(tmp_path):
    collator = DataCollatorForAssistantOnlyLM(TOKENIZER)
    expected, aux = own_loss(experts(router=False), [collator(chats(8))])
    _, without = step_of(experts(router=False), tmp_path, collator, per_device_train_batch_size=8)
    assert aux == [None] and "aux_loss" not in without.state.log_history[0]
    assert without.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
    _, run = step_of(experts(), tmp_path, collator, per_device_train_batch_size=8)
    assert (
        run.evaluate()["eval_loss"]
        == without.evaluate()["eval_loss"]
        == pytest.approx(float(expected.detach()), rel=1e-6)
    )


@pytest.mark.slow
def test_the_logged_auxiliary_loss_is_the_mean_over_steps(tmp_path):
    """Five rows: a step of two micro-batches of two, and one of a single row."""
    options = {"learning_rate": 0.0, "num_train_epochs": 1, "max_steps": -1, "train_sampling_strategy": "sequential"}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one, both = (trainer(tmp_path, model=experts(), rows=chats(5), logging_steps=steps, **options) for steps in (1, 2))
    for run in (one, both):
        run.train()
    each = [log["aux_loss"] for log in one.state.log_history if "aux_loss" in log]
    assert len(each) == 2 and each[0] != each[1]
    assert both.state.log_history[0]["aux_loss"] == pytest.approx(sum(each) / 2, rel=1e-6)
