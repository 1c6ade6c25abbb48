"""Which answers a step of PPO has: by plain loops, over processes, over epochs, and in a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_objectives.trainers.ppo import PPOTrainer
from hf_objectives.trainers.ppo_minibatches import deal, rows_of_steps
from tests.support.ppo_worlds import ppo

ORDER = [7, 0, 11, 3, 5, 2, 9, 1, 4, 10, 8, 6]  # as TRL shuffles what a process has


def by_loops(numbers: list[int], steps: int, key: tuple[int, int, int]) -> list[set[int]]:
    """The numbers of each step: each block of consecutive numbers, in an order of its own, gives one to each."""
    dealt: list[set[int]] = [set() for _ in range(steps)]
    for block in range(min(numbers) // steps, max(numbers) // steps + 1):
        order = np.random.default_rng([*key, block]).permutation(steps)
        for step in range(steps):
            dealt[step].add(steps * block + int(order[step]))
    return dealt


def numbers_of(numbers: list[int], steps: int, key: tuple[int, int, int]) -> list[set[int]]:
    tensor = torch.tensor(numbers)
    return [set(tensor[rows].tolist()) for rows in rows_of_steps(tensor, steps, key)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 12])
def test_each_block_gives_one_answer_to_each_step(steps):
    for key in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0)):
        assert numbers_of(ORDER, steps, key) == by_loops(ORDER, steps, key)
        assert set.union(*numbers_of(ORDER, steps, key)) == set(range(12))


def test_a_step_has_the_same_answers_over_any_number_of_processes():
    whole = numbers_of([*range(12)], 2, (5, 7, 1))
    for parts in (2, 3, 6):
        size = 12 // parts
        own = [numbers_of([*range(size * i, size * (i + 1))], 2, (5, 7, 1)) for i in range(parts)]
        assert [set.union(*(dealt[step] for dealt in own)) for step in range(2)] == whole


def test_seed_batch_and_epoch_each_deal_anew_and_evenly():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({str(numbers_of([*range(64)], 4, key)) for key in keys}) == 4
    counts = np.zeros((8, 4))
    for epoch in range(2000):
        for step, numbers in enumerate(numbers_of([*range(8)], 4, (0, 0, epoch))):
            counts[[*numbers], step] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05  # five standard deviations


def batches(order: list[int]) -> list[dict[str, torch.Tensor]]:
    """Six micro-batches of two answers; answer n has n % 3 tokens and says n."""
    lengths = torch.tensor([n % 3 for n in order])
    whole = {
        "number": torch.tensor(order),
        "loss_mask": (torch.arange(3) < lengths[:, None]).long(),
        "said": torch.tensor(order)[:, None] * torch.ones(3),
    }
    return [{name: value[2 * i : 2 * i + 2] for name, value in whole.items()} for i in range(6)]


def test_micro_batches_know_the_tokens_of_their_step():
    dealt = deal(batches(ORDER), 3, (5, 7, 1))
    for step, expected in enumerate(by_loops(ORDER, 2, (5, 7, 1))):
        parts = dealt[3 * step : 3 * step + 3]
        numbers = [n for part in parts for n in part["number"].tolist()]
        assert set(numbers) == expected and len(numbers) == 6
        for part in parts:
            assert part["step_tokens"].item() == sum(n % 3 for n in expected)
            for n, mask, said in zip(part["number"].tolist(), part["loss_mask"], part["said"], strict=True):
                assert int(mask.sum()) == n % 3 and said.tolist() == [n] * 3
    # What an epoch deals does not depend on the epoch before.
    again = deal(deal(batches(ORDER), 3, (5, 7, 0)), 3, (5, 7, 1))
    for one, other in zip(dealt, again, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    empty = [{**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])} for batch in batches(ORDER)]
    assert deal(empty, 3, (5, 7, 1))[0]["step_tokens"].item() == 1


class Counted(PPOTrainer):
    """Notes the numbers of the answers of each micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.numbers = []

    def answers_loss(self, model, inputs):
        self.numbers.append(inputs["number"].tolist())
        return super().answers_loss(model, inputs)


@pytest.mark.slow
def test_every_epoch_of_a_run_deals_anew(tmp_path):
    """Two batches of eight answers, three epochs of two steps of two micro-batches."""
    run = ppo(
        tmp_path, [{"prompt": f"ask {letter}"} for letter in "abcdeabc"], kind=Counted, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=3, max_steps=12, seed=11, critic="none",
    )  # fmt: skip
    run.train()
    steps = [{*run.numbers[i], *run.numbers[i + 1]} for i in range(0, 24, 2)]
    expected = [by_loops([*range(8)], 2, (11, batch, epoch)) for batch in range(2) for epoch in range(3)]
    assert steps == [one for epoch in expected for one in epoch]
    assert len({str(sorted(step)) for step in steps[::2]}) > 3
