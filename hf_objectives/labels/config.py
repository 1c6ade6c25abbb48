"""Options that decide how rows become ids and labels, declared once for every caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, TypedDict

from hf_objectives.types import check_max_length, check_one_of

TrainOn = Literal["assistant", "last_assistant", "all"]
TRAIN_ON = ("assistant", "last_assistant", "all")
CONTROL_TOKENS = ("plain", "allow")
Overlength = Literal["drop", "split_turns", "cut"]
OVERLENGTH = ("drop", "split_turns", "cut")
ON_ERROR = ("raise", "skip")  # of a batch job: what happens at a broken row


@dataclass(kw_only=True)
class LabelConfig:
    """How one row becomes ids and labels.

    Attributes:
        max_length: most tokens of a row; None for no limit.
        train_on: "assistant" trains every assistant turn, "last_assistant" the last one, "all" every token.
        control_tokens: "plain" reads control tokens in user, system and tool text as plain text; "allow" does not.
        chat_template: template text or the name of one; None for the tokenizer's own.
        template_kwargs: variables of the template, for example `{"enable_thinking": False}`.

    Raises:
        ConfigError: an unknown `train_on` or `control_tokens`, or `max_length` under 2.
    """

    max_length: int | None = None
    train_on: str = field(default="assistant", metadata={"help": "assistant, last_assistant or all."})
    control_tokens: str = field(default="plain", metadata={"help": "plain or allow."})
    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.template_kwargs = dict(self.template_kwargs or {})  # None is what an option left out is
        check_one_of("train_on", self.train_on, TRAIN_ON)
        check_one_of("control_tokens", self.control_tokens, CONTROL_TOKENS)
        check_max_length(self.max_length)

    def options(self) -> dict[str, Any]:
        """The fields of `LabelConfig` as keyword arguments."""
        return {f.name: getattr(self, f.name) for f in fields(LabelConfig)}

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Self:
        """Take the fields from the keyword arguments of a function; every other keyword is a template variable.

        Example: `{"train_on": "all", "enable_thinking": False}` has the field `train_on` and the template variable
        `enable_thinking`.
        """
        known = {f.name for f in fields(cls)}
        options = {name: value for name, value in keywords.items() if name in known}
        variables = {name: value for name, value in keywords.items() if name not in known}
        return cls(**{**options, "template_kwargs": {**(options.get("template_kwargs") or {}), **variables}})


@dataclass(kw_only=True)
class EncodingConfig(LabelConfig):
    """How the rows of a dataset become ids and labels: `LabelConfig`, and how many rows one row becomes.

    Attributes:
        overlength: what happens to a conversation longer than `max_length`. "drop" leaves it out. "split_turns" makes
            several rows of whole user turns, each with the system message first. "cut" cuts it off; a turn that the cut
            goes through is not trained at all.
        expand_turns: make one row per user turn, each with exactly the prompt of inference.
        splits_documents: keep texts whole, whatever their length; set by callers that pack them, not by users.

    Raises:
        ConfigError: see `LabelConfig`; or an unknown `overlength`.
    """

    overlength: str = field(default="drop", metadata={"help": "Longer conversations: drop, split_turns or cut."})
    expand_turns: bool = field(default=False, metadata={"help": "One row per user turn."})
    splits_documents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("overlength", self.overlength, OVERLENGTH)

    def encoding(self) -> EncodingConfig:
        """These options alone, without the fields that a subclass adds."""
        return EncodingConfig(**{option.name: getattr(self, option.name) for option in fields(EncodingConfig)})


class EncodingOptions(TypedDict, total=False):
    """The fields of `EncodingConfig` as keyword arguments of a function: `**options: Unpack[EncodingOptions]`."""

    train_on: str
    control_tokens: str
    overlength: str
    expand_turns: bool
    chat_template: str | None
    template_kwargs: Mapping[str, Any] | None
