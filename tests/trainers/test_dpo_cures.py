"""What DPO costs the language model, and what keeps the chosen answers likely."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax, logsigmoid

from hf_objectives import DataCollatorForPreferencePairs, demo
from hf_objectives.labels.pairs import encode_pair
from tests.support.dpo_worlds import BATCH, PAIRS, TOKENIZER, load, logps, ours

# -- the price and the cures -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_language_models_are_evaluated_along_the_way_and_stop_the_run(folders, tmp_path):
    named = {"texts": demo.texts(6), "chats": demo.chats(4)}
    run = ours(
        folders[0],
        tmp_path,
        tests=Dataset.from_list(PAIRS),
        trainer={"eval_lm_datasets": named},
        max_perplexity_increase=0.01,
        learning_rate=0.03,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=6,
    )
    run.train()
    history = run.state.log_history
    increases = [log["eval_texts_perplexity_increase"] for log in history if "eval_texts_perplexity_increase" in log]
    assert increases[0] == 0 and run.state.global_step < 6
    worst = [
        max(log[f"eval_{n}_perplexity_increase"] for n in named) for log in history if "eval_texts_perplexity" in log
    ]
    assert worst[-1] > 0.01 and all(value <= 0.01 for value in worst[:-1])


@pytest.mark.slow
def test_nll_and_dpop_by_hand(folders, tmp_path):
    policy, reference = load(folders[0]), load(folders[1])
    pairs = [encode_pair(TOKENIZER, row) for row in PAIRS[4:]]
    said = [
        [[logps(model, pair, side) for pair in pairs] for side in ("chosen", "rejected")]
        for model in (policy, reference)
    ]
    ratio = [[sum(a) - sum(b) for a, b in zip(said[0][side], said[1][side], strict=True)] for side in (0, 1)]
    nll = -sum(map(sum, said[0][0])) / sum(map(len, said[0][0]))
    assert any(value < 0 for value in ratio[0])  # a chosen answer that has fallen

    def sigmoid_loss(penalty):
        terms = [0.1 * (w - lo - penalty * max(0.0, -w)) for w, lo in zip(*ratio, strict=True)]
        return sum(math.log1p(math.exp(-term)) for term in terms) / len(terms)

    for changed, expected in (
        ({}, sigmoid_loss(0)),
        ({"nll_weight": 0.5}, sigmoid_loss(0) + 0.5 * nll),
        ({"dpop_lambda": 3.0}, sigmoid_loss(3)),
        ({"dpop_lambda": 3.0, "loss_weights": [2.0]}, 2 * sigmoid_loss(3)),
        ({"dpop_lambda": 2.0, "nll_weight": 1.0}, sigmoid_loss(2) + nll),
    ):
        run = ours(load(folders[0]), tmp_path, trainer={"ref_model": load(folders[1])}, **changed)
        assert run.compute_loss(run.model, dict(BATCH)).item() == pytest.approx(expected, abs=2e-5), changed


def test_the_gradient_of_dpop_is_its_own(folders, tmp_path):
    """Against autograd through a loss written out: nothing of the parent's term is left."""
    run = ours(load(folders[0]), tmp_path, trainer={"ref_model": load(folders[1])}, dpop_lambda=4.0)
    run.compute_loss(run.model, dict(BATCH)).backward()
    model, reference = load(folders[0]), load(folders[1])
    ids, mask = BATCH["input_ids"], BATCH["completion_mask"][:, 1:]

    def summed(of):
        table = log_softmax(of(ids, attention_mask=BATCH["attention_mask"]).logits[:, :-1], dim=-1)
        return (table.gather(2, ids[:, 1:, None])[..., 0] * mask).sum(dim=1)

    chosen, rejected = (summed(model) - summed(reference).detach()).chunk(2)
    loss = -logsigmoid(0.1 * (chosen - rejected - 4.0 * (-chosen).clamp(min=0))).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        found = run.model.get_parameter(name).grad
        assert torch.allclose(found, parameter.grad, atol=1e-5 * float(parameter.grad.abs().max())), name


NEAR = [
    {
        "prompt": [{"role": "user", "content": f"Say {word} {i}"}],
        "chosen": [{"role": "assistant", "content": f"the {word} is number {i} of 7 in all"}],
        "rejected": [{"role": "assistant", "content": f"the {word} is number {i} of 9 in all"}],
    }
    for i, word in enumerate(("apple", "pear", "plum", "fig"))
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> str:
    """A model that says both answers of each pair, about equally often."""
    model = demo.build_model(TOKENIZER, hidden_size=32, num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = DataCollatorForPreferencePairs(TOKENIZER)(NEAR)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    for _ in range(100):
        optimizer.zero_grad()
        model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("tuned")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "falls"), [({}, True), ({"nll_weight": 1.0}, False), ({"dpop_lambda": 50.0}, False)]
)
def test_plain_dpo_lets_the_chosen_answers_fall_and_the_cures_do_not(changed, falls, tuned, tmp_path, caplog):
    """Answers that differ in one letter, as in Pal et al. (section 3): the way to a margin leads down for both."""
    dataset = Dataset.from_list(NEAR)
    run = ours(tuned, tmp_path, rows=dataset, tests=dataset, max_steps=40, logging_steps=5, **changed)
    with caplog.at_level(logging.WARNING, logger="hf_objectives"):
        run.train()
    metrics = run.evaluate()
    assert metrics["eval_rewards/accuracies"] == 1.0 and metrics["eval_rewards/margins"] > 0
    if falls:
        assert metrics["eval_logps_change/chosen"] < -1
    else:
        assert metrics["eval_logps_change/chosen"] >= 0
    warnings = [record.getMessage() for record in caplog.records if "less likely" in record.getMessage()]
    assert len(warnings) == int(falls) and all("nll_weight or dpop_lambda" in words for words in warnings)
