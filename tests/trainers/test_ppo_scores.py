"""From rewards to scores: the scale of reward models by hand, and in a run."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForSequenceClassification

from hf_objectives.trainers.ppo_scores import AnswerScores, ScoreScale
from tests.support.ppo_worlds import EOS, LETTERS, ScriptedPPO, count_a, logged, ppo, small_model

NAN = math.nan


def test_a_scale_counts_all_answers_so_far():
    """Of the model in place 1: 1 and 3, then 5; deviations of 1, 3, 5 are -2, 0, 2, whose mean square is 8/3."""
    scale = ScoreScale([1])
    first, second = torch.tensor([[9.0, 1.0], [7.0, 3.0]]), torch.tensor([[NAN, 5.0], [4.0, NAN]])
    assert torch.equal(scale.scaled(first), first)  # before any training
    scale.add(first)
    assert scale.scaled(first).flatten().tolist() == pytest.approx([9, -1, 7, 1])
    scale.add(second)
    found = scale.scaled(second)
    assert found[0, 1].item() == pytest.approx(2 / math.sqrt(8 / 3)) and found[0, 0].isnan()
    assert found[1, 0].item() == 4 and found[1, 1].isnan()
    again = ScoreScale([1])
    again.load_state_dict(scale.state_dict())
    assert torch.equal(again.scaled(first), scale.scaled(first)) and again.state_dict() == {1: [3, 9, 35]}
    again = ScoreScale([0])
    again.load_state_dict(scale.state_dict())  # of another model
    assert torch.equal(again.scaled(first), first)


def test_equal_scores_are_zero():
    scale = ScoreScale([0])
    same = torch.full((3, 1), 7.5)
    scale.add(same)
    assert scale.scaled(same).tolist() == [[0], [0], [0]]


def test_scores_are_scaled_then_weighed_then_clipped_then_penalised():
    """Models of mean 2 and deviation 1; the third answer has no reward, the fourth is a repetition."""
    scale = ScoreScale([0])
    scale.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    scores = AnswerScores(scale, torch.tensor([2.0, 10.0]), (-3.0, 15.0), 0.5, [1])
    rewards = torch.tensor([[3.0, 1.0], [0.0, NAN], [NAN, NAN], [2.0, 9.0]])
    ids = torch.tensor([[4, 1, 0], [4, 4, 4], [1, 0, 0], [4, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 0, 0]])
    new = torch.tensor([True, True, True, False])
    found, scored, figures = scores.of(rewards, ids, mask, new, trains=False)
    # 2 * 1 + 10 * 1; 2 * -2 clipped to -3, no stop; nothing; 10 * 9 clipped to 15, and its stop is outside the mask.
    assert found.tolist() == pytest.approx([12, -3.5, 0, 14.5])
    assert scored.tolist() == [True, True, False, False]
    assert figures == {"completions/finished": 0.5, "rewards/missing": 2}
    scores.of(rewards, ids, mask, new, trains=True)
    assert scale.state_dict() == {0: [5, 9, 23]}  # 1, 3, and now 3, 0, 2


SCRIPT = {"ask a": "b a <eos>", "ask b": "a a a <eos>", "ask c": "c <eos>", "ask d": "a b c d"}
ROWS = [{"prompt": prompt} for prompt in SCRIPT]


def judge():
    model = small_model(kind=LlamaForSequenceClassification, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config._name_or_path = "judge"
    return model.eval()


def says(model, prompt: str) -> float:
    """What the judge says of a prompt with its scripted answer, alone; plain texts are joined without a space."""
    said = SCRIPT[prompt].removesuffix(" <eos>")
    ids = LETTERS(f"{prompt}{said}")["input_ids"] + [EOS] * (said != SCRIPT[prompt])
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def run_with(folder, model, **options):
    settings = {"whiten_advantages": False, "beta": 0.0, "critic": "none", "lam": 1.0, "num_iterations": 1}
    return ppo(
        folder, ROWS, kind=ScriptedPPO, script=SCRIPT, reward=[model, count_a], reward_weights=[2.0, 1.0],
        reward_processing_classes=[LETTERS, None], per_device_train_batch_size=2, eval_dataset=ROWS,
        per_device_eval_batch_size=4, learning_rate=0.0, **{**settings, **options},
    )  # fmt: skip


def first_advantages(run, prompts: list[str]) -> list[float]:
    batch = run.generate_and_score([{"prompt": prompt} for prompt in prompts])
    return batch["advantages"][:, 0].tolist()  # the reward to go of the first token is the score


@pytest.mark.slow
def test_in_a_run(tmp_path):
    """Training counts answers batch by batch; an evaluation does not, and its rewards are what the model says."""
    model = judge()
    raw = {prompt: says(model, prompt) for prompt in SCRIPT}
    a = {prompt: answer.split().count("a") for prompt, answer in SCRIPT.items()}
    run = run_with(tmp_path, model, save_strategy="steps", save_steps=1, logging_steps=1, max_steps=2)
    run.model.eval()
    prompts = [*SCRIPT]
    assert first_advantages(run, prompts) == pytest.approx([2 * raw[p] + a[p] for p in prompts], abs=1e-5)
    seen: list[str] = []
    run.model.train()
    for pair in (prompts[:2], prompts[2:]):
        found = first_advantages(run, pair)
        seen += pair
        values = torch.tensor([raw[p] for p in seen], dtype=torch.float64)
        mean, std = float(values.mean()), float(values.std(correction=0))
        assert found == pytest.approx([2 * (raw[p] - mean) / std + a[p] for p in pair], rel=1e-3)
    run.model.eval()
    expected = [2 * (raw[p] - mean) / std + a[p] for p in prompts]
    for _ in range(2):
        assert first_advantages(run, prompts) == pytest.approx(expected, rel=1e-3)
    assert run.evaluate()["eval_rewards/judge/mean"] == pytest.approx(float(values.mean()), abs=1e-5)


@pytest.mark.slow
def test_what_is_logged_is_what_the_model_says_and_checkpoints_keep_the_scale(tmp_path):
    model = judge()
    raw = {prompt: says(model, prompt) for prompt in SCRIPT}
    run = run_with(tmp_path, model, save_strategy="steps", save_steps=1, logging_steps=1, max_steps=2)
    run.train()
    means = logged(run, "rewards/judge/mean")
    assert len(means) == 2 and sum(means) / 2 == pytest.approx(sum(raw.values()) / 4, abs=1e-5)
    kept = torch.load(tmp_path / "checkpoint-1" / "ppo_state_rank_0.pt", weights_only=True)["score_moments"]
    assert kept[0][0] == 2 and kept[0][1] == pytest.approx(2 * means[0], abs=1e-5)
    resumed = run_with(tmp_path / "resumed", model, max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.scores.scale.state_dict() == run.scores.scale.state_dict()
    assert run.scores.scale.state_dict()[0][:2] == pytest.approx([4, sum(raw.values())], abs=1e-5)
    assert run_with(tmp_path, model, normalize_reward_models=False).scores.scale.moments == {}
