# ruff: noqa: E501 (rows and templates of one line)

"""Whatever a file holds: a result, or an error of the package."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_objectives import demo, diagnose
from hf_objectives.errors import HFObjectivesError
from hf_objectives.labels import Renderer, encode_row
from hf_objectives.mixture import MixtureConfig
from hf_objectives.preparation import load_rows
from hf_objectives.preparation.config import VERSION
from hf_objectives.preparation.manifest import MANIFEST, Manifest
from hf_objectives.trainers.checkpoints import MANIFEST as CHECKPOINT
from hf_objectives.trainers.checkpoints import fault_of, step_rows_of
from tests.support.chat_corpus import PLAIN

pytestmark = pytest.mark.slow
TOKENIZER = demo.build_tokenizer()


def few(count: int):
    """The same examples each time, and no clock: the machine may be busy."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=health)


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800") | st.just("\0")
)
NAMES = st.sampled_from(
    ("role content messages conversations from value prompt completion chosen rejected text instruction input output history "
     "system tools tool_calls function name arguments train weight reasoning_content input_ids labels source row type "
     "chat_template_kwargs images").split()
)  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "human", "gpt", "function_call", "Hi", "", "{}", "[", '{"name": "f"}']
)
JSON = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(st.dictionaries(NAMES, WORDS | JSON, min_size=1, max_size=4), max_size=3)
ROWS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("messages", "conversations", "prompt", "completion", "chosen", "rejected", "text", "instruction", "output", "history", "tools", "input_ids", "labels", "chat_template_kwargs", "system", "source", "row"), WORDS | TURNS | JSON)
)  # fmt: skip
PIECES = st.lists(
    st.sampled_from([
        "{{ messages }}", "{{ x }}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}", "{{ m.role * 99999999 }}",
        "{{ m.content | ", "trim }}", "tojson }}", "replace('', m) }}", "{% set x = x + x %}", "{% set x = [x, x] %}", "{{ 1 // 0 }}",
        "{% macro f(a) %}", "{% endmacro %}", "{{ f(f) }}", "{{ loop.cycle() }}", "{% set x %}", "{% endset %}", "{{ x.__class__ }}",
        "{{ '%d' % x }}", "{{ range(x) }}", "{{ -x ** 99 }}", "{# ", " #}", "{{ messages[x:] }}", "{% generation %}", "{% break %}",
        "{% set x = 'xx' * 999 %}", "{{ x | join(x) }}", "{% call f() %}", "{% endcall %}", "{{ caller() }}", "{{ x.format(x) }}",
    ]) | st.text(max_size=3),
    max_size=12,
).map("".join)  # fmt: skip


@few(250)
@given(ROWS | JSON)
def test_rows(row):
    with contextlib.suppress(HFObjectivesError):
        encoded = encode_row(TOKENIZER, row)
        assert len(encoded["input_ids"]) == len(encoded["labels"])


@few(150)
@given(PIECES)
def test_templates(template):
    with contextlib.suppress(HFObjectivesError):
        assert isinstance(Renderer(TOKENIZER, template, None, {})(PLAIN), str)


LINES = st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20), max_size=4).map(b"\n".join)


@few(60)
@given(
    LINES,
    st.sampled_from(["rows.jsonl", "rows.json", "rows.txt", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"]),
    st.booleans(),
)
def test_files_of_rows(tmp_path, content, name, compressed):
    file = tmp_path / name
    file.write_bytes(gzip.compress(content) if compressed and name.endswith(".gz") else content)
    with contextlib.suppress(HFObjectivesError):
        assert len(load_rows(str(file)))


NUMBERS = st.integers() | st.floats() | SCALARS | st.sampled_from([10**400, -1, 1e308, "1e999"])
LOGGED = st.dictionaries(
    st.sampled_from("step epoch loss grad_norm learning_rate eval_loss eval_perplexity train_runtime num_tokens x".split()),
    NUMBERS | JSON, max_size=5,
)  # fmt: skip


@few(60)
@given(st.lists(LOGGED, max_size=6), st.sampled_from(["lines", "state", "csv", "list"]), st.binary(max_size=8))
def test_logs(tmp_path, entries, form, noise):
    text = "\n".join(map(json.dumps, entries)).encode()
    if form == "state":
        text = json.dumps({"log_history": entries}).encode()
    elif form == "csv":
        text = b"step,loss\n" + b"\n".join(
            b",".join(str(v).encode("utf-8", "replace") for v in e.values()) for e in entries
        )
    name = {"lines": "log.jsonl", "state": "trainer_state.json", "csv": "log.csv", "list": "log.jsonl"}[form]
    for content in (text, text + noise, text[: len(text) // 2]):
        (tmp_path / name).write_bytes(content)
        with contextlib.suppress(HFObjectivesError):
            diagnose(str(tmp_path / name))
    if form == "list":
        with contextlib.suppress(HFObjectivesError):
            diagnose(entries)


SETTINGS = st.dictionaries(
    st.sampled_from("sources weights unit temperature stages packing max_length preset seed weight path max_epochs name".split())
    | st.text(max_size=3),
    JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=5,
)  # fmt: skip


@few(60)
@given(SETTINGS, st.text(max_size=20))
def test_mixtures(tmp_path, values, noise):
    with contextlib.suppress(HFObjectivesError):
        MixtureConfig.read(values)
    file = tmp_path / "mixture.yaml"
    for text in (json.dumps(values), json.dumps(values) + noise, noise):
        file.write_text(text, encoding="utf-8", errors="replace")
        with contextlib.suppress(HFObjectivesError):
            MixtureConfig.read(str(file))


@pytest.fixture(scope="module")
def whole() -> dict:
    """A manifest that can be read."""
    account = dict.fromkeys(("rows_in", "rows_out", "tokens_in", "trained", "masked", "num_bytes"), 1)
    account |= {"dropped_tokens": {}, "dropped_rows": {}, "dropped_examples": {}}
    shard = {"path": "train/x", "split": "train", "source": "x", "file": "x", "rows": 1, "tokens": 1, "supervised": 1}
    return {
        "policy": {"preparation_version": VERSION, "max_length": 8, "eval_share": 0.0}, "complete": True, "versions": {},
        "ledgers": {"train": {"x": account}, "validation": {}}, "broken": 0, "broken_named": [],
        "shards": [{**shard, "row_groups": [1], "num_bytes": 1, "sha256": "x"}],
    }  # fmt: skip


@few(100)
@given(st.data())
def test_manifests(tmp_path, whole, data):
    """One value somewhere in a manifest is replaced; the file is whole, or cut."""
    values = json.loads(json.dumps(whole))
    place, path = values, []
    while isinstance(place, (dict, list)) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        path.append(key)
        if data.draw(st.booleans()):
            break
        place = place[key]
    target = values
    for key in path[:-1]:
        target = target[key]
    if isinstance(target, (dict, list)):
        target[path[-1]] = data.draw(JSON)
    text = json.dumps(values)
    for content in (text, text[: data.draw(st.integers(0, len(text)))]):
        for name in (MANIFEST, CHECKPOINT):
            (tmp_path / name).write_text(content)
        with contextlib.suppress(HFObjectivesError):
            assert all(isinstance(line, str) for line in Manifest.read(tmp_path).lines())
        assert fault_of(Path(tmp_path)) is None or fault_of(Path(tmp_path))
        with contextlib.suppress(HFObjectivesError):
            step_rows_of(tmp_path)


def test_a_whole_manifest_is_read(tmp_path, whole):
    (tmp_path / MANIFEST).write_text(json.dumps(whole))
    assert Manifest.read(tmp_path).num_tokens == 1
