"""What is measured after each stage of the stack, and the bar that each stage has."""

from __future__ import annotations

import math

import pytest
import torch

from hf_objectives import demo
from hf_objectives.recipes.stack_figures import divergence, draw, missed, pair_figures, sample

TOKENIZER = demo.build_tokenizer()
PROMPTS = [[{"role": "user", "content": text}] for text in ("Sort 31204.", 'Spell "dovabe" backwards.')]


def test_an_answer_ends_with_its_stop_token_and_padding_is_on_the_left():
    model = demo.build_model(TOKENIZER, hidden_size=16, num_layers=1)
    torch.manual_seed(0)
    with torch.no_grad():  # a model that stops soon
        model.lm_head.weight[TOKENIZER.eos_token_id] = model.lm_head.weight.mean(0) + 1.0
    ids, mask, answered = sample(model, TOKENIZER, PROMPTS)
    for row, seen, said in zip(ids, mask, answered, strict=True):
        begin = int(said.argmax())
        end = begin + int(said.sum())
        stops = (row[begin:] == TOKENIZER.eos_token_id).nonzero().flatten().tolist()
        assert end == (begin + stops[0] + 1 if stops else len(row))
        first = int(seen.argmax())
        assert seen[first:end].all() and not seen[:first].any() and not seen[end:].any()
        text = TOKENIZER.apply_chat_template(PROMPTS[0], add_generation_prompt=True, tokenize=False)
    shortest = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids[0][mask[0].bool()][: len(shortest)].tolist() == shortest


def test_divergence_is_the_sum_over_the_tokens_of_an_answer():
    ours, theirs = (demo.build_model(TOKENIZER, hidden_size=16, num_layers=1, seed=seed) for seed in (0, 1))
    for model in (ours, theirs):
        model.lm_head.weight.data.mul_(20)  # distributions that differ
    torch.manual_seed(0)
    ids = torch.randint(6, 600, (2, 7))
    mask = torch.ones_like(ids)
    answered = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
    expected = 0.0
    with torch.no_grad():
        for row, said in zip(ids, answered, strict=True):
            p, q = (model(row[None]).logits[0].double().softmax(-1).tolist() for model in (ours, theirs))
            for t in said.nonzero().flatten().tolist():
                expected += sum(a * math.log(a / b) for a, b in zip(p[t - 1], q[t - 1], strict=True)) / 2
    assert divergence(ours, theirs, ids, mask, answered) == pytest.approx(expected, rel=1e-4)
    assert divergence(ours, ours, ids, mask, answered) == 0


def exam(sorting: float, dates: float = 0.5) -> dict[str, dict[str, float]]:
    shares = {"sorting": sorting, "dates": dates}
    return {name: {"exact_match": share, "high": share + 0.05} for name, share in shares.items()}


def rows_of_a_good_run() -> list[dict]:
    interval = {"exact_match_low": 0.0, "exact_match_high": 0.9}
    return [
        {
            "stage": "pretrain",
            "texts": 2.0,
            "chats": 50.0,
            "exact_match": 0.0,
            **interval,
            "tokens": 1234,
            "seconds": 1.5,
        },
        {"stage": "sft", "texts": 2.1, "chats": 1.5, "exact_match": 0.5, **interval, "by_skill": exam(0.2)},
        {"stage": "reward", "accuracy": 0.95, "low": 0.9, "high": 0.97, "calibration_error": 0.02, "tokens": 99},
        {"stage": "ppo", "texts": 2.2, "chats": 1.6, "exact_match": 0.7, **interval, "by_skill": exam(0.9), "kl": 0.7},
        {"stage": "dpo", "texts": 2.2, "chats": 1.6, "exact_match": 0.55, **interval, "kl": 0.2}
        | {"accuracy": 0.93, "low": 0.9, "high": 0.95},
        {"stage": "student", "texts": 9.0, "chats": 2.0, "exact_match": 0.3, **interval},
        {"stage": "distill", "texts": 9.0, "chats": 1.9, "exact_match": 0.4, **interval},
    ]


def test_picture(tmp_path):
    draw(rows_of_a_good_run(), tmp_path / "stack.png")
    assert (tmp_path / "stack.png").read_bytes().startswith(b"\x89PNG")


def test_a_good_run_misses_no_bar_and_neither_do_stages_that_are_left_out():
    rows = rows_of_a_good_run()
    assert missed(rows) == [] == missed(rows[:1]) == missed(rows[3:4])


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        ("sft", {"texts": 2.21}, "sft: text perplexity is 2.210, expected at most 2.200"),
        ("sft", {"exact_match": 0.05}, "sft: exact match is 0.050, expected at least 0.100"),
        ("reward", {"accuracy": 0.89}, "reward: accuracy is 0.890, expected at least 0.900"),
        ("reward", {"calibration_error": 0.06}, "reward: calibration error is 0.060"),
        ("ppo", {"exact_match": 0.64}, "ppo: exact match is 0.640, expected at least 0.650"),
        ("ppo", {"kl": 1.1}, "ppo: KL is 1.100, expected at most 1.000"),
        ("ppo", {"by_skill": exam(0.9, dates=0.39)}, "ppo: dates, upper end is 0.440, expected at least 0.450"),
        ("dpo", {"accuracy": 0.89}, "dpo: reward accuracy is 0.890"),
        ("dpo", {"exact_match": 0.49}, "dpo: exact match is 0.490, expected at least 0.500"),
        ("dpo", {"chats": 1.66}, "dpo: chat perplexity is 1.660, expected at most 1.650"),
        ("distill", {"exact_match": 0.305}, "distill: exact match is 0.305, expected at least 0.310"),
    ],
)
def test_what_falls_short_of_its_bar_is_named(stage, change, said):
    rows = [row | change if row["stage"] == stage else row for row in rows_of_a_good_run()]
    assert any(line.startswith(said) for line in missed(rows))


def test_figures_of_pairs():
    after = {"eval_accuracy": 0.9, "eval_accuracy_low": 0.8, "eval_accuracy_high": 0.95}
    found = pair_figures({"after": after | {"eval_expected_calibration_error": 0.03}})
    assert found == {"accuracy": 0.9, "low": 0.8, "high": 0.95, "calibration_error": 0.03}
    assert pair_figures({"after": {"eval_loss": 1.0}}) == {}
