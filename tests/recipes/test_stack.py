"""The whole stack in one command: which checkpoint each stage starts from, and what its table measures."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hf_objectives import demo
from hf_objectives.errors import ConfigError
from hf_objectives.recipes import stack
from hf_objectives.recipes.stack import StackArguments, arguments, divergence, draw, main, sample
from tests.support.recipes import few_built_in

TOKENIZER = demo.build_tokenizer()
PROMPTS = [[{"role": "user", "content": text}] for text in ("Sort 3 1 2.", "Spell stone backwards.")]


def value_of(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_each_stage_starts_from_the_one_that_it_builds_on(tmp_path):
    args = StackArguments(output_dir=str(tmp_path))
    starts = {name: value_of(arguments(name, args), "--model_name_or_path") for name in stack.STAGES}
    folder = str(tmp_path)
    assert starts == {"pretrain": "builtin", "sft": f"{folder}/pretrain"} | dict.fromkeys(
        ("reward", "ppo", "dpo"), f"{folder}/sft"
    )
    assert arguments("ppo", args)[-6:-3] == ["--reward_funcs", "builtin", f"{folder}/reward"]


def test_a_skipped_stage_is_passed_over(tmp_path):
    args = StackArguments(output_dir=str(tmp_path), skip=["sft", "reward"], length=0.5, seed=3)
    words = arguments("ppo", args)
    assert value_of(words, "--model_name_or_path") == f"{tmp_path}/pretrain" and "--reward_funcs" not in words
    assert value_of(words, "--max_steps") == str(stack.STACK["ppo"].length // 2) and value_of(words, "--seed") == "3"
    args = StackArguments(output_dir=str(tmp_path), skip=["pretrain", "sft"])
    assert value_of(arguments("dpo", args), "--model_name_or_path") == "builtin"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip": ["stf"]}, "skip is 'stf'.*did you mean 'sft'"),
        ({"skip": list(stack.STAGES)}, "nothing is left to run"),
        ({"length": 0.0}, "length is 0.0"),
        ({"configs": "nowhere"}, "no folder nowhere"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ConfigError, match=message):
        StackArguments(**given)


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


def test_picture(tmp_path):
    rows = [
        {"stage": "sft", "texts": 10.0, "chats": 2.0, "exact_match": 0.25, "tokens": 1234, "seconds": 1.5},
        {"stage": "reward", "tokens": 99, "seconds": 2.0},
        {"stage": "ppo", "texts": 11.0, "chats": 2.1, "exact_match": 0.5, "kl": 0.7, "tokens": None, "seconds": 3.0},
    ]
    draw(rows, tmp_path / "stack.png")
    assert (tmp_path / "stack.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.slow
def test_from_fine_tuning_to_a_policy(tmp_path, monkeypatch, capsys):
    """Few and small: a fine-tuned model, and PPO from it; the other stages have recipes, and tests, of their own."""
    pairs = demo.preferences
    few_built_in(monkeypatch, 40)
    # As many prompts to train on as a batch of PPO takes.
    sizes = {"train": 300, "test": 16}
    monkeypatch.setattr(
        demo, "preferences", lambda n, *, split="train", **given: pairs(sizes[split], split=split, **given)
    )
    monkeypatch.setattr(stack, "_PROMPTS", 12)
    rows = main(["--output_dir", str(tmp_path), "--skip", "pretrain", "reward", "dpo", "--length", "0.001"])
    assert [row["stage"] for row in rows] == ["sft", "ppo"]
    assert rows[1]["kl"] >= 0 and "kl" not in rows[0] and all(row["seconds"] > 0 for row in rows)
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "stack.png").exists()
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{row['texts']:.4g}" in printed and f"{row['seconds']:.4g}" in printed
