"""Models in transformers' Trainer and in ours, padded and packed: loss and gradient of single documents, or an error."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_objectives import PerplexityTrainer, PerplexityTrainingArguments
from hf_objectives.errors import PackingLeakError
from tests.support.hosts import ALONE, EXPECTED, PACKING, PADDING, RAW, TOKENIZER, arguments

pytestmark = pytest.mark.slow
ROWS = 8
WINDOW = 16  # tokens; the chats have 50 and more
SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LAYERS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma 2, soft-capped": lambda: Gemma2Config(**SIZES, **LAYERS, final_logit_softcapping=3.0),
    "gemma 3, sliding window": lambda: Gemma3TextConfig(**SIZES, **LAYERS),
    "mistral, sliding window": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "cohere, scaled": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "granite, scaled": lambda: GraniteConfig(**SIZES, logits_scaling=4.0, residual_multiplier=0.5),
}
LORA = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
ADAPTERS = {
    "LoRA": lambda: LoraConfig(**LORA),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "LoRA of the head": lambda: LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]}),
    "LoRA and a head of its own": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
}
PROMPTS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}
HOSTS = {"transformers": (Trainer, TrainingArguments), "ours": (PerplexityTrainer, PerplexityTrainingArguments)}


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS.get(name, CONFIGS["llama"])())
    adapter = {**ADAPTERS, **PROMPTS}.get(name)
    if adapter is not None:
        torch.manual_seed(1)
        model = get_peft_model(model, adapter())
    return model.eval()


def by_autograd(name):
    """Loss and gradient of the mean over all trained tokens, from the model's own logits of one document at a time."""
    model, total, count = build(name), 0.0, 0
    for ids, labels in itertools.islice(EXPECTED.items(), ROWS):
        # Prompt tuning has logits of its virtual tokens too, before those of the document.
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -len(ids) : -1]
        total = total + cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label != -100 for label in labels[1:])
    (total / count).backward()
    return (total / count).item(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradients(model)


def step(name, host, collator, folder):
    """Loss and gradient of one step of two micro-batches."""
    kind, config = HOSTS[host]
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "logging_steps": 1, **ALONE}
    args, watch = arguments(config, folder, **settings), Gradient()
    rows = RAW.select(range(ROWS))
    trainer = kind(build(name), args, collator, train_dataset=rows, processing_class=TOKENIZER, callbacks=[watch])
    trainer.train()
    return trainer.state.log_history[0]["loss"], watch.found


def check(name, host, collator, folder):
    expected, gradient = by_autograd(name)
    loss, found = step(name, host, collator, folder)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert found.keys() == gradient.keys()
    scale = max(float(value.abs().max()) for value in gradient.values())
    for parameter, value in gradient.items():
        assert torch.allclose(found[parameter], value, rtol=1e-5, atol=1e-5 * scale), parameter


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("collator", [PADDING, PACKING], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [*CONFIGS, *ADAPTERS])
def test_a_step_is_that_of_single_documents(name, host, collator, tmp_path):
    check(name, host, collator, tmp_path)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_learned_prompt(name, host, tmp_path):
    check(name, host, PADDING, tmp_path)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_learned_prompt_has_no_packed_documents(name, tmp_path):
    with pytest.raises(PackingLeakError, match="position_ids beside its 5 virtual tokens.*train without packing"):
        step(name, "ours", PACKING, tmp_path)
