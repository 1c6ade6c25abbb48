"""A finding in words and as JSON."""

from __future__ import annotations

from hf_objectives.inspection.findings import Finding


def test_a_finding_says_its_steps():
    assert Finding("x", 5, "info", "", "").steps == "step 5"
    assert Finding("x", 5, "info", "", "", 1200).steps == "steps 5 to 1,200"
    assert Finding("x", 5, "info", "a", "b", 6, "r").to_dict() == {
        **{"kind": "x", "step": 5, "severity": "info", "evidence": "a", "advice": "b", "last_step": 6, "run": "r"}
    }
