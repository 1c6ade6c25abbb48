"""The model and the tokenizer that a recipe starts from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes.arguments import BUILT_IN
from hf_objectives.trainers import suppress_seqcls_warning
from hf_objectives.types import option, parse_json

#: Sizes of the built-in model by its names.
_SIZES: dict[str | None, dict[str, int]] = {BUILT_IN: {}, f"{BUILT_IN}:small": {"hidden_size": 64, "num_layers": 3}}


@dataclass
class RecipeModel(ModelConfig):
    """TRL's options of a model, and one of transformers that it leaves out."""

    use_kernels: bool = option(False, "Kernels of the Hub in the place of the model's layers.")


@dataclass
class TrustedModel(RecipeModel):
    """A model whose training arguments do not say whether its code is run; TRL's own do."""

    trust_remote_code: bool = option(False, "Run code from the model's repository: only if you have read it.")


@dataclass
class PretrainModel(TrustedModel):
    """The model of pretraining: a checkpoint to go on from, or a configuration whose weights are drawn at random."""

    model_config: str | None = option(None, "From scratch: a config.json, or a mapping with model_type (JSON).")
    tokenizer_name: str | None = option(None, "Tokenizer of a model from scratch.")


def load_tokenizer(name: str, revision: str = "main", *, trust_remote_code: bool = False) -> Any:
    """A tokenizer: the built-in one, or that of a folder or a Hub id."""
    if name in _SIZES:
        return demo.build_tokenizer()
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_model(config: ModelConfig, *, use_cpu: bool = False, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a language model and its tokenizer."""
    name = _checked_name(config, use_cpu)
    tokenizer = load_tokenizer(name, config.model_revision, trust_remote_code=trust_remote_code)
    if name in _SIZES:
        return demo.build_model(tokenizer, **_SIZES[name]), tokenizer
    # Adapters leave the weights as they are, so these may stay in the checkpoint's dtype; not on a CPU, which is slow then.
    dtype = "auto" if config.use_peft and not use_cpu else "float32"
    settings = _loading(config, dtype, trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(name, revision=config.model_revision, **settings), tokenizer


def load_policy(config: ModelConfig, *, use_cpu: bool = False, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model to align, and its tokenizer. An adapter in the folder becomes part of the weights; all are trained."""
    name = config.model_name_or_path
    base = _base_of_adapter(config)
    if name is None or base is None:
        return load_model(config, use_cpu=use_cpu, trust_remote_code=trust_remote_code)
    model, _ = load_model(
        replace(config, model_name_or_path=base, model_revision="main"),
        use_cpu=use_cpu,
        trust_remote_code=trust_remote_code,
    )
    return _with_adapter_merged(model, name), load_tokenizer(name, trust_remote_code=trust_remote_code)


def load_scorer(config: ModelConfig, *, use_cpu: bool = False, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model with a score head, which is new where the folder has none, and its tokenizer."""
    name = _checked_name(config, use_cpu)
    tokenizer = load_tokenizer(name, config.model_revision, trust_remote_code=trust_remote_code)
    if name in _SIZES:
        settings = demo.build_model(tokenizer, **_SIZES[name]).config
        settings.num_labels = 1
        return LlamaForSequenceClassification(settings), tokenizer
    base = _base_of_adapter(config)
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(
            base or name,
            revision=None if base else config.model_revision,
            num_labels=1,
            **_loading(config, "float32", trust_remote_code),
        )
    return _with_adapter_merged(model, name, generates=False) if base else model, tokenizer


def _checked_name(config: ModelConfig, use_cpu: bool) -> str:
    if not config.model_name_or_path:
        raise ConfigError("model_name_or_path is missing; give a Hub id, a folder, or 'builtin'")
    if config.load_in_4bit and use_cpu and config.model_name_or_path not in _SIZES:
        raise ConfigError(
            "load_in_4bit on a CPU: bitsandbytes packs weights for evaluation there, and writing a checkpoint after it "
            "leaves them wrong without an error (seen with 0.50.2); use a GPU, or leave it off"
        )
    return config.model_name_or_path


def _loading(config: ModelConfig, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained`; `dtype` is taken unless the configuration names one: weights that an optimizer moves
    want float32, whatever the checkpoint has.
    """
    return {
        "attn_implementation": config.attn_implementation,
        "dtype": dtype if config.dtype in (None, "auto") else config.dtype,
        "quantization_config": get_quantization_config(config),
        "trust_remote_code": trust_remote_code,
        **({"use_kernels": True} if getattr(config, "use_kernels", False) else {}),
    }


def _base_of_adapter(config: ModelConfig) -> str | None:
    """The model that an adapter was trained on, where a folder or Hub id holds an adapter."""
    name = config.model_name_or_path
    found = find_adapter_config_file(name, revision=config.model_revision) if name and name not in _SIZES else None
    return json.loads(Path(found).read_text())["base_model_name_or_path"] if found else None


def _with_adapter_merged(model: Any, folder: str, *, generates: bool = True) -> Any:
    lora = PeftConfig.from_pretrained(folder)
    lora.task_type = lora.task_type if generates else None
    merged: Any = PeftModel.from_pretrained(model, folder, config=lora).merge_and_unload()
    return merged.requires_grad_(True)  # PEFT froze what was beneath the adapter


def with_lora(model: Any, config: ModelConfig, *, gradient_checkpointing: bool) -> Any:
    """The model with the adapters that TRL's flags ask for, or as it is."""
    lora = get_peft_config(config)
    if lora is None:
        return model
    if config.load_in_4bit or config.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    elif gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, lora)


def load_or_draw(config: PretrainModel, *, use_cpu: bool = False, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of pretraining: those of a checkpoint, or random weights (float32) of a configuration."""
    if not config.model_config:
        return load_model(config, use_cpu=use_cpu, trust_remote_code=trust_remote_code)
    name = config.tokenizer_name or config.model_name_or_path
    if not name:
        raise ConfigError(
            "tokenizer_name is missing; a model from scratch needs a tokenizer (a Hub id, folder or 'builtin')"
        )
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if config.model_config.lstrip().startswith("{"):
        try:
            values = parse_json(config.model_config)
        except ValueError as error:
            raise ConfigError(f"model_config is no JSON ({error})") from error
        if "model_type" not in values:
            raise ConfigError("model_config names no model_type; expected 'llama', say, beside its sizes")
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        settings = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **special, **values})
    else:
        settings = AutoConfig.from_pretrained(config.model_config, trust_remote_code=trust_remote_code)
    vocabulary = settings.get_text_config().vocab_size
    if vocabulary < len(tokenizer):
        raise ConfigError(
            f"the model's vocabulary has {vocabulary} ids, the tokenizer {len(tokenizer)}; "
            "raise vocab_size, or use the tokenizer that the configuration was made for"
        )
    settings.use_cache = True
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    model = AutoModelForCausalLM.from_config(
        settings, dtype=torch.float32, trust_remote_code=trust_remote_code, **attention
    )
    if config.use_kernels:
        model.set_use_kernels(True)
    return model, tokenizer
