"""The order of prompts: TRL's in the first epoch, another in each later one."""

from __future__ import annotations

from trl.trainer.utils import RepeatSampler

from hf_objectives.trainers.trl_compat import PromptOrder


def test_the_order_depends_on_the_epoch_and_begins_with_trls():
    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5}
    ours = PromptOrder.like(RepeatSampler(range(10), **settings))
    ours.set_epoch(0)
    first = list(ours)
    assert first == list(RepeatSampler(range(10), **settings)) and len(first) == len(ours)
    ours.set_epoch(1)
    second = list(ours)
    assert second != first
    resumed = PromptOrder.like(RepeatSampler(range(10), **settings))
    resumed.set_epoch(1)
    assert list(resumed) == second
    unshuffled = PromptOrder.like(RepeatSampler(range(10), **settings, shuffle=False))
    unshuffled.set_epoch(4)
    assert list(unshuffled)[:6] == [0, 0, 1, 1, 2, 2]
