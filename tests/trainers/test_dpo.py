"""PerplexityDPOTrainer: the parent's loss to the letter, figures that a plain loop confirms, and cures that cure."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from trl import DPOTrainer

from hf_objectives import demo
from hf_objectives.errors import ConfigError, FormatError
from hf_objectives.labels.pairs import encode_pair
from tests.support.dpo_worlds import BATCH, PAIRS, TOKENIZER, load, logps, ours

# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 8])
def test_evaluation_is_what_a_plain_loop_counts(size, folders, tmp_path):
    policy, reference = load(folders[0]), load(folders[1])
    nats = {name: {"chosen": [], "rejected": []} for name in ("policy", "reference")}
    for row in PAIRS:
        pair = encode_pair(TOKENIZER, row)
        for name, model in (("policy", policy), ("reference", reference)):
            for side in nats[name]:
                nats[name][side].append(logps(model, pair, side))
    run = ours(
        policy,
        tmp_path,
        tests=Dataset.from_list(PAIRS),
        trainer={"ref_model": reference},
        per_device_eval_batch_size=size,
    )
    metrics = run.evaluate()
    for name, of in nats.items():
        for side, rows in of.items():
            key = f"eval_{'reference_' if name == 'reference' else ''}{side}_perplexity"
            tokens = [value for row in rows for value in row]
            assert metrics[key] == pytest.approx(math.exp(-sum(tokens) / len(tokens)), rel=1e-5), key
            assert metrics[f"eval_num_{side}_tokens"] == len(tokens)
    reward = {
        side: [0.1 * (sum(a) - sum(b)) for a, b in zip(nats["policy"][side], nats["reference"][side], strict=True)]
        for side in ("chosen", "rejected")
    }
    wins = [a > b for a, b in zip(reward["chosen"], reward["rejected"], strict=True)]
    assert metrics["eval_rewards/accuracies"] == pytest.approx(sum(wins) / len(wins)) and 0 < sum(wins) < len(wins)
    assert metrics["eval_rewards/accuracies_low"] < sum(wins) / len(wins) < metrics["eval_rewards/accuracies_high"]
    for side, values in reward.items():
        assert metrics[f"eval_rewards/{side}"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    margins = [a - b for a, b in zip(*reward.values(), strict=True)]
    assert metrics["eval_rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert metrics["eval_num_pairs"] == len(PAIRS)
    logged = run.state.log_history[-1]  # what was logged is what was returned, the parent's means nowhere
    assert {key: logged[key] for key in metrics if key in logged} == {
        key: metrics[key] for key in metrics if key in logged
    }
    assert logged["eval_rewards/accuracies"] == metrics["eval_rewards/accuracies"]


PEFT = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "changed"),
    [({}, {}), (PEFT, {}), ({}, {"precompute_ref_log_probs": True}), (PEFT, {"gradient_checkpointing": True})],
)
def test_at_step_0_every_reward_is_0(trainer, changed, folders, tmp_path):
    run = ours(folders[0], tmp_path, tests=Dataset.from_list(PAIRS), trainer=trainer, **changed)
    before = run.evaluate()
    names = [f"eval_rewards/{name}" for name in ("chosen", "rejected", "margins")]
    names += [f"eval_logps_change/{side}" for side in ("chosen", "rejected")]
    if not changed.get(
        "precompute_ref_log_probs"
    ):  # sums that were kept were of other batches, and are rounded alike only
        assert {before[name] for name in names} == {0.0}
        assert before["eval_chosen_perplexity"] == before["eval_reference_chosen_perplexity"]
    assert all(abs(before[name]) < 1e-6 for name in names)
    run.train()
    first, second = [log for log in run.state.log_history if "loss" in log]
    assert abs(first["rewards/margins"]) < 1e-6 and abs(first["logps_change/chosen"]) < 1e-6
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and second["logps_change/chosen"] != 0
    after = run.evaluate()
    assert after["eval_reference_chosen_perplexity"] == pytest.approx(before["eval_chosen_perplexity"], rel=1e-6)
    change = math.log(before["eval_chosen_perplexity"] / after["eval_chosen_perplexity"])
    assert after["eval_logps_change/chosen"] == pytest.approx(change, abs=1e-6) and change != 0


@pytest.mark.slow
def test_training_logs_the_change_over_all_steps_since_the_last_log(folders, tmp_path):
    run = ours(
        folders[0], tmp_path, max_steps=4, logging_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    seen = []
    inner = run.pair_metrics.add

    def record(sums):
        seen.append(sums.tolist())
        inner(sums)

    run.pair_metrics.add = record
    run.train()
    assert len(seen) == 8
    chosen, tokens = sum(sums[0] for sums in seen), sum(sums[2] for sums in seen)
    (log,) = [log for log in run.state.log_history if "loss" in log]
    assert log["logps_change/chosen"] == pytest.approx(chosen / tokens)


def test_several_evaluation_sets(folders, tmp_path):
    halves = {"first": Dataset.from_list(PAIRS[:3]), "second": Dataset.from_list(PAIRS[3:])}
    metrics = ours(folders[0], tmp_path, tests=halves).evaluate()
    assert (metrics["eval_first_num_pairs"], metrics["eval_second_num_pairs"]) == (3, 5)
    assert metrics["eval_first_chosen_perplexity"] != metrics["eval_second_chosen_perplexity"]


@pytest.mark.slow
def test_streams_train_and_are_evaluated(folders, tmp_path):
    stream = Dataset.from_list(PAIRS).to_iterable_dataset()
    run = ours(folders[0], tmp_path, rows=stream, tests=stream)
    run.train()
    metrics = run.evaluate()
    whole = ours(
        run.model, tmp_path, tests=Dataset.from_list(PAIRS), trainer={"ref_model": load(folders[0])}
    ).evaluate()
    assert metrics["eval_num_pairs"] == len(PAIRS)
    assert metrics["eval_chosen_perplexity"] == pytest.approx(whole["eval_chosen_perplexity"], rel=1e-6)


@pytest.mark.slow
def test_another_reference_is_told_from_the_start(folders, tmp_path):
    """The change is measured against an evaluation before the first step, which a resumed run finds in the log."""
    named = {"trainer": {"ref_model": load(folders[1])}, "tests": Dataset.from_list(PAIRS), "eval_strategy": "steps"}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    run = ours(load(folders[0]), tmp_path, **named, **saving)
    run.train()
    evaluations = [log for log in run.state.log_history if "eval_chosen_perplexity" in log]
    assert [log["step"] for log in evaluations] == [0, 1, 2] and evaluations[0]["eval_logps_change/chosen"] == 0
    assert not any("logps_change/chosen" in log for log in run.state.log_history if "loss" in log)
    start, last = (evaluations[i]["eval_chosen_perplexity"] for i in (0, 2))
    assert evaluations[2]["eval_logps_change/chosen"] == pytest.approx(math.log(start / last), abs=1e-9)
    again = ours(load(folders[0]), tmp_path, **named, **saving)
    again.train(resume_from_checkpoint=str(Path(tmp_path) / "checkpoint-1"))
    resumed = [log for log in again.state.log_history if "eval_chosen_perplexity" in log]
    assert [log["step"] for log in resumed] == [0, 1, 2]
    assert resumed[2]["eval_logps_change/chosen"] == pytest.approx(evaluations[2]["eval_logps_change/chosen"], abs=1e-6)


@pytest.mark.slow
def test_the_same_reference_is_seen_to_be_the_same(folders, tmp_path):
    for reference, same in ((load(folders[0]), True), (load(folders[1]), False)):
        run = ours(load(folders[0]), tmp_path, trainer={"ref_model": reference})
        assert run.reference_is_start is same
    assert not ours(folders[0], tmp_path, sync_ref_model=True, ref_model_sync_steps=1).reference_is_start
    other = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=False)
    assert not ours(folders[0], tmp_path, trainer={"peft_config": other}).reference_is_start


@pytest.mark.slow
def test_reference_sums_are_kept_apart_by_what_is_summed(folders, tmp_path):
    """TRL's cache knows model and rows; another mask or another weight of the tails gives other sums."""
    rows = Dataset.from_list(PAIRS)
    rows.save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")  # with files, so that the cache is on disk
    sums = []
    for changed in ({}, {"ld_alpha": 0.0}, {}):
        run = ours(folders[0], tmp_path, rows=rows, precompute_ref_log_probs=True, **changed)
        sums.append(list(run.train_dataset["ref_rejected_logps"]))
    assert sums[0] == sums[2] != sums[1]
    model = load(folders[0])
    for row, value in zip(PAIRS, sums[0], strict=True):
        assert value == pytest.approx(sum(logps(model, encode_pair(TOKENIZER, row), "rejected")), rel=1e-5)


