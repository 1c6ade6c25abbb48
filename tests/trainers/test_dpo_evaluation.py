"""What a DPO evaluation says does not depend on its batches: plain loops in float64 over all pairs give the same."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import log_softmax
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_objectives import PerplexityDPOTrainer
from hf_objectives.collators import DataCollatorForPreferencePairs
from hf_objectives.labels.pairs import encode_pair
from tests.support.dpo_worlds import PAIRS, TOKENIZER, build, load, logps, ours
from tests.support.language_models import mixtral
from tests.trainers.test_dpo_parent import LOSSES

SETS = Dataset.from_list(PAIRS)
WHOLE = DataCollatorForPreferencePairs(TOKENIZER)(PAIRS)
FIGURES = [f"{kind}/{side}" for kind in ("logps", "logits", "rewards") for side in ("chosen", "rejected")]
FIGURES = ["loss", "entropy", "mean_token_accuracy", "rewards/margins", "rewards/accuracies", *FIGURES]


def by_loops(folders):
    """Every figure by plain loops over the pairs, in float64."""
    policy, reference = load(folders[0]), load(folders[1])
    sums = dict.fromkeys(FIGURES, 0.0)
    tokens = dict.fromkeys(("chosen", "rejected"), 0)
    for row in PAIRS:
        pair, rewards = encode_pair(TOKENIZER, row), {}
        for side in tokens:
            own, theirs = (logps(model, pair, side) for model in (policy, reference))
            rewards[side] = 0.1 * (sum(own) - sum(theirs))
            sums[f"rewards/{side}"] += rewards[side] / len(PAIRS)
            sums[f"logps/{side}"] += sum(own) / len(PAIRS)
            tokens[side] += len(own)
            ids, mask = pair["prompt_ids"] + pair[f"{side}_ids"], pair[f"{side}_mask"]
            with torch.no_grad():
                logits = policy(torch.tensor([ids])).logits[0].double()
            for at in range(len(pair["prompt_ids"]), len(ids)):
                if mask[at - len(pair["prompt_ids"])]:
                    table = log_softmax(logits[at - 1], dim=-1)
                    sums["entropy"] -= float((table.exp() * table).sum())
                    sums[f"logits/{side}"] += float(logits[at - 1].mean())
                    sums["mean_token_accuracy"] += side == "chosen" and int(table.argmax()) == ids[at]
        margin = rewards["chosen"] - rewards["rejected"]
        sums["rewards/margins"] += margin / len(PAIRS)
        sums["rewards/accuracies"] += (margin > 0) / len(PAIRS)
        sums["loss"] += math.log1p(math.exp(-margin)) / len(PAIRS)
    divisors = {"entropy": sum(tokens.values()), "mean_token_accuracy": tokens["chosen"]}
    divisors |= {f"logits/{side}": count for side, count in tokens.items()}
    return {f"eval_{name}": value / divisors.get(name, 1) for name, value in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_figure_is_what_plain_loops_count(size, padding_free, folders, tmp_path):
    expected = by_loops(folders)
    named = {"trainer": {"ref_model": load(folders[1])}, "per_device_eval_batch_size": size}
    run = ours(load(folders[0]), tmp_path, tests=SETS, padding_free=padding_free, **named)
    metrics, logged = run.evaluate(), run.state.log_history[-1]
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-6, abs=2e-6), name
        assert logged[name] == metrics[name], name


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_trls_of_one_batch_with_every_pair(name, folders, tmp_path):
    named = {"trainer": {"ref_model": load(folders[1])}, **LOSSES[name]}
    parent = build(DPOTrainer, load(folders[0]), tmp_path, **named)
    parent.model.eval()
    with torch.no_grad():
        expected = parent.compute_loss(parent.model, dict(WHOLE)).item()
    own = [
        ours(load(folders[0]), tmp_path, tests=SETS, per_device_eval_batch_size=size, **named).evaluate()["eval_loss"]
        for size in (1, 3)
    ]
    # DiscoPOP divides margins by 0.05, and forward KL takes exp of log ratios: TRL's float32 sums are rounded by 1e-5.
    share = 1e-4 if name in ("discopop", "forward_kl") else 2e-6
    assert own == pytest.approx([expected] * len(own), rel=share)
    assert max(own) - min(own) <= 1e-6 * max(1, *own)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"nll_weight": 0.3, "dpop_lambda": 5.0}, {"precompute_ref_log_probs": True}, {"ld_alpha": 0.5}]
)
def test_the_loss_with_cures_and_with_sums_made_before(changed, folders, tmp_path):
    found, whole = [], None
    for size in (1, 3, 8):
        named = {"trainer": {"ref_model": load(folders[1])}, "per_device_eval_batch_size": size}
        run = ours(load(folders[0]), tmp_path / str(size), tests=SETS, **named, **changed)
        if size == 8:
            (batch,) = run.get_eval_dataloader()
            run.model.eval()
            with torch.no_grad():
                whole = run.compute_loss(run.model, batch).item()
        found.append(run.evaluate()["eval_loss"])
    assert found == pytest.approx([whole] * 3, abs=1e-6)
    assert whole != pytest.approx(by_loops(folders)["eval_loss"], abs=1e-4) or "precompute_ref_log_probs" in changed


@pytest.mark.slow
def test_the_best_model_is_that_of_the_exact_loss(folders, tmp_path):
    named = {"trainer": {"ref_model": load(folders[1])}, "tests": SETS, "per_device_eval_batch_size": 3}
    saving = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    run = ours(load(folders[0]), tmp_path, load_best_model_at_end=True, max_steps=3, **saving, **named)
    run.train()
    losses = {log["step"]: log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    assert run.state.best_metric == min(losses[step] for step in (1, 2, 3))
    again = ours(run.model, tmp_path / "again", **{**named, "per_device_eval_batch_size": 8}).evaluate()
    assert again["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)


def test_pairs_without_numbers_count_once(folders, tmp_path):
    """A collator of TRL drops row numbers."""
    rows = [{"prompt": f"{i} and {i} is", "chosen": f" {2 * i}", "rejected": f" {i}{i}."} for i in range(1, 6)]
    found = []
    for size in (1, 3):
        collator = DataCollatorForPreference(TOKENIZER.pad_token_id)
        named = {"trainer": {"data_collator": collator, "ref_model": load(folders[1])}}
        run = ours(load(folders[0]), tmp_path, tests=Dataset.from_list(rows), per_device_eval_batch_size=size, **named)
        found.append(run.evaluate())
    assert found[0]["eval_num_pairs"] == found[1]["eval_num_pairs"] == 5
    for name in FIGURES:
        assert found[0][f"eval_{name}"] == pytest.approx(found[1][f"eval_{name}"], abs=1e-6), name


class _OtherLoss(PerplexityDPOTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch) + 7


class _OtherBatchLoss(PerplexityDPOTrainer):
    def _compute_loss(self, model, inputs, return_outputs):
        return super()._compute_loss(model, inputs, return_outputs) + 7


@pytest.mark.parametrize("kind", [_OtherLoss, _OtherBatchLoss])
def test_a_loss_of_a_subclass_stays(kind, folders, tmp_path):
    run = build(kind, load(folders[0]), tmp_path, tests=SETS, trainer={"ref_model": load(folders[0])})
    assert run.evaluate()["eval_loss"] == pytest.approx(7 + math.log(2), abs=1e-5)


def test_the_loss_of_experts_has_no_auxiliary_term(tmp_path):
    rows = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 4)
    model, reference = mixtral(), mixtral()
    for made in (model, reference):
        made.resize_token_embeddings(len(TOKENIZER), mean_resizing=False)
    reference.load_state_dict(model.state_dict())
    experts = {"trainer": {"ref_model": reference}, "rows": rows, "tests": rows}
    run = ours(model, tmp_path, router_aux_loss_coef=0.5, **experts)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics["eval_aux_loss"] > 0
