"""Configs of axolotl and LLaMA-Factory: told apart, and converted as far as their keys have a match here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_objectives.recipes.trl_keys import as_options, unused_name

AXOLOTL, FACTORY = "axolotl", "LLaMA-Factory"
#: Keys by which a config of a tool is known; two of them decide.
_MARKS = {
    AXOLOTL: "base_model sequence_len micro_batch_size sample_packing val_set_size num_epochs adapter pad_to_sequence_len "
    "lora_target_linear dataset_prepared_path",
    FACTORY: "stage finetuning_type template cutoff_len do_train val_size lora_target dataset_dir pref_beta lora_rank "
    "overwrite_output_dir",
}

#: Our key by theirs, for keys whose values mean the same. None of theirs is a key here that means something else.
KEYS: dict[str, dict[str, str]] = {
    AXOLOTL: {
        "base_model": "model_name_or_path",
        "revision_of_model": "model_revision",
        "sequence_len": "max_length",
        "sample_packing": "packing",
        "micro_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "num_epochs": "num_train_epochs",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
        "val_set_size": "eval_share",
        "lora_target_modules": "lora_target_modules",
        "chat_template_jinja": "chat_template",
        "dataset_processes": "num_proc",
        "dataset_num_proc": "num_proc",
        "rl_beta": "beta",
        "warmup_ratio": "warmup_steps",
    },
    FACTORY: {
        "cutoff_len": "max_length",
        "lora_rank": "lora_r",
        "lora_target": "lora_target_modules",
        "val_size": "eval_share",
        "preprocessing_num_workers": "num_proc",
        "flash_attn": "attn_implementation",
        "pref_beta": "beta",
        "pref_loss": "loss_type",
        "warmup_ratio": "warmup_steps",
    },
}
#: What users of other tools call an option of ours.
SYNONYMS: dict[str, str] = {
    **{theirs: ours for keys in KEYS.values() for theirs, ours in keys.items() if theirs != ours},
    **dict.fromkeys(("assistant_only_loss", "train_on_inputs", "train_on_prompt"), "train_on"),
    **dict.fromkeys(("lora_rank", "rank"), "lora_r"),
    **dict.fromkeys(("max_seq_length", "max_seq_len"), "max_length"),
    **dict.fromkeys(("dataset", "dataset_path", "data_path"), "dataset_name"),
    **dict.fromkeys(("split", "dataset_train_split"), "dataset_split"),
    **{"model": "model_name_or_path", "torch_dtype": "dtype", "lr": "learning_rate", "epochs": "num_train_epochs"},
    **{"batch_size": "per_device_train_batch_size", "grad_accum": "gradient_accumulation_steps"},
    **{"test_size": "eval_share", "subset": "dataset_config", "dataset_num_proc": "num_proc"},
}
#: Keys that they have too, with the same meaning.
_SAME = (
    "output_dir learning_rate gradient_accumulation_steps max_steps seed weight_decay warmup_steps lora_alpha lora_dropout "
    "lora_r gradient_checkpointing bf16 fp16 tf32 logging_steps save_steps eval_steps save_strategy eval_strategy "
    "save_total_limit max_grad_norm adam_beta1 adam_beta2 adam_epsilon lr_scheduler_type num_train_epochs "
    "per_device_train_batch_size per_device_eval_batch_size model_name_or_path trust_remote_code hub_model_id push_to_hub "
    "report_to load_in_4bit load_in_8bit packing optim resume_from_checkpoint save_only_model ddp_timeout max_length "
    "neftune_noise_alpha"
).split()


@dataclass
class Conversion:
    """A config of another tool as ours.

    Attributes:
        tool: whose it is.
        recipe: the command that trains as it asks.
        values: our keys and values.
        rest: by key, why it was not taken over.
    """

    tool: str
    recipe: str = "sft"
    values: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)


def tool_of(values: Mapping[str, Any]) -> str | None:
    """The tool that a config is written for, by its keys; None for ours and TRL's."""
    for tool, marks in _MARKS.items():
        if len([mark for mark in marks.split() if mark in values]) >= 2:
            return tool
    return None


