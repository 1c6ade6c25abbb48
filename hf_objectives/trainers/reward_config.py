"""Arguments of RewardModelTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import RewardConfig

from hf_objectives.errors import ConfigError, nearest

_CONTROL_TOKENS = ("plain", "allow")


@dataclass
class RewardModelConfig(RewardConfig):
    """`trl.RewardConfig` and what encoding needs.

    `max_length` means something else than for the parent, which drops longer rows: here their prompt is shortened first, see
    `encode_pair`.

    Args:
        control_tokens: see `encode_chat`.
        allow_eos_padding: where the only token to pad with is EOS, read the score of a text that ends with EOS before it, as
            TRL does; an error otherwise.

    Raises:
        ConfigError: an unknown `control_tokens`.
    """

    control_tokens: str = field(default="plain", metadata={"help": "plain or allow."})
    allow_eos_padding: bool = field(
        default=False,
        metadata={"help": "Pad with EOS where there is nothing else, and read scores before a closing EOS."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_tokens not in _CONTROL_TOKENS:
            raise ConfigError(
                f"control_tokens is {self.control_tokens!r}; expected one of {', '.join(_CONTROL_TOKENS)}"
                f"{nearest(self.control_tokens, _CONTROL_TOKENS)}"
            )
