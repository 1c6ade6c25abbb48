"""The private parts of TRL's RLOOTrainer and of the Trainer that PPO stands on, each named where it moves."""

from __future__ import annotations

import inspect
from collections import deque

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.utils import RepeatSampler

from tests.support.ppo_worlds import LETTERS, SETTINGS, count_a, ppo, small_model

MOVED = "trl.RLOOTrainer has changed: {}; hf_objectives.trainers.ppo overrides or calls it and is to be looked at"

PARAMETERS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_train_sampler": ["self", "dataset"],
    "_save_checkpoint": ["self", "model", "trial"],
    "log": ["self", "logs", "start_time"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_methods(name):
    method = getattr(RLOOTrainer, name, None)
    assert method is not None, MOVED.format(f"it has no {name}")
    # Optional ones at the end do not matter.
    found = list(inspect.signature(method).parameters)[: len(PARAMETERS[name])]
    assert found == PARAMETERS[name], MOVED.format(f"{name} takes {found}")


def test_attributes():
    for name in (
        "create_scheduler",
        "_load_optimizer_and_scheduler",
        "_get_output_dir",
        "get_optimizer_cls_and_kwargs",
    ):
        assert hasattr(Trainer, name), f"transformers.Trainer has no {name}; hf_objectives.trainers.ppo calls it"
    assert "loss_is_scaled_for_ga" in vars(RLOOTrainer), MOVED.format(
        "loss_is_scaled_for_ga is not what says how a loss is scaled"
    )
    sampler = RepeatSampler(range(4), mini_repeat_count=1, seed=3)
    for name in ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed", "generator"):
        assert hasattr(sampler, name), MOVED.format(f"RepeatSampler has no {name}")


class Spied(RLOOTrainer):
    """Notes what is called, in which order, and what a generated batch holds."""

    def __init__(self, *args, **kwargs):
        self.calls, self.batch = [], {}
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        self.calls.append("reference" if model is self.ref_model else "policy")
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        assert len(result) == 3, MOVED.format(
            "log-probabilities, entropies and auxiliary loss are no longer what is returned"
        )
        return result

    def _calculate_rewards(self, *args):
        self.calls.append("rewards")
        rewards = super()._calculate_rewards(*args)
        self.rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs):
        assert isinstance(inputs, list) and {"prompt", "word"} <= inputs[0].keys(), MOVED.format(
            "rows lose their columns"
        )
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch

    def _compute_loss(self, model, inputs):
        self.calls.append("loss")
        return super()._compute_loss(model, inputs)


@pytest.fixture(scope="module")
def spied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spied")
    small_model().save_pretrained(folder)
    rows = [{"prompt": f"ask {letter}", "word": letter} for letter in "abcd"]
    args = RLOOConfig(
        str(folder), per_device_train_batch_size=4, num_generations=2, max_completion_length=4, max_steps=2, beta=0.1,
        num_iterations=2, **SETTINGS,
    )  # fmt: skip
    run = Spied(
        str(folder), count_a, args, train_dataset=Dataset.from_list(rows), processing_class=LETTERS,
    )  # fmt: skip
    run.train()
    return run


def test_the_order_of_a_batch(spied):
    """Values are read in the first pass, the policy's; the second is the reference's; rewards come after both."""
    expected = ["policy", "reference", "rewards", "loss", "policy", "loss", "policy"]
    assert spied.calls == expected, MOVED.format(f"a batch now goes through {spied.calls}")


def test_what_a_batch_holds(spied):
    needed = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    assert needed <= spied.batch.keys(), MOVED.format(f"the generated batch has {sorted(spied.batch)}")
    assert spied.batch["completion_ids"].shape == spied.batch["completion_mask"].shape
    assert spied.rewards.shape == (4, 1), MOVED.format("rewards are not [answers of all ranks, functions]")
    assert all(isinstance(value, torch.Tensor) for value in spied.batch.values())


def test_what_the_trainer_keeps(spied):
    assert spied._step == 2, MOVED.format("_step does not count micro-batches")
    assert isinstance(spied._buffered_inputs, list) and len(spied._buffered_inputs) == 1, MOVED.format(
        "_buffered_inputs moved"
    )
    assert spied._metrics.keys() == {"train", "eval"}, MOVED.format("_metrics moved")
    spied._metrics["train"]["anything"].append(1.0)
    assert {"prompt", "completion", "rewards", "advantages"} <= spied._logs.keys(), MOVED.format("_logs moved")
    assert isinstance(spied._logs["advantages"], deque), MOVED.format("the table's advantages are no deque")
    for name in (
        "reward_weights",
        "eos_token_ids",
        "reward_clip_range",
        "epsilon_low",
        "epsilon_high",
        "aux_loss_enabled",
    ):
        assert hasattr(spied, name), MOVED.format(f"it has no {name}")
    for name in (
        "temperature",
        "max_completion_length",
        "router_aux_loss_coef",
        "_tokenizer",
        "_is_vlm",
        "reward_func_names",
    ):
        assert hasattr(spied, name), MOVED.format(f"it has no {name}")


def test_the_first_step_on_a_batch_is_the_parents(tmp_path, spied):
    """The same seed, prompts and answers: what PPO leaves to RLOO is RLOO's."""
    run = ppo(
        tmp_path, [{"prompt": f"ask {letter}", "word": letter} for letter in "abcd"], num_generations=2, num_iterations=2,
        beta=0.1, critic="none",
    )  # fmt: skip
    run.train()
    assert list(run._logs["completion"]) == list(spied._logs["completion"]) and any(run._logs["completion"])
    assert list(run._logs["rewards"]["count_a"]) == list(spied._logs["rewards"]["count_a"])
    for name in ("reward", "completions/mean_length", "kl", "num_tokens"):
        ours, theirs = (next(log[name] for log in one.state.log_history if name in log) for one in (run, spied))
        assert ours == pytest.approx(theirs, abs=1e-6), name


def test_one_answer_a_prompt_passes_the_parents_check(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        RLOOConfig(str(tmp_path), num_generations=1, use_cpu=True, bf16=False)
    ppo(tmp_path, num_generations=1)
