"""The figures of a report, before a browser has them."""

from __future__ import annotations

import json
import re

import numpy as np

from hf_objectives.diagnostics.curves import Curves, Series
from hf_objectives.diagnostics.report_curves import bokeh_script, figures_of, rows_of
from hf_objectives.inspection import script_hash, script_json
from hf_objectives.inspection.findings import Finding


def curves(loss: list[float]) -> Curves:
    return Curves("base", {"loss": Series(np.arange(1, len(loss) + 1), np.array(loss))})


def test_rows_tell_extremes_and_leave_out_what_is_not_finite() -> None:
    row = rows_of([curves([4.0, float("nan"), 9.0, 1.5, 2.0, float("inf")])])[0]
    assert (row.points, row.first, row.last) == (6, 4.0, 2.0)
    assert (row.least, row.least_at, row.most, row.most_at) == (1.5, 4, 9.0, 3)


def test_findings_are_bands_and_lines_in_every_figure() -> None:
    found = [Finding("plateau", 3, "warning", "e", "a", 7), Finding("spike_recovered", 9, "info", "e", "a")]
    text = json.dumps(figures_of([curves([3.0 - 0.1 * i for i in range(12)])], found))
    figures = text.count('"name": "Figure"')
    assert figures == 4  # loss and perplexity, linear and logarithmic
    assert text.count('"name": "BoxAnnotation"') >= figures and text.count('"name": "Span"') >= 2 * figures
    assert '"text": "plateau"' in text


def test_a_run_that_is_nan_throughout_is_drawn_empty() -> None:
    assert '"text": "Loss"' in json.dumps(figures_of([curves([float("nan")] * 5)], []))
    assert rows_of([curves([float("nan")] * 5)]) == []


def test_a_constant_a_negative_and_a_huge_curve_are_drawn() -> None:
    for loss in ([2.0] * 5, [-1.0, -2.0, -3.0], [0.0, 0.0], [1.0, 705.0, 1e306], [1e-306, 1e306], [-1e308, 1e308]):
        assert '"root_id"' in json.dumps(figures_of([curves(loss)], []))


def test_json_does_not_end_its_element() -> None:
    text = script_json({"name": "</script><!-- & -->"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"name": "</script><!-- & -->"}


def test_only_the_core_of_bokeh_is_in_the_page() -> None:
    assert 1e6 < len(bokeh_script()) < 1.6e6


def texts(item: object) -> set[str]:
    """What stands in legends, as bokeh has it."""
    return set(re.findall(r'"label": \{"type": "value", "value": "([^"]*)"', json.dumps(item, ensure_ascii=False)))


def test_names_that_shorten_alike_have_a_legend_entry_each() -> None:
    runs = []
    for rate in ("1e-4", "1e-5"):
        run = curves([3.0 - 0.1 * i for i in range(12)])
        run.name = f"SmolLM2-135M-Instruct-sft-lora-r16-lr{rate}"
        run.series["eval_loss"] = run.series["loss"]
        runs.append(run)
    assert texts(figures_of(runs, [])) == {
        f"SmolLM2-135M-Inst…t-lora-r16-lr{rate}{end}" for rate in ("1e-4", "1e-5") for end in ("", ", validation")
    }


def test_dollars_and_brackets_in_names_are_no_mathematics() -> None:
    runs = [curves([3.0, 2.0, 1.0]), curves([3.0, 2.0, 1.0])]
    runs[0].name, runs[1].name = "$$x^2$$", r"\(x\) \[y\]"
    for run in runs:
        run.series["eval_$$$_perplexity"] = run.series["loss"]
    text = json.dumps(figures_of(runs, []), ensure_ascii=False).replace("\\\\", "\\")
    assert not re.search(r"\$\$|\\[()\[\]]", text)
    assert "$\u200b$x^2$\u200b$" in text and "Perplexity, $\u200b$\u200b$" in text


def test_a_finding_is_named_where_it_is_seen() -> None:
    run = curves([3.0 - 0.1 * i for i in range(12)])
    for key in ("grad_norm", "reward", "kl"):
        run.series[key] = run.series["loss"]
    found = [Finding("gradient_explosion", 5, "error", "e", "a"), Finding("reward_hacking", 5, "error", "e", "a")]
    item = figures_of([run], found)
    named: dict[str, list[str]] = {}
    for figure in item["doc"]["roots"][0]["attributes"]["children"]:
        attributes = figure["attributes"]
        labels = [part for part in attributes["center"] if part.get("name") == "Label"]
        named.setdefault(attributes["tags"][1], []).extend(part["attributes"]["text"] for part in labels)
    assert {panel: set(kinds) for panel, kinds in named.items()} == {
        "loss": set(),
        "grad_norm": {"gradient_explosion"},
        "reward": {"reward_hacking"},
        "kl": {"reward_hacking"},
    }


def test_the_hash_of_a_script_is_that_of_its_lines_as_a_browser_reads_them() -> None:
    # printf 'a\nb' | openssl dgst -sha256 -binary | base64
    assert script_hash("a\r\nb") == script_hash("a\nb") == "'sha256-fhj3NzEbLcOy8mndeDlrA1HxT7Zu+oefdoyyMYGIPHg='"
