"""Head and loss in one of real architectures, against autograd through the model's own logits."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from hf_objectives.errors import DataError
from hf_objectives.evaluation.head import After, after_head, warn_once
from hf_objectives.evaluation.logits import next_token_outputs
from tests.evaluation.test_logits import CONFIGS, build, inputs

ADAPTERS = {
    "none": None,
    "body": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "whole head": {"target_modules": ["q_proj", "c_attn"], "modules_to_save": ["lm_head"]},
}


def adapted(model, name, **options):
    if ADAPTERS[name] is None:
        return model
    model = get_peft_model(model, LoraConfig(**ADAPTERS[name], task_type="CAUSAL_LM", **options))
    torch.manual_seed(3)
    for key, weight in model.named_parameters():
        if "lora_B" in key:  # it begins at 0, where adapters change nothing
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def afterwards(model, change):
    """Let a model change its logits."""

    def hook(module, args, output):
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(hook)


def targets():
    labels = torch.randint(3, 99, (3, 10), generator=torch.Generator().manual_seed(2))
    labels[torch.rand(3, 10, generator=torch.Generator().manual_seed(4)) < 0.5] = -100
    return labels


def gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def by_logits(model, chosen):
    logits = model(**inputs(), use_cache=False).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits.float(), chosen.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_models_logits(name, adapter, caplog):
    model, chosen = adapted(build(name), adapter), targets()
    expected, by_name = by_logits(model, chosen)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    with caplog.at_level(logging.WARNING):
        result, _ = next_token_outputs(model, inputs(), chosen)
    assert rows == [16, 0] and not caplog.text  # the logits of the proof, then none
    result.loss.backward()
    found = gradients(model)
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert found.keys() == by_name.keys()
    for key, gradient in by_name.items():
        assert torch.allclose(found[key], gradient, atol=1e-5 * float(gradient.abs().max())), key


@pytest.mark.parametrize(
    ("name", "after"),
    [("llama", After()), ("gemma2", After(3.0, 1.0)), ("cohere", After(None, 0.25)), ("granite", After(None, 0.25))],
)
def test_what_models_do_after_their_head(name, after):
    model = build(name).train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding)).eval()
    state = torch.get_rng_state()
    assert after_head(model) == after
    assert model.training and not frozen.training and torch.equal(torch.get_rng_state(), state)


def test_a_model_that_does_something_else_gives_its_own_logits(caplog):
    """What no setting tells: a bias that the model adds after its head."""
    warn_once.cache_clear()
    model, chosen = build("llama"), targets()
    added = torch.linspace(-1, 1, 99)
    afterwards(model, lambda logits: logits + added)
    expected, by_name = by_logits(model, chosen)
    for _ in range(2):
        result, _ = next_token_outputs(model, inputs(), chosen)
        result.loss.backward()
        assert result.loss.item() == pytest.approx(expected, rel=1e-6)
        for key, gradient in gradients(model).items():
            assert torch.allclose(gradient, by_name[key], atol=1e-6)
    assert caplog.text.count("LlamaForCausalLM: head and loss in one differs from its own logits by") == 1


def test_a_soft_cap_that_no_setting_tells_shows_in_large_logits(caplog):
    warn_once.cache_clear()
    model = build("gemma2")
    model.config.final_logit_softcapping = 30.0  # its logits are below 1
    assert after_head(model) == After(30.0)
    other = build("llama").bfloat16()
    afterwards(other, lambda logits: 30 * torch.tanh(logits / 30))
    assert after_head(other) is None
    assert "differs from its own logits by" in caplog.text


def test_a_head_that_is_no_linear_layer_gives_its_own_logits(caplog):
    warn_once.cache_clear()

    class Cosine(torch.nn.Linear):
        def forward(self, hidden):
            return torch.nn.functional.linear(torch.nn.functional.normalize(hidden, dim=-1), self.weight)

    model, chosen = build("llama"), targets()
    model.lm_head = Cosine(32, 99, bias=False)
    result, _ = next_token_outputs(model, inputs(), chosen)
    assert result.loss.item() == pytest.approx(by_logits(model, chosen)[0], rel=1e-6)
    assert "LlamaForCausalLM: head and loss in one needs a plain linear head" in caplog.text


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_of_another_kind_give_their_own_logits(options):
    model, chosen = adapted(build("llama"), "head", **options), targets()
    result, _ = next_token_outputs(model, inputs(), chosen)
    assert result.loss.item() == pytest.approx(by_logits(model, chosen)[0], rel=1e-6)


def test_adapters_whose_parts_are_no_layers_give_their_own_logits():
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head"], init_r=4, total_step=10, tinit=1, tfinal=2
    )
    model, chosen = get_peft_model(build("llama"), config).eval(), targets()
    before = by_logits(model, chosen)[0]
    for key, weight in model.named_parameters():
        if "lora" in key:
            torch.nn.init.normal_(weight, std=0.2)
    result, _ = next_token_outputs(model, inputs(), chosen)
    assert result.loss.item() == pytest.approx(by_logits(model, chosen)[0], rel=1e-6) != before


def test_adapters_switched_off_merged_and_with_dropout():
    model, chosen = adapted(build("llama"), "head", lora_dropout=0.5).train(), targets()
    torch.manual_seed(5)
    expected, by_name = by_logits(model, torch.arange(3, 33).reshape(3, 10))
    everywhere, _ = next_token_outputs(model, inputs(), torch.arange(3, 33).reshape(3, 10))  # proves
    torch.manual_seed(5)
    everywhere, _ = next_token_outputs(model, inputs(), torch.arange(3, 33).reshape(3, 10))
    everywhere.loss.backward()
    assert everywhere.loss.item() == pytest.approx(expected, rel=1e-6)
    for key, gradient in gradients(model).items():
        assert torch.allclose(gradient, by_name[key], atol=1e-5 * float(by_name[key].abs().max()))
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        off = torch.nn.functional.cross_entropy(
            model(**inputs()).logits.flatten(0, 1), chosen.flatten(), reduction="sum"
        )
        assert next_token_outputs(model, inputs(), chosen)[0].nll.item() == pytest.approx(off.item(), rel=1e-6)
    on = by_logits(model, chosen)[0]
    assert abs(on - off.item()) > 1e-2
    model.merge_adapter()
    with torch.no_grad():
        assert next_token_outputs(model, inputs(), chosen)[0].nll.item() == pytest.approx(on, rel=1e-5)


def test_small_adapters_survive_half_precision():
    """Added to the weight in bfloat16, a change of a thousandth of it would be lost."""
    model, chosen = adapted(build("llama"), "head"), targets()
    model.base_model.model.lm_head.base_layer.weight.data.normal_(std=1.0)
    for key, weight in model.named_parameters():
        weight.data = weight.data.bfloat16() if "lora" not in key else weight.data * 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        next_token_outputs(model, inputs(), chosen)[0].loss.backward()
        found = gradients(model)
        _, by_name = by_logits(model, chosen)
    for key, gradient in by_name.items():
        assert torch.allclose(found[key].float(), gradient.float(), atol=5e-2 * float(gradient.abs().max())), key


def test_labels_outside_the_head_are_named():
    chosen = targets()
    chosen[1, 7] = 99
    model = build("llama")
    for full in (False, True):
        with pytest.raises(
            DataError, match="row 1: token 7 is to predict id 99; expected 0 to 98, the entries of the head"
        ):
            next_token_outputs(model, inputs(), chosen, full=full)


def test_no_target_still_reaches_the_graph():
    model = build("llama").train()
    result, _ = next_token_outputs(model, inputs(), torch.full((3, 10), -100))
    result.loss.backward()
    assert result.loss.item() == 0 and model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() == 0


class Own(torch.nn.Module):
    """A model that is none of transformers: no config, and a forward of its own."""

    def __init__(self, *needs: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.needs, self.table, self.head = needs, torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=None, **more):
        if missing := [name for name in self.needs if name not in more]:
            raise TypeError(f"forward() missing {missing}")
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


@pytest.mark.parametrize("needs", [(), ("attention_mask",)])
def test_a_model_without_a_config(needs, caplog):
    model, ids = Own(*needs), torch.arange(3, 33).reshape(3, 10)
    targets = ids.roll(-1, 1)
    result, _ = next_token_outputs(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets)
    logits = model.head(model.table(ids)).flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    assert result.nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ("no proof from ids alone" in caplog.text) == bool(needs)
