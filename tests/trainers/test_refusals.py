"""What a Trainer would take and never use is refused, with what to do instead."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.errors import ConfigError, FormatError, TokenizerError
from hf_objectives.evaluation import refuse_other_models
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments, RewardModelConfig, RewardModelTrainer
from hf_objectives.trainers.refusals import refuse_cut_rows, refuse_data_parallel, refuse_zero_gradients
from tests.support import dpo_worlds
from tests.support.language_models import TOKENIZER, arguments, llama, trainer
from tests.support.ppo_worlds import ppo, small_model


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compute_metrics", "on_evaluate"),
        ("preprocess_logits_for_metrics", "leave it out"),
        ("compute_loss_func", "override compute_loss"),
    ],
)
def test_callables_that_would_never_be_called(tmp_path, name, words):
    with pytest.raises(ConfigError, match=f"{name} .*{words}"):
        PerplexityTrainer(llama(), arguments(tmp_path), **{name: lambda *_, **__: {}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_parallelism_that_cuts_rows_is_refused_by_other_trainers(tmp_path, folders, name):
    cut, refused = {"parallelism_config": ParallelismConfig(**{name: 2})}, f"parallelism_config has {name}=2: .*label"
    with pytest.raises(ConfigError, match=refused):
        dpo_worlds.ours(folders[0], tmp_path, **cut)
    with pytest.raises(ValueError, match=f"parallelism_config.{name} > 1"):  # TRL's own
        ppo(tmp_path, **cut)
    options = RewardModelConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **cut)
    with pytest.raises(ConfigError, match=refused):
        rows = Dataset.from_list(dpo_worlds.PAIRS)
        RewardModelTrainer(folders[0], options, train_dataset=rows, processing_class=dpo_worlds.TOKENIZER)


def test_parallelism_that_accelerate_was_launched_with_is_refused(tmp_path, monkeypatch):
    """`accelerate launch --parallelism_config_sp_size 2` sets no argument; the accelerator has it."""
    create = Trainer.create_accelerator_and_postprocess

    def launched(self):
        create(self)
        self.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(sp_size=2))

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", launched)
    with pytest.raises(ConfigError, match="parallelism_config has sp_size=2"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"sp_size": 2}, "sp_size=2: .*not proved.* Set sp_size to 1, and cp_size to 2 with FSDP2"),
        ({"tp_size": 2}, "tp_size=2: an evaluation would .* Set tp_size to 1, and dp_shard_size with FSDP2"),
        ({"cp_size": 2, "tp_size": 2}, "parallelism_config has tp_size=2"),
    ],
)
def test_parallelism_that_no_trainer_takes(tmp_path, sizes, words):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, parallelism_config=ParallelismConfig(**sizes))


def test_context_parallelism_passes_where_parts_are_taken():
    refuse_cut_rows(ParallelismConfig(cp_size=2, dp_shard_size=2), takes_parts=True)


def test_parallelism_that_leaves_rows_whole_passes():
    refuse_cut_rows(None)
    refuse_cut_rows(ParallelismConfig(tp_size=2, dp_shard_size=2))


def test_one_process_with_several_gpus_is_refused(tmp_path, monkeypatch):
    refuse_data_parallel(SimpleNamespace(n_gpu=1))
    monkeypatch.setattr(PerplexityTrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="one process with 2 GPUs .* accelerate launch"):
        trainer(tmp_path)


SIZES = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=264, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def adapted(kind, task):
    return get_peft_model(kind(LlamaConfig(**SIZES)), LoraConfig(target_modules=["q_proj"], task_type=task))


MISTAKES = {
    "encoder-decoder": (t5, "T5ForConditionalGeneration is an encoder-decoder"),
    "classifier": (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)), "a head for SequenceClassification"),
    "adapted classifier": (lambda: adapted(LlamaForSequenceClassification, "SEQ_CLS"), "a head for SequenceClassification"),
    "tagger": (lambda: BertForTokenClassification(BertConfig(**SIZES)), "a head for TokenClassification"),
    "masked": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "is a masked language model"),
    "no decoder": (lambda: BertLMHeadModel(BertConfig(**SIZES)), "see those after it.*is_decoder=True"),
    "embedding": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)),
        "use_bidirectional_attention=False",
    ),
    "no head": (
        lambda: BertModel(BertConfig(**SIZES)),
        "hidden states|no language-model head",
    ),
    "images": (
        lambda: ViTForMaskedImageModeling(ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"})),
        "no language-model head",
    ),
    "own z-loss": (
        lambda: BambaForCausalLM(
            BambaConfig(
                **SIZES, num_key_value_heads=2, attn_layer_indices=[0], mamba_n_heads=8, mamba_d_head=8,
                z_loss_coefficient=0.01,
            )
        ),
        "z_loss_coefficient=0.01.*z_loss in PerplexityTrainingArguments",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path, name):
    make, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words) as caught:  # of a model without any head the Trainer itself says so
        trainer(tmp_path, model=make())
    assert name == "no head" or isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("name", sorted(MISTAKES.keys() - {"no head", "images", "own z-loss"}))
def test_preference_pairs_and_answers_need_a_causal_language_model_too(tmp_path, name):
    make, words = MISTAKES[name]
    with pytest.raises(ConfigError, match=words):
        dpo_worlds.ours(make(), tmp_path)
    with pytest.raises(ConfigError, match=words):
        ppo(tmp_path, model=make())


@pytest.mark.parametrize("packing", [False, True])
def test_ids_without_an_embedding_are_named(tmp_path, packing):
    """Of rows that were encoded elsewhere; a GPU would say "device-side assert"."""
    kind = DataCollatorWithEosPacking if packing else DataCollatorForAssistantOnlyLM
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [1, 264, 3], "labels": [1, 2, 3]}]
    options = {
        "collator": kind(TOKENIZER, max_length=16, train_on="all"),
        "train_sampling_strategy": "sequential",
        "rows": rows,
    }
    with pytest.raises(FormatError, match="row 1: input_ids has id 264; the model has embeddings for 0 to 263"):
        trainer(tmp_path, **options).train()


def test_ids_of_pairs_without_an_embedding_are_named(tmp_path):
    pairs = Dataset.from_list([{"prompt_ids": [1, 2], "chosen_ids": [5, 9_999], "rejected_ids": [6, 8]}] * 4)
    model = dpo_worlds.demo.build_model(dpo_worlds.TOKENIZER, hidden_size=32, num_layers=1)
    for padding_free in (False, True):
        made = dpo_worlds.ours(
            model, tmp_path, rows=pairs, trainer={"ref_model": copy.deepcopy(model)}, padding_free=padding_free
        )
        with pytest.raises(FormatError, match="chosen_ids has id 9999; the model has embeddings for 0 to 639"):
            made.train()


def test_a_model_from_nowhere_needs_a_reference(tmp_path):
    with pytest.raises(ConfigError, match=r"no folder and no repository.*pass ref_model=copy.deepcopy\(model\)"):
        dpo_worlds.ours(llama(), tmp_path)
    model = dpo_worlds.demo.build_model(dpo_worlds.TOKENIZER, hidden_size=32, num_layers=1)
    run = dpo_worlds.ours(
        model, tmp_path, precompute_ref_log_probs=True
    )  # of the policy itself, so that none is loaded
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_fp16_on_a_cpu_is_refused(tmp_path):
    for start in (
        lambda: trainer(tmp_path, fp16=True),
        lambda: dpo_worlds.ours(llama(), tmp_path, fp16=True),
        lambda: RewardModelTrainer(llama(), RewardModelConfig(str(tmp_path), fp16=True, bf16=False, use_cpu=True)),
    ):
        with pytest.raises(ConfigError, match="fp16 on a CPU; use bf16"):
            start()


def test_a_model_that_is_made_later_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match="is an encoder-decoder"):
        PerplexityTrainer(None, arguments(tmp_path), model_init=t5)


class Own(torch.nn.Module):
    """A model of nobody's library."""


