"""Arguments of RewardModelTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import RewardConfig

from hf_objectives.types import check_one_of


@dataclass
class RewardModelConfig(RewardConfig):
    """`trl.RewardConfig` with the settings of encoding.

    `max_length` has another meaning than for the parent, which drops longer rows: here their prompt is shortened, see
    `encode_pair`.

    Args:
        control_tokens: see `encode_chat`.
        allow_eos_padding: where EOS is the only token to pad with, read the score of a text that ends with EOS before it, as
            TRL does. Without it, such a text is an error.

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
        check_one_of("control_tokens", self.control_tokens, ("plain", "allow"))
