"""Pairs of a recipe: what cannot be used, and what is counted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from hf_objectives import demo
from hf_objectives.errors import FormatError
from hf_objectives.labels import Account
from hf_objectives.recipes.dpo import Dpo, DpoData
from hf_objectives.recipes.reward import Reward, RewardData
from tests.support.recipes import sharegpt, write_rows

TOKENIZER = demo.build_tokenizer()
ARGS = SimpleNamespace(
    seed=0, max_length=128, train_on="assistant", control_tokens="plain", device=SimpleNamespace(type="cpu")
)


@pytest.mark.parametrize(("recipe", "data_class"), [(Dpo, DpoData), (Reward, RewardData)])
def test_a_pair_that_cannot_be_used_is_left_out_and_counted_on_request(tmp_path, recipe, data_class):
    pairs = [sharegpt(row) for row in demo.preferences(20)]
    path = str(tmp_path / "pairs.jsonl")
    write_rows(tmp_path / "pairs.jsonl", pairs)
    good = recipe(None, data_class(dataset_name=path, eval_share=0.0), ARGS, {})
    good.load_rows(TOKENIZER)
    spoilt = good.train_rows["row"][3]
    pairs[spoilt]["rejected"] = pairs[spoilt]["chosen"]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(FormatError, match=rf"chosen and rejected are equal.*pairs\.jsonl, line {spoilt + 1}"):
        recipe(None, data_class(dataset_name=path, eval_share=0.0), ARGS, {}).load_rows(TOKENIZER)
    left = recipe(None, data_class(dataset_name=path, eval_share=0.0, on_error="skip"), ARGS, {})
    left.load_rows(TOKENIZER)
    account = left.results["ledger"]["pairs.jsonl"]
    assert account["rows_in"] - 1 == account["rows_out"] == left.num_rows == len(left.train_rows)
    assert account["dropped_examples"] == {"FormatError, skipped": [spoilt]} and spoilt not in left.train_rows["row"]
    answers = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    sides = [answers[row][side]["value"] for row in left.train_rows["row"] for side in ("chosen", "rejected")]
    # Of each answer its text and one stop token are trained.
    assert account["trained"] == sum(len(TOKENIZER(side)["input_ids"]) + 1 for side in sides)
    assert account["tokens_in"] == account["trained"] + account["masked"]


def test_a_pair_held_out_that_cannot_be_used_is_told(tmp_path, caplog):
    pairs = [{**sharegpt(row), "rejected": row["chosen"][0]["content"]} for row in demo.preferences(3)]
    rows = [{**pair, "source": "pairs", "row": i} for i, pair in enumerate([sharegpt(demo.preferences(1)[0]), *pairs])]
    recipe = Dpo(None, DpoData(dataset_name="pairs.jsonl", on_error="skip"), ARGS, {})
    assert recipe.encode(rows, TOKENIZER)["row"][:] == [0]
    assert "pairs.jsonl, held out: 3 rows left out (FormatError, skipped; rows 1, 2, 3)" in caplog.text


def test_no_pair_that_can_be_used():
    """Where all rows are left out, the error says so: it is not that of a single row under `on_error="raise"`."""
    rows = [{"chosen": "a", "source": "pairs", "row": i} for i in range(3)]
    recipe = Dpo(None, DpoData(dataset_name="pairs.jsonl", on_error="skip"), ARGS, {})
    with pytest.raises(
        FormatError, match="row 2: none of 3 rows can be used, held out; of the last one: rejected is missing"
    ):
        recipe.encode(rows, TOKENIZER)
    with pytest.raises(FormatError, match="none of 3 rows can be used; of the last one"):
        recipe.encode(rows, TOKENIZER, Account())


def test_pairs_whose_first_prompts_are_empty_and_pairs_of_another_kind(tmp_path):
    rows = [{"prompt": "" if i < 2_000 else "Go.", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(2_002)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    dpo = Dpo(None, DpoData(dataset_name=str(tmp_path / "pairs.jsonl"), eval_share=0.0), ARGS, {})
    dpo.load_rows(TOKENIZER)
    assert len(dpo.train_rows) == 2_002 and dpo.train_rows["row"][:] == list(range(2_002))
    assert dpo.encode([], TOKENIZER).num_rows == 0
    write_rows(tmp_path / "pairs.jsonl", [rows[0], {**rows[1], "margin": 1.0}, rows[2]])
    data = {"dataset_name": str(tmp_path / "pairs.jsonl"), "eval_share": 0.0}
    with pytest.raises(FormatError, match=r"margin among pairs that give .*pairs\.jsonl, line 2\)"):
        Reward(None, RewardData(**data), ARGS, {}).load_rows(TOKENIZER)
    left = Reward(None, RewardData(**data, on_error="skip"), ARGS, {})
    left.load_rows(TOKENIZER)
    assert left.train_rows["row"][:] == [0, 2]
