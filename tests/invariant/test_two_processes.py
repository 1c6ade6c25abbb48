"""Two processes give the numbers, the gradient and the stop of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.chat_corpus import byte_tokenizer
from tests.trainers.test_causal_lm import by_autograd, chats, trainer

TOKENIZER = byte_tokenizer()


def run_on_two(act: str, folder: Path) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("two_processes.py")), act, str(folder)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:6000]
    return [json.loads((folder / f"outcome_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
def test_evaluation(tmp_path):
    expected = trainer(tmp_path / "one", per_device_eval_batch_size=1).evaluate()
    for outcome in run_on_two("evaluate", tmp_path):
        assert len(outcome) == 4
        for metrics in outcome.values():
            assert metrics["eval_num_tokens"] == expected["eval_num_tokens"]
            for key in ("eval_loss", "eval_even_loss", "eval_odd_loss", "eval_stop_probability"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-6)


@pytest.mark.distributed
def test_gradient(tmp_path):
    run_on_two("gradient", tmp_path)
    expected = by_autograd()
    scale = max(float(g.abs().max()) for g in expected.values())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"gradient_{rank}.pt")
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value, atol=1e-5 * scale), name


@pytest.mark.distributed
def test_fsdp2_trains_saves_and_resumes_like_ddp(tmp_path):
    outcome = run_on_two("sharded", tmp_path)[0]
    for tied in ("untied", "tied"):
        whole, resumed = outcome[f"arguments {tied}"]["losses"]
        evaluated = outcome[f"arguments {tied}"]["evaluations"][0]
        assert whole == resumed and len(whole) == 4 and whole[3] < whole[0]
        found = outcome[f"on_shards {tied}"]
        for losses in found["losses"]:
            assert losses == pytest.approx(whole, rel=1e-5)
        assert found["evaluations"] == pytest.approx([evaluated] * 2, rel=1e-6)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"on_shards {tied}" / "final")
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (tied == "tied")
        assert trainer(tmp_path, model=model).evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("act", ["not_finite", "not_finite_sharded"])
def test_a_bad_row_on_one_rank_stops_both(tmp_path, act):
    outcomes = run_on_two(act, tmp_path)
    assert all("stopped before the weights changed" in outcome["stopped"] for outcome in outcomes)
    assert outcomes[0]["step"] == outcomes[1]["step"] and all(outcome["same"] for outcome in outcomes)
    assert sum("row 5" in outcome["stopped"] and "Zap" in outcome["stopped"] for outcome in outcomes) == 1
    reports = sorted(tmp_path.glob("non_finite_step_*_rank_*.json"))
    assert len(reports) == 2
    assert len(chats()) == 23
