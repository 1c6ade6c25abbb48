"""`RewardModelTrainer(padding_free=True)`: packed pairs give the loss, gradients, logs and figures of padded ones."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    SiglipVisionConfig,
)
from trl import RewardConfig, RewardTrainer

from hf_objectives import RewardModelConfig, RewardModelTrainer, demo
from hf_objectives.errors import ConfigError, FormatError, PackingLeakError
from hf_objectives.trainers import encode_reward_row
from tests.support.chat_corpus import byte_tokenizer
from tests.trainers.test_reward import TOKENIZER, llama, plain_rows, trainer

SIZES = {
    "vocab_size": len(TOKENIZER) + 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.1,
}  # fmt: skip
WINDOW = 12
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen 3": lambda: Qwen3Config(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma 3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
}
ROWS = demo.preferences(9)
LORA = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])


def model_of(name, attention="sdpa"):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)


def layers_of(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model.layers


def watched(run):
    """Rows and length of every pass through the layers, the proof's included."""
    shapes = []
    layers_of(run.model)[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


def step(run):
    """Loss, gradients and TRL's metrics of one training batch: the first rows, in their order."""
    run.model.train()
    loss = run.compute_loss(run.model, run._prepare_inputs(next(iter(run.get_eval_dataloader()))))
    loss.backward()
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, dict(run._metrics["train"])


def assert_equal_steps(padded, packed, tolerance=1e-5):
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = padded, packed
    assert our_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert our_gradients.keys() == gradients.keys() and gradients
    for name, value in gradients.items():
        assert torch.allclose(our_gradients[name], value, atol=tolerance * float(value.abs().max()) + 1e-12), name
    assert our_metrics.keys() == metrics.keys() and "margin" in metrics
    for name, values in metrics.items():
        assert our_metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradients_metrics_and_figures_are_the_padded_ones(name, attention, tmp_path):
    """TRL's own trainer on the same ids, and every figure of an evaluation of ours without the setting.

    The gradient is a difference, of chosen and rejected sides that have most of their tokens in common: in float32 rounding
    alone moves the padded one by 2e-5 of a parameter's largest. So sdpa is compared in float64 (eager has windows in which
    float64 gives no numbers).
    """
    encoded = [encode_reward_row(TOKENIZER, row) for row in ROWS]
    ids = [{key: row[key] for key in ("chosen_ids", "rejected_ids")} for row in encoded]
    dtype, tolerance = (torch.float64, 1e-5) if attention == "sdpa" else (torch.float32, 5e-5)
    model = model_of(name, attention).to(dtype)
    theirs = step(trainer(tmp_path, ids, model=copy.deepcopy(model), config=RewardConfig, kind=RewardTrainer))
    run = trainer(tmp_path, ROWS, model=model, padding_free=True)
    shapes = watched(run)
    assert_equal_steps(theirs, step(run), tolerance)
    batch = run.data_collator([run.eval_dataset[i] for i in range(8)])["input_ids"]
    assert math.prod(shapes[-1]) < 0.9 * batch.numel()  # the first eight pairs
    run = trainer(tmp_path, ROWS, model=model_of(name, attention), padding_free=True)
    padded = trainer(tmp_path, ROWS, model=model_of(name, attention)).evaluate()
    packed = run.evaluate()
    assert packed.keys() == padded.keys() and "eval_expected_calibration_error" in padded
    for key, value in padded.items():
        if not any(word in key for word in ("time", "per_second")):
            assert packed[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


@pytest.mark.slow
def test_a_classifier_that_asks_its_layers_for_an_output_by_name(tmp_path):
    """`return_dict` is no input of a token."""

    def run(**options):
        torch.manual_seed(0)
        config = FalconConfig(
            vocab_size=SIZES["vocab_size"], hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2, num_labels=1,
        )  # fmt: skip
        return trainer(tmp_path, ROWS, model=AutoModelForSequenceClassification.from_config(config), **options)

    (loss, gradients, _), (our_loss, our_gradients, _) = step(run()), step(run(padding_free=True))
    assert our_loss == pytest.approx(loss, rel=1e-5) and our_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        assert torch.allclose(our_gradients[name], value, atol=1e-4 * float(value.abs().max()) + 1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize("changed", [
    {},
    {"peft_config": LORA},
    {"peft_config": LORA, "gradient_checkpointing": True},
    {"center_rewards_coefficient": 0.05, "gradient_accumulation_steps": 2},
    {"margin": True},
    {"max_length": 40},
])  # fmt: skip
def test_a_run_and_its_evaluations_are_the_padded_ones(changed, tmp_path):
    logs, tokens = [], []
    given = dict(changed)
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(ROWS)] if given.pop("margin", False) else ROWS
    for free in (False, True):
        torch.manual_seed(0)
        run = trainer(
            tmp_path, rows, model=model_of("llama"), padding_free=free, logging_steps=1, eval_strategy="steps", eval_steps=1,
            per_device_eval_batch_size=4, optim="sgd", learning_rate=0.1, **given,
        )  # fmt: skip
        shapes = watched(run)
        run.train()
        logs.append(run.state.log_history)
        tokens.append(shapes)
    assert len(logs[0]) == len(logs[1]) >= 6
    assert abs(logs[0][-2]["eval_loss"] - logs[0][1]["eval_loss"]) > 1e-4  # it learns
    for padded, packed in zip(*logs, strict=True):
        assert padded.keys() == packed.keys()
        for key, value in padded.items():
            if not any(word in key for word in ("runtime", "per_second", "flos")):
                assert packed[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    padded, packed = (math.prod(shapes[-1]) for shapes in tokens)  # the last evaluation's last batch
    assert packed < 0.9 * padded


def test_without_the_setting_nothing_changes(tmp_path):
    """The padded rows reach the layers, and TRL's own config has no such setting."""
    assert RewardModelConfig.padding_free is False
    for config in (RewardModelConfig, RewardConfig):
        run = trainer(tmp_path, ROWS, config=config)
        shapes = watched(run)
        batch = run.data_collator([run.eval_dataset[i] for i in range(8)])
        step(run)
        assert shapes == [batch["input_ids"].shape]


def test_scores_before_a_closing_eos(tmp_path):
    """Where only EOS can pad, scores are read before it: packed as well."""
    tokenizer = byte_tokenizer(special=["<|im_start|>"])
    found = []
    for free in (False, True):
        options = {"tokenizer": tokenizer, "allow_eos_padding": True, "padding_free": free}
        run = trainer(tmp_path, plain_rows(9), model=llama(len(tokenizer)), **options)
        run.evaluate()
        found.append([*run.pair_rewards.chosen, *run.pair_rewards.rejected])
    assert found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.real_model
def test_a_real_model(real_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(real_model_path)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is the capital of {country}? Answer in one word."}],
            "chosen": [{"role": "assistant", "content": city}],
            "rejected": [{"role": "assistant", "content": f"{city}, I think, but who am I to say?"}],
        }
        for country, city in (("France", "Paris"), ("the Federal Republic of Germany", "Berlin"))
    ]
    found = []
    for free in (False, True):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(real_model_path, num_labels=1, dtype=torch.float32)
        model.requires_grad_(False).model.layers[0].requires_grad_(True)
        model.score.requires_grad_(True)
        found.append(step(trainer(tmp_path, rows, model=model, tokenizer=tokenizer, padding_free=free)))
    assert_equal_steps(*found)


# -- the proof, and what is refused ------------------------------------------------------------------------------------


def test_a_model_that_leaks_is_refused_before_it_is_used(tmp_path):
    model = model_of("llama")
    forward = model.model.forward

    def blind(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return forward(input_ids, attention_mask=None if position_ids is not None else attention_mask, **kwargs)

    model.model.forward = blind
    run = trainer(tmp_path, ROWS, model=model, padding_free=True)
    for use in (run.train, run.evaluate):
        with pytest.raises(PackingLeakError, match="padding_free: hidden states under the scores of packed"):
            use()


def test_the_proof_is_made_once_and_counts_as_no_step(tmp_path):
    run = trainer(tmp_path, ROWS, padding_free=True)
    shapes = watched(run)
    step(run)
    first = len(shapes)
    step(run)
    assert len(shapes) == first + 1 and first > 2
    assert {len(values) for values in run._metrics["train"].values()} == {1, 2}  # `num_tokens` is one sum


def test_a_saved_model_is_a_plain_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, ROWS, padding_free=True)
        run.train()
        run.save_model()
    assert not [record for record in caplog.records if "padding_free" in record.getMessage()]
    run.evaluate()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        scores = [float(model(torch.tensor([row["chosen_ids"]])).logits) for row in run.eval_dataset]
    assert run.pair_rewards.chosen.tolist() == pytest.approx(scores, abs=1e-5)


STATE = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
    "num_experts": 2,
    "mamba_d_state": 4,
}
BESIDE = {"text_config": {**SIZES}, "vision_config": SiglipVisionConfig(num_hidden_layers=1).to_dict()}


@pytest.mark.parametrize(("config", "reason"), [
    (lambda: JambaConfig(**{**SIZES, **STATE}), "JambaForSequenceClassification keeps a state"),
    (lambda: Gemma3Config(**BESIDE), "Gemma3ForSequenceClassification has parts beside text"),
])  # fmt: skip
def test_models_that_cannot_be_packed_are_refused(config, reason, tmp_path):
    made = config()
    made.num_labels = 1
    with pytest.raises(ConfigError, match=rf"padding_free: {reason}.*Set padding_free to False"):
        trainer(tmp_path, ROWS, model=AutoModelForSequenceClassification.from_config(made), padding_free=True)


def test_a_collator_that_pads_on_the_left_is_refused(tmp_path):
    def collate(examples):
        ids = [torch.tensor(one[side]).flip(0) for side in ("chosen_ids", "rejected_ids") for one in examples]
        pad = {"batch_first": True, "padding_value": TOKENIZER.pad_token_id}
        padded = torch.nn.utils.rnn.pad_sequence(ids, **pad).flip(1)
        return {"input_ids": padded, "attention_mask": (padded != TOKENIZER.pad_token_id).long()}

    with pytest.raises(FormatError, match="padded on the left"):
        trainer(tmp_path, ROWS, data_collator=collate, padding_free=True).evaluate()


def test_it_is_ours_alone(tmp_path):
    assert not hasattr(RewardConfig(str(tmp_path), use_cpu=True, bf16=False), "padding_free")
    assert issubclass(RewardModelTrainer, RewardTrainer)
