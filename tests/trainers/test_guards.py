"""Non-finite losses stop before the weights change; trained stop tokens stop the saved model; leaks stop packing."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, LlamaConfig, MambaConfig, MambaForCausalLM

from hf_objectives.collators import DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, NonFiniteError, PackingLeakError, StopTokenError
from hf_objectives.trainers.guards import check_stream, ensure_stop_tokens
from tests.support.language_models import TOKENIZER, llama, poisoned, rows_with_a_bad_one, trainer


@pytest.mark.slow
@pytest.mark.parametrize(("packed", "max_grad_norm"), [(False, 1.0), (True, 0.0)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, packed, max_grad_norm):
    model = poisoned()
    before = {}
    run = trainer(
        tmp_path,
        model=model,
        rows=rows_with_a_bad_one(),
        collator=DataCollatorWithEosPacking(TOKENIZER, max_length=300) if packed else None,
        max_steps=8,
        max_grad_norm=max_grad_norm,
        check_isolation=False,  # the poison itself spreads over a packed row
    )
    step = run.optimizer_step_count = 0
    original = run._get_grad_norm

    def remember(model, grad_norm=None):
        before.clear()
        before.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return original(model, grad_norm)

    run._get_grad_norm = remember
    with pytest.raises(NonFiniteError, match="source 'odd', row 5: .*Zap") as caught:
        run.train()
    step = run.state.global_step + 1
    assert f"step {step}: loss nan" in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    report = json.loads((tmp_path / f"non_finite_step_{step}_rank_0.json").read_text())
    assert any(row["row"] == 5 and "Zap" in row["text"] for row in report["rows"])


@pytest.mark.slow
def test_the_guard_can_be_switched_off(tmp_path):
    run = trainer(tmp_path, model=poisoned(), rows=rows_with_a_bad_one(), max_steps=8, stop_on_non_finite=False)
    run.train()
    assert run.state.global_step == 8


@pytest.mark.slow
def test_a_model_that_leaks_is_not_trained_packed(tmp_path):
    model = MambaForCausalLM(MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=1, state_size=4))
    packing = DataCollatorWithEosPacking(TOKENIZER, max_length=300)
    for act in ("train", "evaluate"):
        with pytest.raises(PackingLeakError, match="see each other"):
            getattr(trainer(tmp_path, model=model, collator=packing), act)()
    assert trainer(tmp_path, model=model).train().global_step == 2  # unpacked is fine


def test_ensure_stop_tokens(caplog):
    model = llama()
    end = TOKENIZER.eos_token_id
    for before, after in ((None, end), (end, end), (3, [3, end]), ([3, end], [3, end])):
        model.generation_config = GenerationConfig(eos_token_id=before)
        with caplog.at_level(logging.WARNING):
            ensure_stop_tokens(model, [end], TOKENIZER)
        assert model.generation_config.eos_token_id == after
    assert "added '<|im_end|>' to the generation config's EOS ids" in caplog.text
    model.generation_config = None
    with pytest.raises(StopTokenError, match="'<|im_end|>', and the model has no generation config"):
        ensure_stop_tokens(model, [end], TOKENIZER)
    assert ensure_stop_tokens(model, [], TOKENIZER) == []
    assert LlamaConfig is not None


def test_a_stream_in_parts_has_no_row_numbers():
    stream = Dataset.from_list([{"a": 1}] * 8).to_iterable_dataset(num_shards=2)
    check_stream(stream, 1, "eval")
    check_stream(Dataset.from_list([{"a": 1}]), 4, "eval")
    with pytest.raises(ConfigError, match="'eval' is a stream of 2 shards"):
        check_stream(stream, 2, "eval")
