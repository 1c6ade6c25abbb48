"""What is reported of one or several runs, and what is left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_objectives.diagnostics.detect import ADVICE, RULES, diagnose
from hf_objectives.errors import FileFormatError
from tests.support.curves_by_hand import N, T, healthy_loss, kinds, log, noisy


def test_a_healthy_run_has_no_finding():
    rate = 1e-3 * np.minimum((T + 1) / 20, 1 - T / N)
    norm = np.exp(0.2 * np.random.default_rng(1).standard_normal(N))
    falls = np.linspace(3, 2.5, 10)
    assert (
        diagnose(
            log(learning_rate=rate, grad_norm=norm, eval_loss=falls, num_supervised_tokens=T * 5, num_tokens_seen=T * 9)
        )
        == []
    )


def test_what_a_broken_run_does_afterwards_is_no_finding_of_its_own():
    loss = healthy_loss()
    loss[60:] = noisy(np.full(240, 7.0))
    assert list(kinds(log(loss))) == ["spike_sustained"]


def test_several_runs_are_named(tmp_path):
    for name, leap in (("a", 0), ("b", 3)):
        loss = healthy_loss()
        loss[200:] += leap
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, log(loss))))
    assert [(one.run, one.kind) for one in diagnose(tmp_path)] == [("b", "spike_sustained")]


def test_short_logs_say_nothing_and_one_point_is_refused():
    assert diagnose([{"step": i, "loss": 1.0} for i in (1, 2, 3)]) == []
    with pytest.raises(FileFormatError, match="one point is no curve"):
        diagnose([{"step": 1, "loss": 1.0}])


def test_a_run_that_has_just_begun_does_not_hide_the_others(tmp_path, caplog):
    loss = healthy_loss()
    loss[200:] += 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, log(loss))))
    (tmp_path / "b.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    assert [(one.run, one.kind) for one in diagnose(tmp_path)] == [("a", "spike_sustained")]
    assert "b: one point is no curve" in caplog.text


def test_every_rule_is_documented_and_has_its_advice():
    assert all((case.__doc__ or "").strip() for cases in RULES.values() for case in cases)
    assert list(RULES) == list(ADVICE)
