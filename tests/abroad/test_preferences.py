"""Our collator of preference pairs in TRL's own trainers: the loss of `encode_pair`'s tokens by hand, or an error."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from hf_objectives import DataCollatorForPreferencePairs, demo
from hf_objectives.errors import FormatError
from hf_objectives.labels import encode_pair
from tests.support.dpo_worlds import PAIRS, TOKENIZER, logps, options

COLLATOR = DataCollatorForPreferencePairs(TOKENIZER)
BETA = 0.3
KEPT = {"remove_unused_columns": False}
CHATS = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in PAIRS]
TEXTS = [
    {"prompt": f"{i} and {i} is ", "chosen": f"{2 * i}, {'of course' * (i % 3)}", "rejected": "nobody knows"}
    for i in range(8)
]
ROWS = {
    "chats": CHATS,
    "chats without a prompt": [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS],
    "texts": TEXTS,
    "chats with ids": [{**row, **encode_pair(TOKENIZER, row)} for row in CHATS],
}
every_kind = pytest.mark.parametrize("kind", ROWS)


def policy(seed):
    return demo.build_model(TOKENIZER, hidden_size=32, num_layers=2, seed=seed)


def dpo(rows, folder, collator=COLLATOR, **changed):
    """Evaluates and trains on all rows at once, without learning."""
    settings = {"beta": BETA, "learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": len(rows)}
    args = DPOConfig(**options(folder, **{**settings, "per_device_eval_batch_size": len(rows), **changed}))
    data = Dataset.from_list(rows)
    return DPOTrainer(
        policy(0), policy(1), args, collator, train_dataset=data, eval_dataset=data, processing_class=TOKENIZER
    )


def dpo_by_hand(pairs):
    """-log σ(β (Δ chosen - Δ rejected)) (Rafailov et al., arXiv 2305.18290, equation 7), sums in float64."""
    models = policy(0).eval(), policy(1).eval()
    losses = []
    for pair in pairs:
        ours, reference = (
            {side: math.fsum(logps(model, pair, side)) for side in ("chosen", "rejected")} for model in models
        )
        gap = (ours["chosen"] - reference["chosen"]) - (ours["rejected"] - reference["rejected"])
        losses.append(math.log1p(math.exp(-BETA * gap)))
    return math.fsum(losses) / len(losses)


@every_kind
def test_dpo_trainer(kind, tmp_path):
    trainer = dpo(ROWS[kind], tmp_path, **KEPT)
    trainer.train()
    (logged,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    expected = dpo_by_hand([encode_pair(TOKENIZER, row) for row in ROWS[kind]])
    assert [logged, trainer.evaluate()["eval_loss"]] == pytest.approx([expected] * 2, rel=1e-5)
    assert abs(expected - math.log(2)) > 1e-4


def test_dpo_trainer_that_keeps_only_its_own_ids(tmp_path):
    with pytest.raises(FormatError, match="no chosen_mask and rejected_mask.*set remove_unused_columns=False"):
        dpo(CHATS, tmp_path).evaluate()
    every = [encode_pair(TOKENIZER, row, train_on="all") for row in CHATS]
    trainer = dpo(CHATS, tmp_path, DataCollatorForPreferencePairs(TOKENIZER, train_on="all"))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dpo_by_hand(every), rel=1e-5)


def test_dpo_trainer_of_reference_sums_made_before(tmp_path):
    trainer = dpo(CHATS, tmp_path, precompute_ref_log_probs=True, **KEPT)
    trainer.train()
    (logged,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(dpo_by_hand([encode_pair(TOKENIZER, row) for row in CHATS]), rel=1e-5)


# -- reward models ---------------------------------------------------------------------------------------------------------


def reward_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_labels=1, pad_token_id=TOKENIZER.pad_token_id, **sizes)
    return LlamaForSequenceClassification(config).eval()


def reward(rows, folder, **changed):
    settings = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": len(rows)}
    args = RewardConfig(**options(folder, **{**settings, "per_device_eval_batch_size": len(rows), **changed}))
    data = Dataset.from_list(rows)
    return RewardTrainer(
        reward_model(), args, COLLATOR, train_dataset=data, eval_dataset=data, processing_class=TOKENIZER
    )


def reward_by_hand(rows):
    """-log σ(score of chosen - score of rejected - margin); the score is that of the last token, one text at a time."""
    model, losses = reward_model(), []
    for row in rows:
        pair, scores = encode_pair(TOKENIZER, row), []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            with torch.no_grad():
                scores.append(float(model.score(model.model(ids).last_hidden_state[0, -1]).double()))
        losses.append(math.log1p(math.exp(scores[1] - scores[0] + row.get("margin", 0.0))))
    return math.fsum(losses) / len(losses)


@every_kind
@pytest.mark.parametrize("margin", [False, True])
def test_reward_trainer(kind, margin, tmp_path):
    rows = [{**row, "margin": i / 4} if margin else row for i, row in enumerate(ROWS[kind])]
    trainer = reward(rows, tmp_path, **KEPT)
    trainer.train()
    (logged,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [logged, trainer.evaluate()["eval_loss"]] == pytest.approx([reward_by_hand(rows)] * 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["chats", "chats with ids"])
def test_reward_trainer_that_takes_the_prompt_away(kind, tmp_path):
    with pytest.raises(FormatError, match="remove_unused_columns=False"):
        reward(ROWS[kind], tmp_path).evaluate()
