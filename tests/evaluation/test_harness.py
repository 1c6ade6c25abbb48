"""Tasks of lm-evaluation-harness made of local files, on a live model."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from hf_objectives.errors import ConfigError
from hf_objectives.evaluation import check_tasks, evaluate_tasks
from tests.support.language_models import TOKENIZER, llama


@pytest.fixture
def tasks(tmp_path):
    """A task of two choices."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{i}+1=", "choices": [str(i), str(i + 1)], "gold": 1}) + "\n" for i in range(6))
    )
    (tmp_path / "sums.yaml").write_text(
        f"task: own_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}]\n"
    )
    return tmp_path


def test_without_the_extra_it_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"eval_tasks needs lm-eval .*pip install 'hf-objectives\[eval\]'"):
        check_tasks(["own_sums"])


def test_a_task_of_local_files(tasks):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'hf-objectives[eval]'")
    manager = check_tasks(["own_sums"], str(tasks))
    model = llama().train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = evaluate_tasks(model, TOKENIZER, ["own_sums"], manager)
    again = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(states[0], again[0]) and states[1:] == again[1:] and model.training
    right = 0
    model.eval()
    for i in range(6):
        scores = []
        for choice in (str(i), str(i + 1)):
            prompt = TOKENIZER(f"{i}+1=", add_special_tokens=False)["input_ids"]
            ids = [*prompt, *TOKENIZER(f" {choice}", add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logs[k - 1, ids[k]].item() for k in range(len(prompt), len(ids))))
        right += scores[1] > scores[0]
    assert found["own_sums_acc"] == right / 6
    assert evaluate_tasks(model, TOKENIZER, ["own_sums"], manager, limit=2)["own_sums_acc"] in (0, 0.5, 1)


def test_an_unknown_task_is_named(tasks):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'hf-objectives[eval]'")
    with pytest.raises(ConfigError, match="lm-eval has no task 'own_sum'; did you mean 'own_sums'"):
        check_tasks(["own_sum"], str(tasks))