# -- what goes in ------------------------------------------------------------------------------------------------------


def test_rows_are_encoded_by_encode_pair_and_numbered(folders, tmp_path):
    run = ours(folders[0], tmp_path, max_length=48)
    for i, row in enumerate(run.train_dataset):
        expected = encode_pair(TOKENIZER, PAIRS[i], max_length=48)
        assert {name: row[name] for name in expected} == expected and row["row"] == i
    batch = next(iter(run.get_train_dataloader()))
    assert batch["row_ids"].shape == (4,)
    assert list(run.prepare_dataset(run.train_dataset, TOKENIZER, run.args, "again")) == list(run.train_dataset)


def test_rows_with_ids_keep_them(folders, tmp_path):
    rows = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 8 + i], "rejected_ids": [9]} for i in range(3)])
    run = ours(folders[0], tmp_path, tests=rows)
    assert [row["row"] for row in run.eval_dataset] == [0, 1, 2]
    assert run.evaluate()["eval_num_chosen_tokens"] == 6


@pytest.mark.slow
def test_a_bad_row_is_named_with_its_dataset(folders, tmp_path):
    bad = [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}]
    with pytest.raises(FormatError, match="source 'train', row 8: chosen and rejected are equal"):
        ours(folders[0], tmp_path, rows=Dataset.from_list(bad))
    with pytest.raises(FormatError, match="source 'held', row 8"):
        ours(folders[0], tmp_path, tests={"held": Dataset.from_list(bad)})
    with pytest.raises(ConfigError, match="'eval' has no rows"):
        ours(folders[0], tmp_path, tests=Dataset.from_list([]))