def convert_config(values: Mapping[str, Any], options_of: Callable[[str], Collection[str]]) -> Conversion | None:
    """Convert a config.

    Args:
        values: the YAML; keys without a value are left out.
        options_of: the options of a recipe by its name; what is none of them goes to `rest`.

    Returns:
        Our config; None where it is of no tool that is known.
    """
    tool = tool_of(values)
    if tool is None:
        return None
    done = Conversion(tool)
    for key, value in values.items():
        rule = _RULES[tool].get(key)
        if value is None:
            continue
        if rule is not None:
            rule(done, value)
        elif value == "auto" and key in ("bf16", "fp16", "tf32"):
            done.rest[key] = "'auto'; say true or false"
        elif key in KEYS[tool] or key in _SAME:
            done.values[KEYS[tool].get(key, key)] = value
        else:
            done.rest[key] = "has no match here"
    known = options_of(done.recipe)
    for name, theirs in (("packing", False), ("eval_share", 0)):  # their defaults, where ours differ
        if name in known:
            done.values.setdefault(name, theirs)
    if "sources" not in known and len(done.values.get("sources", ())) == 1:
        done.values |= as_options(*done.values.pop("sources").values())
    if "num_proc" in done.values and "num_proc" not in known:
        done.values["dataset_num_proc"] = done.values.pop("num_proc")  # TRL's name, in recipes on its trainers
    for name in [name for name in done.values if name not in known]:
        if (value := done.values.pop(name)) is not False:  # which asks for nothing
            done.rest[name] = f"{value!r}: the recipe {done.recipe} has no such option"
    return done


def _sources(done: Conversion, value: Any) -> None:
    """axolotl's `datasets`: paths with a type."""
    entries = value if isinstance(value, list) else [value]
    sources: dict[str, Any] = {}
    for entry in entries:
        given = entry if isinstance(entry, Mapping) else {"path": entry}
        kept = {ours: given[theirs] for theirs, ours in _SOURCE_KEYS.items() if given.get(theirs) is not None}
        sources[unused_name(Path(str(given.get("path"))).stem or "data", sources)] = kept
        for key in given:
            if key not in _SOURCE_KEYS:
                done.rest[f"datasets.{key}"] = (
                    "rows say their format by their columns; use column_mapping where they do not"
                )
    if len(sources) == 1 and set(only := next(iter(sources.values()))) == {"path"}:
        done.values["dataset_name"] = only["path"]
    else:
        done.values["sources"] = sources


_SOURCE_KEYS = {"path": "path", "name": "config", "split": "split", "data_files": "data_files", "revision": "revision"}


def _named(done: Conversion, value: Any) -> None:
    """LLaMA-Factory's `dataset`: names of its dataset_info.json."""
    done.rest["dataset"] = f"{value!r} are names in dataset_info.json; give the files: dataset_name, or sources"


def _adapter(done: Conversion, value: Any) -> None:
    if value in ("lora", "qlora"):
        done.values["use_peft"] = True
        if value == "qlora":
            done.values["load_in_4bit"] = True
    elif value not in (None, "full", "none"):
        done.rest["adapter"] = f"{value!r}; here lora or none"


def _recipe(names: Mapping[Any, str], key: str) -> Callable[[Conversion, Any], None]:
    def choose(done: Conversion, value: Any) -> None:
        if value in names:
            done.recipe = names[value]
        else:
            done.rest[key] = f"{value!r} has no recipe here; there are {', '.join(dict.fromkeys(names.values()))}"

    return choose


def _train_on(done: Conversion, value: Any) -> None:
    if value:
        done.values["train_on"] = "all"


