"""Two processes evaluate preference pairs as one does, though the last batch of one repeats rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hf_objectives import demo
from tests.support.dpo_worlds import PAIRS, TOKENIZER, load, ours


@pytest.mark.distributed
def test_evaluation_and_training_logs(tmp_path):
    for seed, name in enumerate(("model", "other")):
        demo.build_model(TOKENIZER, hidden_size=32, num_layers=2, seed=seed).save_pretrained(tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("dpo_acts.py")), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"outcome_{rank}.json").read_text()) for rank in (0, 1))
    rows = Dataset.from_list(PAIRS[:7])
    one = ours(load(tmp_path / "model"), tmp_path / "one", tests=rows, trainer={"ref_model": load(tmp_path / "other")})
    expected = one.evaluate()
    assert expected["eval_num_pairs"] == 7
    counted = [key for key in expected if "perplexity" in key or "rewards/" in key or key.startswith("eval_num_pairs")]
    assert len(counted) == 11
    for outcome in (first, second):
        for source in ("rows", "stream"):
            for key in counted:
                assert outcome[source][key] == pytest.approx(expected[key], rel=1e-6, abs=1e-7), (source, key)
    # Two ranks of two rows see the eight rows that one process of four sees, in the same steps.
    run = ours(str(tmp_path / "model"), tmp_path / "run", max_steps=2, per_device_train_batch_size=4)
    run.train()
    for log, both in zip([log for log in run.state.log_history if "loss" in log], first["logs"], strict=True):
        for side in ("chosen", "rejected"):
            assert both[f"logps_change/{side}"] == pytest.approx(log[f"logps_change/{side}"], rel=1e-4, abs=1e-7)
    assert first["logs"][1]["logps_change/chosen"] == second["logs"][1]["logps_change/chosen"] != 0
