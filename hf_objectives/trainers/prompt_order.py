"""The order in which a policy trainer gives prompts."""

from __future__ import annotations

from trl.trainer.utils import RepeatSampler


class PromptOrder(RepeatSampler):
    """TRL's order of prompts, with a shuffle that follows from the epoch, not from how many epochs this process has seen."""

    @classmethod
    def like(cls, other: RepeatSampler) -> PromptOrder:
        """A sampler with the settings of another."""
        return cls(
            other.data_source, other.mini_repeat_count, other.batch_size, other.repeat_count, other.shuffle, other.seed
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as the loader does before each; the first has TRL's own shuffle."""
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)
