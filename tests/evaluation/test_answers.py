"""Answers to held-out prompts: which are asked, what is said, and how it is scored."""

from __future__ import annotations

import evaluate
import pytest
import torch
from datasets import Dataset

from hf_objectives import compute_perplexity, demo
from hf_objectives.errors import ConfigError, DataError
from hf_objectives.evaluation import check_answers, evaluate_answers, find_answers, module_path, wilson_interval
from hf_objectives.evaluation.answers import Asked, answer_prompts
from tests.support.language_models import llama

STOP = 9


def rows(*pairs, **more):
    return Dataset.from_list([{"input_ids": ids, "labels": labels, **more} for ids, labels in pairs])


def test_the_last_answer_of_each_row_without_its_stop():
    two_turns = ([1, 2, 3, STOP, 4, 5, 6, STOP, 7], [-100, -100, 3, STOP, -100, -100, 6, STOP, -100])
    text = ([5, 6, 7], [5, 6, 7])  # has no prompt
    cut = ([1, 2, 3], [-100, -100, 3])  # an answer without its stop
    assert find_answers(rows(two_turns, text, cut), 9, [STOP]) == [
        Asked([1, 2, 3, STOP, 4, 5], [6]),
        Asked([1, 2], [3]),
    ]


def test_of_packed_rows_the_first_document_with_an_answer_alone():
    packed = ([5, 6, 1, 2, STOP, 1, 3, STOP], [-100, -100, -100, 2, STOP, -100, 3, STOP])
    assert find_answers(rows(packed, seq_lengths=[2, 3, 3]), 1, [STOP]) == [Asked([1], [2])]


def test_rows_are_spread_and_none_is_an_error():
    made = rows(*(([1, i, STOP], [-100, i, STOP]) for i in range(10)))
    assert [one.answer for one in find_answers(made, 4, [STOP])] == [[0], [2], [5], [7]]
    with pytest.raises(DataError, match="no held-out row has an answer"):
        find_answers(rows(([1, 2], [1, 2])), 4, [STOP])


def test_padding_and_batches_change_no_answer_nor_the_state():
    model, prompts = llama().train(), [[5], [7, 8, 9, 10, 11], [3, 4], [1, 2, 3]]
    state = torch.get_rng_state()
    alone = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(llama()(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(ids[len(prompt) :])
    stop = alone[1][3]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    options = {"max_new_tokens": 6, "stop_ids": [stop], "pad_id": 0}
    for size in (1, 3, 4):
        assert answer_prompts(model, prompts, batch_size=size, **options) == expected
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_scores():
    class Says:
        """Answers each prompt with the id after its last one."""

        training = False

        def eval(self):
            return self

        def train(self, mode):
            return self

        def parameters(self):
            return iter([torch.zeros(1)])

        def generate(self, input_ids, **options):
            return torch.cat([input_ids, input_ids[:, -1:] + 1, torch.full_like(input_ids[:, -1:], STOP)], 1)

    class Letters:
        pad_token_id = 0

        def decode(self, ids):
            return " ".join(map(str, ids)) + " "

    asked = [Asked([1], [2]), Asked([1, 3], [4]), Asked([5], [7])]
    figures, answers = evaluate_answers(Says(), Letters(), asked, max_new_tokens=2, stop_ids=[STOP])
    low, high = wilson_interval(2, 3)
    expected = {"answers_exact_match": 2 / 3, "answers_exact_match_low": low, "answers_exact_match_high": high}
    assert figures == {**expected, "answers_cut": 0.0}
    assert [(a.prompt, a.said, a.expected) for a in answers] == [("1", "2", "2"), ("1 3", "4", "4"), ("5", "6", "7")]


def test_our_modules_load_without_a_network(tmp_path):
    found = evaluate.load(module_path("exact_match")).compute(predictions=["a", "b"], references=["a", "c"])
    assert found["exact_match"] == 0.5 and found["exact_match_low"] == wilson_interval(1, 2)[0]
    tokenizer = demo.build_tokenizer()
    model = demo.build_model(tokenizer, hidden_size=32, num_layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["Sort 321.", "Name the month 1 before June."]
    found = evaluate.load(module_path("perplexity")).compute(predictions=texts, model_id=str(tmp_path))
    assert found["perplexity"] == pytest.approx(compute_perplexity(model.eval(), tokenizer, texts).perplexity, rel=1e-6)
    assert found["num_tokens"] == sum(len(tokenizer(text)["input_ids"]) - 1 for text in texts)
    with pytest.raises(ConfigError, match="module is 'bleu'; expected one of exact_match, perplexity"):
        module_path("bleu")


@pytest.mark.parametrize(("count", "tokens"), [(-1, 8), (1, 0)])
def test_settings_that_cannot_be(count, tokens):
    with pytest.raises(ConfigError, match=f"eval_answers is {count} and eval_max_new_tokens {tokens}"):
        check_answers(count, tokens)