@pytest.mark.parametrize(
    "make",
    [
        llama,
        Own,
        lambda: adapted(LlamaForCausalLM, "CAUSAL_LM"),
        lambda: BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8)),
    ],
)
def test_causal_language_models_and_models_of_ones_own_pass(make):
    refuse_other_models(make())


def test_trainers_refuse_tokens_without_an_embedding(tmp_path):
    small = llama()
    small.resize_token_embeddings(100)
    with pytest.raises(TokenizerError, match="resize_token_embeddings"):
        trainer(tmp_path, model=small)
    with pytest.raises(TokenizerError, match="resize_token_embeddings"):
        dpo_worlds.ours(small, tmp_path, trainer={"ref_model": llama()})
    with pytest.raises(TokenizerError, match="resize_token_embeddings"):
        ppo(tmp_path, model=small_model(4))


def test_settings_that_rest_on_missing_gradients():
    """DeepSpeed's optimizers take a missing gradient for 0, and Adam moves on by its moments."""
    deepspeed, plain = (SimpleNamespace(is_deepspeed_enabled=on) for on in (True, False))
    refuse_zero_gradients(plain, {"critic_warmup_steps": 3, "max_approx_kl": 0.1})
    refuse_zero_gradients(deepspeed, {"critic_warmup_steps": 0, "max_approx_kl": None})
    with pytest.raises(
        ConfigError, match=r"^critic_warmup_steps=3 under DeepSpeed, .*: use FSDP, or leave the setting out$"
    ):
        refuse_zero_gradients(deepspeed, {"critic_warmup_steps": 3, "max_approx_kl": None})
    with pytest.raises(ConfigError, match=r"critic_warmup_steps=3 and max_approx_kl=0.1 under DeepSpeed"):
        refuse_zero_gradients(deepspeed, {"critic_warmup_steps": 3, "max_approx_kl": 0.1})
