"""What `trl_compat` relies on in TRL: each private part is named where it moves."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import deque
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DistillationTrainer, DPOTrainer, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

from hf_objectives import trainers
from hf_objectives.diagnostics import callback
from hf_objectives.trainers.dpo import asking_for_padding
from hf_objectives.trainers.ppo import PPOTrainer
from hf_objectives.trainers.trl_compat import PromptOrder
from tests.support import dpo_worlds, reward_worlds
from tests.support.ppo_worlds import LETTERS, SETTINGS, count_a, ppo, small_model

VERSION = version("trl")
MOVED = (
    f"trl {VERSION} has changed: {{}}; hf_objectives/trainers/trl_compat.py is written for trl>=1.16,<1.17: install such "
    "a release, or adapt the file"
)

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
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_train_sampler": ["self", "dataset"],
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
    assert "loss_is_scaled_for_ga" in vars(RLOOTrainer), MOVED.format(
        "loss_is_scaled_for_ga is not what says how a loss is scaled"
    )
    step = inspect.getsource(RLOOTrainer.training_step)
    assert step.count("self._step += 1") == 1, MOVED.format("training_step does not count micro-batches in _step")
    batches = inspect.getsource(RLOOTrainer._prepare_inputs)
    for part in (
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ):
        assert part in batches, MOVED.format(f"_prepare_inputs is without {part!r}")
    sampler = RepeatSampler(range(4), mini_repeat_count=1, seed=3)
    for name in ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed", "generator"):
        assert hasattr(sampler, name), MOVED.format(f"RepeatSampler has no {name}")


@pytest.mark.parametrize(
    ("trainer", "attributes", "methods"),
    [
        (
            DPOTrainer,
            ("_precompute_model_hash", "_is_vision_dataset", "_metrics", "_tokenizer", "_total_train_tokens"),
            {
                "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
                "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
                "_compute_loss": ["self", "model", "inputs", "return_outputs"],
                "compute_ref_log_probs": ["self", "model", "inputs"],
            },
        ),
        (
            RewardTrainer,
            ("_metrics", "_total_train_tokens"),
            {
                "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
                "_save": ["self", "output_dir", "state_dict"],
            },
        ),
    ],
)
def test_pair_trainers(trainer, attributes, methods):
    source = inspect.getsource(trainer)
    for name in attributes:
        assert f"self.{name}" in source, MOVED.format(f"{trainer.__name__} has no {name}")
    for name, expected in methods.items():
        found = list(inspect.signature(getattr(trainer, name)).parameters)
        assert found == expected, MOVED.format(f"{trainer.__name__}.{name} takes {found}")


def test_forward_passes_of_dpo():
    """Of the policy, of the reference by adapter, of the reference model, and before training."""
    found = inspect.getsource(DPOTrainer).count("fused_lm_head=True")
    assert found == 4, MOVED.format(f"DPOTrainer runs {found} forward passes with the fused head")


def test_private_parts_are_touched_in_the_compat_modules_only():
    """A private method of a parent is called or overridden, or a private module of TRL imported, nowhere else."""
    for path in [*Path(trainers.__file__).parent.glob("*.py"), Path(callback.__file__)]:
        if path.stem in ("hf_checkpoints", "hf_compat", "hf_hub", "trl_compat", "trl_distillation"):
            continue
        source = path.read_text()
        found = re.findall(r"super\(\)\._[a-z]\w*|from trl\.\S+|accelerator\._\w+|self\._metrics\b", source)
        own = {
            name
            for kind in (Trainer, DPOTrainer, RewardTrainer, RLOOTrainer, DistillationTrainer)
            for name in dir(kind)
        }
        found += [name for name in re.findall(r"def (_[a-z]\w+)\(", source) if name in own]
        assert not found, f"{path.name} touches {found}"


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


@pytest.mark.slow
def test_what_a_batch_goes_through(spied):
    """One pass of the policy, one of the reference, rewards; then one pass of the policy for each loss."""
    generation, losses = spied.calls[:3], spied.calls[3:]
    assert sorted(generation) == ["policy", "reference", "rewards"], MOVED.format(f"a batch goes through {generation}")
    assert losses == ["loss", "policy"] * 2, MOVED.format(f"a loss goes through {losses}")


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


class AnswersOfTRL(PPOTrainer):
    """Draws answers as RLOO does, from the random state of the process."""

    def generate_answers(self, *args):
        return RLOOTrainer._generate_single_turn(self, *args)


@pytest.mark.slow
def test_the_first_step_on_a_batch_is_the_parents(tmp_path, spied):
    """The same seed, prompts and answers: what PPO leaves to RLOO is RLOO's."""
    run = ppo(
        tmp_path, [{"prompt": f"ask {letter}", "word": letter} for letter in "abcd"], num_generations=2, num_iterations=2,
        beta=0.1, critic="none", kind=AnswersOfTRL,
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


def test_the_fused_head_returns_what_score_tokens_does():
    output = [field.name for field in dataclasses.fields(FusedCausalLMOutput)]
    per_token = ["log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"]
    assert output == ["loss", *per_token, "aux_loss"], MOVED.format(f"the fused head returns {output}")
    source = inspect.getsource(add_fused_lm_head)
    for part in (
        "if not fused_lm_head:",
        "hidden_states = backbone_outputs.last_hidden_state[:, :-1]",
        "labels[:, 1:]",
    ):
        assert part in source, MOVED.format(f"the fused head has no {part}")


def test_padding_free_is_still_dropped():
    source = inspect.getsource(DPOTrainer.__init__)
    assert "self.padding_free = False" in source, MOVED.format("DPOTrainer packs pairs itself under padding_free")
    arguments = SimpleNamespace(padding_free=True)
    with asking_for_padding(arguments):
        assert arguments.padding_free is False
    assert arguments.padding_free is True
    with asking_for_padding(None):
        pass


@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo"])
def test_an_evaluation_leaves_the_random_state_of_training(kind, folders, tmp_path):
    """A loader draws when it is iterated, and so do answers."""
    if kind == "reward":
        run = reward_worlds.trainer(tmp_path)
    elif kind == "dpo":
        run = dpo_worlds.ours(folders[0], tmp_path, tests=Dataset.from_list(dpo_worlds.PAIRS[:2]))
    else:
        run = ppo(tmp_path, eval_dataset=[{"prompt": "ask a"}, {"prompt": "ask b"}], critic="none")
    before = torch.get_rng_state()
    run.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
