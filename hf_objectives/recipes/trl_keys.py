"""Keys of TRL's configs that have other names here: taken over, answered by what is done instead, or refused."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any


@dataclass
class Translation:
    """A config of TRL's, as ours.

    Attributes:
        values: keys and values for our parser; keys that nobody knows are as they were.
        answers: what is done about a key that sets nothing here, in words.
        refusals: by key, why its value cannot be followed, and what to set instead.
        places: the key of the file that each translated key came from.
    """

    values: dict[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Set:
    """Keys of ours that do the same."""

    values: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """Nothing is to be set: why."""

    why: str


@dataclass(frozen=True)
class Refuse:
    """It cannot be followed: why, and what to set."""

    why: str


Rule = Callable[[Any], Set | Answer | Refuse]


def translate(values: Mapping[str, Any], known: Collection[str]) -> Translation:
    """Translate the keys of a YAML that a recipe does not know and TRL does.

    Args:
        values: the YAML.
        known: the recipe's own keys, which stay as they are.
    """
    found = Translation()
    for key, value in values.items():
        rule = RULES.get(key) if "sources" in known else {**RULES, **OF_PAIRS}.get(key)
        if (key in known and key not in READ_HERE) or rule is None:
            found.values[key], found.places[key] = value, key
            continue
        outcome = _trained(key, values) if key in _OF_LABELS else rule(value)
        if isinstance(outcome, Answer):
            found.answers.append(f"{key}: {_shown(value)}: {outcome.why}")
        elif isinstance(outcome, Refuse):
            found.refusals[key] = f"{_shown(value)} cannot be followed: {outcome.why}"
        elif lacking := [name for name in outcome.values if name not in known]:
            found.refusals[key] = f"this recipe has no {', '.join(lacking)}"
        elif twice := [n for n, given in outcome.values.items() if {**values, **found.values}.get(n, given) != given]:
            found.refusals[key] = f"it sets {', '.join(twice)}, which the file sets to another value; keep one of them"
        else:
            for name, given in outcome.values.items():
                found.values[name], found.places[name] = given, key
            said = ", ".join(f"{name}: {_shown(given)}" for name, given in outcome.values.items())
            found.answers.append(
                f"{key}: {_shown(value)}: taken as {said}" + (f"; {outcome.note}" if outcome.note else "")
            )
    of_trl = [key for key in values if key in RULES and key not in known]
    if of_trl and "train_on" in known and not {"train_on", *_OF_LABELS} & {*values}:
        found.answers.append(
            "assistant_only_loss is not given: assistant turns and completions alone are trained here, where TRL trains "
            "whole chats; train_on: all does that"
        )
    return found


_OF_LABELS = ("assistant_only_loss", "completion_only_loss")


def _trained(key: str, values: Mapping[str, Any]) -> Set | Answer | Refuse:
    """What two keys of TRL's say together of which tokens are trained."""
    from transformers.hf_argparser import string_to_bool

    asked = {}
    for name in _OF_LABELS:
        if values.get(name) is not None:
            try:
                asked[name] = string_to_bool(values[name])
            except (TypeError, ArgumentTypeError, AttributeError):
                return Refuse(f"{name} is {values[name]!r}, neither true nor false")
    if not asked:
        return Answer("assistant turns and completions alone are trained")
    whole, completions = (asked.get(name) for name in _OF_LABELS)
    if whole is False and completions is True:
        return Refuse(
            "chats would be trained whole, and completions without their prompts; train_on has no such value, set it"
        )
    if True not in asked.values():
        return Set({"train_on": "all"})
    if values.get("train_on") == "all":
        return Refuse("train_on: all says something else; keep one of them")
    return Answer("assistant turns and completions alone are trained, as ever")


def _shown(value: Any) -> str:
    return (
        json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool)) or value is None else str(value)
    )


def _renamed(name: str) -> Rule:
    return lambda value: Set({name: value})


def _always(why: str) -> Rule:
    return lambda value: Answer(why)


def _unless(default: Any, answer: str, refusal: str) -> Rule:
    """An answer where the value is the default (or none), and otherwise a refusal."""
    return lambda value: Answer(answer) if value in (default, None) else Refuse(refusal)


def _datasets(value: Any) -> Set | Answer | Refuse:
    if (
        not isinstance(value, list)
        or not all(isinstance(entry, dict) and "path" in entry for entry in value)
        or not value
    ):
        return Refuse("expected a list of mappings with path")
    ours = {
        "name": "config",
        **{key: key for key in ("path", "split", "data_dir", "data_files", "columns", "fraction")},
    }
    sources: dict[str, Any] = {}
    for entry in value:
        if unknown := [key for key in entry if key not in ours]:
            return Refuse(f"unknown key {', '.join(map(repr, unknown))} of {entry['path']}; expected {', '.join(ours)}")
        name = unused_name(Path(str(entry["path"])).stem or "data", sources)
        sources[name] = {ours[key]: given for key, given in entry.items() if given is not None}
    return Set({"sources": sources})


def _dataset(value: Any) -> Set | Answer | Refuse:
    """A list of one dataset, for recipes that read one."""
    found = _datasets(value)
    if not isinstance(found, Set):
        return found
    if len(found.values["sources"]) > 1:
        return Refuse("this recipe reads one dataset; put the rows into one file")
    (given,) = found.values["sources"].values()
    return Set(as_options({key: entry for key, entry in given.items() if key != "fraction"}))  # of one it is the whole