def test_a_bound_without_datasets_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="eval_lm_datasets"):
        ours(folders[0], tmp_path, max_perplexity_increase=0.1)


def test_a_model_that_says_nothing_of_its_log_probabilities_is_an_error(folders, tmp_path, monkeypatch):
    run = ours(folders[0], tmp_path)
    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda *args, **kwargs: torch.tensor(0.0))
    with pytest.raises(
        ConfigError, match="DPOTrainer ran forward passes of no model for a loss; expected policy, reference"
    ):
        run.compute_loss(run.model, dict(BATCH))


@pytest.mark.slow
def test_checkpoints_hold_json_logs(folders, tmp_path):
    run = ours(folders[0], tmp_path, tests=Dataset.from_list(PAIRS), save_strategy="steps", save_steps=2)
    run.train()
    run.evaluate()
    run.state.save_to_json(str(tmp_path / "state.json"))
    assert "eval_chosen_perplexity" in json.loads((tmp_path / "state.json").read_text())["log_history"][-1]


def test_encoded_sets_that_were_numbered_apart_count_every_pair(tmp_path):
    model = demo.build_model(TOKENIZER, hidden_size=16, num_layers=1)
    one = Dataset.from_list([{**encode_pair(TOKENIZER, row), "row": i} for i, row in enumerate(PAIRS)])
    run = ours(model, tmp_path, tests=concatenate_datasets([one, one]), trainer={"ref_model": copy.deepcopy(model)})
    assert run.evaluate()["eval_num_pairs"] == 2 * len(PAIRS)
