"""PPO is the same however a step is split into micro-batches; `tests/invariant/test_two_processes.py` has two processes."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_objectives.errors import ConfigError
from tests.support.ppo_acts import by_layout, layout_figures
from tests.support.ppo_worlds import LETTERS, ScriptedPPO, ppo

RUN = "one batch a step"


def assert_same(run: dict, whole: dict) -> None:
    for step, one in zip(run["steps"], whole["steps"], strict=True):
        assert sorted(step) == sorted(one)
    expected = layout_figures(whole)
    for key, value in layout_figures(run).items():
        if "train_loss" not in key:  # of the steps since the run went on
            assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key


def positions_of_their_own():
    """A model that adds a vector for each position: padding on the left must not count as positions."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": None}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(LETTERS), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, eos_token_id=1, **sizes)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.slow
def test_positions_begin_behind_the_padding(tmp_path):
    """Log-probabilities and values of an answer do not depend on the longest prompt of its batch."""
    prompts = {"ask a": "b c <eos>", "ask b b b b b b": "a", "ask d": "<eos>", "ask e e e": "e d c b"}
    for critic in ("separate", "shared"):
        run = ppo(
            tmp_path, [{"prompt": prompt} for prompt in prompts], kind=ScriptedPPO, script=prompts, critic=critic,
            model=positions_of_their_own(), beta=0.1,
        )  # fmt: skip
        run.critic.head.weight.data.normal_()
        output = run.generate_and_score([{"prompt": prompt} for prompt in prompts])
        model, critic_model = run.model, run.critic
        for i, (prompt, answer) in enumerate(prompts.items()):
            begin, ids = LETTERS(prompt)["input_ids"], LETTERS(answer)["input_ids"]
            with torch.no_grad():
                found = model(torch.tensor([begin + ids]), output_hidden_states=True)
                states = (
                    found.hidden_states[-1]
                    if critic == "shared"
                    else critic_model.backbone(torch.tensor([begin + ids]))[0]
                )
                values = critic_model(states)[0, len(begin) - 1 : -1]
            logps = found.logits[0, len(begin) - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.allclose(output["old_token_logps"][i, : len(ids)], expected, atol=1e-5), (critic, prompt)
            assert torch.allclose(output["values"][i, : len(ids)], values, atol=1e-5), (critic, prompt)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout_at_the_end_of_an_epoch(tmp_path):
    """Four steps an epoch: the answers are used up there. Within the epochs over answers it is refused."""
    whole = by_layout(tmp_path / "whole", RUN, 8, 1, save_strategy="steps", save_steps=1, num_iterations=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = by_layout(tmp_path / "again", RUN, 2, 4, resume=checkpoint, num_iterations=2)
    assert len(resumed["steps"]) == 2
    assert_same(resumed, {**whole, "steps": whole["steps"][4:]})
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    with pytest.raises(ConfigError, match="this run with 2 x 4 x 1"):
        by_layout(tmp_path / "refused", RUN, 2, 4, resume=checkpoint, num_iterations=2)
    with pytest.raises(ConfigError, match="answers that are not used up, split into.*'steps_per_generation': 1"):
        by_layout(tmp_path / "refused", RUN, 2, 4, resume=checkpoint, num_iterations=2, ignore_data_skip=True)