def as_options(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source of `sources` as options of a recipe that reads one."""
    names = {"path": "dataset_name", **{key: f"dataset_{key}" for key in ("config", "split", "revision")}}
    return {names.get(key, key): value for key, value in source.items()}


def unused_name(stem: str, taken: Collection[str]) -> str:
    """A name, with a number behind it where it is taken."""
    return next(name for name in chain([stem], (f"{stem}_{i}" for i in count(1))) if name not in taken)


def _model_settings(value: Any) -> Set | Answer | Refuse:
    names = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn_implementation"}
    names |= {"revision": "model_revision", "trust_remote_code": "trust_remote_code"}
    if not value:
        return Answer("nothing is asked")
    unknown = [key for key in value if key not in names] if isinstance(value, dict) else [str(value)]
    if unknown:
        return Refuse(
            f"here a model is loaded by {', '.join(dict.fromkeys(names.values()))}; leave out {', '.join(unknown)}"
        )
    return Set({names[key]: given for key, given in value.items()})


def _template(value: Any) -> Set | Answer | Refuse:
    if value is None:
        return Answer("the tokenizer's own template")
    path = Path(str(value))
    if path.suffix in (".jinja", ".j2", ".jinja2"):
        try:
            return Set({"chat_template": path.read_text(encoding="utf-8")})
        except (OSError, UnicodeDecodeError) as error:
            return Refuse(f"the file cannot be read ({error})")
    from transformers import AutoTokenizer

    try:
        return Set({"chat_template": AutoTokenizer.from_pretrained(str(value)).chat_template})
    except (OSError, ValueError) as error:
        return Refuse(f"no tokenizer can be loaded from there ({' '.join(str(error).split())[:150]})")


_STRATEGIES: dict[str, Set | Answer | Refuse] = {
    "bfd": Set({"strategy": "best_fit"}, "texts that are too long are split; of chats overlength says what happens"),
    "bfd_split": Set(
        {"strategy": "best_fit"}, "texts that are too long are split; of chats overlength says what happens"
    ),
    "wrapped": Set({"strategy": "concat"}, "documents in a row do not see each other"),
}
_LOSSES: dict[str, Set | Answer | Refuse] = {
    "nll": Answer("is the loss"),
    "chunked_nll": Answer("is the loss; the head always runs in chunks"),
    "dft": Refuse("the loss is the negative log-likelihood; leave loss_type out"),
}


def _one_of(outcomes: Mapping[str, Set | Answer | Refuse]) -> Rule:
    return lambda value: outcomes.get(str(value), Refuse(f"expected one of {', '.join(outcomes)}"))


_TOO_LONG = "a pair that is too long loses the beginning of its prompt first, then the ends of its answers"
#: Rules of recipes that read pairs.
OF_PAIRS: dict[str, Rule] = {
    "datasets": _dataset,
    "truncation_mode": _one_of({"keep_start": Answer(_TOO_LONG), "keep_end": Refuse(_TOO_LONG)}),
}
#: Keys that TRL's trainers read too late for models and rows that a recipe has loaded.
READ_HERE = ("model_init_kwargs", "chat_template_path", "truncation_mode")

#: Keys of TRL's ScriptArguments, DatasetMixtureConfig and SFTConfig that are no options here, in their order.
RULES: dict[str, Rule] = {
    "dataset_train_split": _renamed("dataset_split"),
    "dataset_streaming": _renamed("streaming"),
    "ignore_bias_buffers": _unless(False, "nothing is asked", "it is for masks in buffers of old models; leave it out"),
    "datasets": _datasets,
    "test_split_size": lambda value: (
        Answer("eval_share says what is held out")
        if value is None
        else Set({"eval_share": value}, "other rows are drawn than train_test_split draws")
        if isinstance(value, float) and 0 <= value < 1
        else Refuse("a number of rows; give the share of the rows as eval_share")
    ),
    "model_init_kwargs": _model_settings,
    "router_aux_loss_coef": _unless(
        None, "the model's config says it", "set it in the model's config, which is where it is read"
    ),
    "chat_template_path": _template,
    "dataset_text_field": lambda value: (
        Answer("is the column of texts") if value in ("text", None) else Set({"column_mapping": {str(value): "text"}})
    ),
    "dataset_kwargs": lambda value: (
        Answer("rows that are encoded are taken as they are")
        if not value or value == {"skip_prepare_dataset": False}
        else Refuse("rows with input_ids and labels are taken as they are; leave it out")
    ),
    "dataset_num_proc": _renamed("num_proc"),
    "truncation_mode": _one_of(
        {
            "keep_start": Set({"overlength": "cut"}),
            "keep_end": Refuse("conversations keep their start; set overlength to drop, split_turns or cut"),
        }
    ),
    "shuffle_dataset": _always("the Trainer's sampler shuffles rows by seed"),
    "packing_strategy": _one_of(_STRATEGIES),
    "padding_free": _unless(False, "rows are packed or padded", "set packing: true, which fills rows and pads nothing"),
    "pad_to_multiple_of": _always("changes no figure; rows are padded to the longest of a batch"),
    "eval_packing": _always("changes no figure; held-out rows are packed as those to train on"),
    **dict.fromkeys(_OF_LABELS, _always("see _trained")),
    "loss_type": _one_of(_LOSSES),
}