def _only(key: str, expected: Any, ours: str) -> Callable[[Conversion, Any], None]:
    """A key whose one value is what is done anyway."""

    def check(done: Conversion, value: Any) -> None:
        if value not in (expected, None):
            done.rest[key] = ours

    return check


def _steps(ours: str, strategy: str) -> Callable[[Conversion, Any], None]:
    """A number of steps, which there asks for the strategy too."""

    def take(done: Conversion, value: Any) -> None:
        done.values |= {ours: value, strategy: "steps"}

    return take


def _flash(done: Conversion, value: Any) -> None:
    known = {
        "fa2": "flash_attention_2",
        "sdpa": "sdpa",
        "disabled": "eager",
        "auto": None,
        True: "flash_attention_2",
        False: None,
    }
    if known.get(value):
        done.values["attn_implementation"] = known[value]


def _share(key: str) -> Callable[[Conversion, Any], None]:
    def take(done: Conversion, value: Any) -> None:
        if isinstance(value, (int, float)) and 0 <= value < 1:
            done.values["eval_share"] = value
        else:
            done.rest[key] = f"{value!r} rows; give their share as eval_share"

    return take


def _cutoff(done: Conversion, value: Any) -> None:
    """LLaMA-Factory cuts what is longer; ours by default leaves a conversation out."""
    done.values |= {"max_length": value, "overlength": "cut"}


def _tokens(done: Conversion, value: Any) -> None:
    """axolotl's `special_tokens`, by name."""
    for name, token in dict(value).items():
        if name in ("eos_token", "pad_token"):
            done.values[name] = token
        else:
            done.rest[f"special_tokens.{name}"] = "set it in the tokenizer, and save it"


def _modules(done: Conversion, value: Any) -> None:
    """`all`, or names, which LLaMA-Factory separates by commas."""
    names = value.split(",") if isinstance(value, str) else list(value)
    done.values["lora_target_modules"] = "all-linear" if names == ["all"] else [name.strip() for name in names]


def _bits(done: Conversion, value: Any) -> None:
    done.values["load_in_4bit" if value == 4 else "load_in_8bit"] = True


_OWN_TEMPLATE = "the tokenizer's own chat template is used; give a .jinja file as chat_template"
_RULES: dict[str, dict[str, Callable[[Conversion, Any], None]]] = {
    AXOLOTL: {
        "datasets": _sources,
        "adapter": _adapter,
        "rl": _recipe({"dpo": "dpo", "ipo": "dpo", "grpo": "ppo"}, "rl"),
        "reward_model": lambda done, value: setattr(done, "recipe", "reward") if value else None,
        "train_on_inputs": _train_on,
        "val_set_size": _share("val_set_size"),
        "lora_target_linear": lambda done, value: (
            done.values.update(lora_target_modules="all-linear") if value else None
        ),
        "flash_attention": _flash,
        "save_steps": _steps("save_steps", "save_strategy"),
        "eval_steps": _steps("eval_steps", "eval_strategy"),
        "pad_to_sequence_len": _only(
            "pad_to_sequence_len", False, "rows are packed, or padded to the longest of a batch"
        ),
        "special_tokens": _tokens,
        "chat_template": _only("chat_template", "tokenizer_default", _OWN_TEMPLATE),
    },
    FACTORY: {
        "stage": _recipe({"pt": "pretrain", "sft": "sft", "rm": "reward", "ppo": "ppo", "dpo": "dpo"}, "stage"),
        "finetuning_type": _adapter,
        "dataset": _named,
        "do_train": _only("do_train", True, "the recipe trains"),
        "train_on_prompt": _train_on,
        "val_size": _share("val_size"),
        "flash_attn": _flash,
        "quantization_bit": _bits,
        "lora_target": _modules,
        "cutoff_len": _cutoff,
        "template": _only("template", None, _OWN_TEMPLATE),
        "neat_packing": lambda done, value: done.values.update(packing=bool(value)),
        "plot_loss": _only("plot_loss", True, "training_curves.png is drawn"),
    },
}
