"""How rows become ids and labels: one set of options for every caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from hf_objectives.types import check_max_length, check_one_of

TrainOn = Literal["assistant", "last_assistant", "all"]
TRAIN_ON = ("assistant", "last_assistant", "all")
CONTROL_TOKENS = ("plain", "allow")
Overlength = Literal["drop", "split_turns", "cut"]
OVERLENGTH = ("drop", "split_turns", "cut")
ON_ERROR = ("raise", "skip")  # of a batch job: what happens at a broken row


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """How rows become ids and labels.

    Callers take these options by name and pass them on as one object; configurations that need more inherit from it.

    Attributes:
        max_length: most tokens of a row; None for no limit.
        train_on: "assistant" trains every assistant turn, "last_assistant" the last one only, "all" every token.
        control_tokens: "plain" reads control tokens inside user, system and tool text as plain text; "allow" encodes the
            render as it is.
        overlength: what becomes of a conversation longer than `max_length`. "drop" leaves it out. "split_turns" makes
            several rows of whole user turns, each behind the system message. "cut" cuts it off; a turn that the cut goes
            through is not trained at all.
        expand_turns: make one row per user turn, each with exactly the prompt of inference; for templates that drop the
            reasoning of earlier turns.
        chat_template: template text or the name of one; None for the tokenizer's own.
        template_kwargs: variables that are passed to the template.
        splits_documents: texts are packed afterwards, so they stay whole whatever their length; set by the callers that
            pack, not by users.

    Raises:
        ConfigError: an unknown `train_on`, `control_tokens` or `overlength`, or `max_length` under 2.
    """

    max_length: int | None = None
    train_on: str = field(default="assistant", metadata={"help": "assistant, last_assistant or all."})
    control_tokens: str = field(default="plain", metadata={"help": "plain or allow."})
    overlength: str = field(default="drop", metadata={"help": "Longer conversations: drop, split_turns or cut."})
    expand_turns: bool = field(default=False, metadata={"help": "One row per user turn."})
    chat_template: str | None = field(default=None, metadata={"help": "A template, or the path of a .jinja file."})
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    splits_documents: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "template_kwargs", dict(self.template_kwargs or {}))  # None is what an option left out is
        check_one_of("train_on", self.train_on, TRAIN_ON)
        check_one_of("control_tokens", self.control_tokens, CONTROL_TOKENS)
        check_one_of("overlength", self.overlength, OVERLENGTH)
        check_max_length(self.max_length)


class EncodingOptions(TypedDict, total=False):
    """The fields of `EncodingConfig` as keyword arguments of a function: `**options: Unpack[EncodingOptions]`."""

    train_on: str
    control_tokens: str
    overlength: str
    expand_turns: bool
    chat_template: str | None
    template_kwargs: Mapping[str, Any] | None
