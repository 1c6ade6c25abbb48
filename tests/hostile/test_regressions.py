"""Files that once ended in a raw error, in no answer or in all memory taken: a result, or an error of ours with a place."""

from __future__ import annotations

import gzip
import json

import pytest

from hf_objectives import demo, diagnose, prepare_corpus
from hf_objectives.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FileFormatError,
    HFObjectivesError,
    PreparedDataError,
)
from hf_objectives.labels import encode_row, read_tools, to_example
from hf_objectives.mixture import MixtureConfig
from hf_objectives.preparation import CorpusConfig, files, hold_out, load_rows
from hf_objectives.preparation.manifest import MANIFEST, Manifest
from hf_objectives.preparation.shards import PROGRESS
from hf_objectives.preparation.work import Finished
from hf_objectives.recipes.arguments import read_mapping, read_template
from hf_objectives.recipes.data import Prepared
from hf_objectives.recipes.data_arguments import read_mixture
from hf_objectives.trainers.checkpoints import MANIFEST as CHECKPOINT_MANIFEST
from hf_objectives.trainers.checkpoints import fault_of, step_rows_of
from hf_objectives.types import parse_json, parse_yaml
from tests.support.corpora import SMALL
from tests.support.hostile import DAMAGED, DEEP

SMALL_CONFIG = CorpusConfig(**SMALL)
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(scope="module")
def tokenizer():
    return demo.build_tokenizer()


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_deep_and_long_json(tmp_path, tokenizer, text):
    with pytest.raises(ValueError, match="over 100 deep|over 4,300 digits"):
        parse_json(text)
    call = {"from": "function_call", "value": '{"name": "f", "arguments": ' + text + "}"}
    for row in (
        {"messages": text},
        {"conversations": [{"from": "human", "value": "Hi"}, call]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": text}]},
        {"messages": [{"role": "assistant", "content": "x"}], "chat_template_kwargs": text},
    ):
        with pytest.raises(DataError):
            to_example(row)
    for tools in (text, [text]):
        with pytest.raises(DataError, match="not JSON"):
            read_tools(tools)
    with pytest.raises(ConfigError):
        read_mapping("sources", text)
    with pytest.raises(ConfigError):
        read_mixture('{"sources": ' + text + "}", {})
    line = tmp_path / "rows.jsonl"
    line.write_text('{"text": "fine"}\n{"text": ' + text + "}\n")
    try:  # 150 deep is a JSON value that a row may hold; as a text it is none
        rows = load_rows(str(line))
        assert rows[0] == {"text": "fine"}
        with pytest.raises(DataError):
            encode_row(tokenizer, rows[1])
    except FileFormatError as error:
        assert f"{line}, line 2" in str(error)
    array = tmp_path / "rows.json"
    array.write_text('[{"text": "fine"},\n{"text": ' + text + "}]")
    try:
        assert load_rows(str(array))[0] == {"text": "fine"}
    except FileFormatError as error:
        assert f"{array}, line" in str(error)


def test_rows_of_python_that_are_deep(tokenizer):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for row in (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", "extra": deep}]},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": deep}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], "tools": [{"a": deep}]},
    ):
        with pytest.raises(DataError):
            encode_row(tokenizer, row, source="s", row_index=3)
        with pytest.raises(DataError):
            hold_out([row, row], 0.5)


def test_a_line_without_an_end_is_refused_with_its_place(tmp_path, tokenizer, monkeypatch):
    """The bound is 64 MiB; a file of 300 MB of zeros is 300 kB when compressed."""
    monkeypatch.setattr(files, "MAX_RECORD", 1 << 20)
    monkeypatch.setattr(files, "READ_BYTES", 1 << 16)
    long = b'{"text": "one"}\n{"text": "' + b"x" * (3 << 20) + b'"}\n{"text": "three"}\n'
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.txt", "rows.txt.gz"):
        file = tmp_path / name
        file.write_bytes(gzip.compress(long) if name.endswith(".gz") else long)
        with pytest.raises(FileFormatError, match=r"rows\.\w+(\.gz)?, line \d: a record of over"):
            load_rows(str(file))
    folder = tmp_path / "corpus"
    with pytest.raises(FileFormatError, match="line 2: a record of over"):
        prepare_corpus({"web": str(tmp_path / "rows.jsonl")}, tokenizer, folder, SMALL_CONFIG)


def test_a_source_with_a_name_longer_than_a_file_may_have(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"A sentence, number {i}."}) + "\n" for i in range(20)))
    folder = tmp_path / "corpus"
    names = ["x" * 400, "x" * 399 + "y", "\u4e2d" * 400]
    prepare_corpus(dict.fromkeys(names, str(file)), tokenizer, folder, SMALL_CONFIG)
    manifest = Manifest.read(folder)
    assert set(manifest.named) == set(names)
    assert len({shard.path for shard in manifest.shards}) == 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("prepared")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"A sentence, number {i}."}) + "\n" for i in range(20)))
    prepare_corpus({"web": str(file)}, tokenizer, folder / "corpus", SMALL_CONFIG)
    return folder / "corpus"


WRONG = {
    "null_policy": {"policy": None}, "null_shards": {"shards": None}, "shards_of_lists": {"shards": [[]]},
    "ledger_list": {"ledgers": []}, "ledger_of_numbers": {"ledgers": {"train": {"web": 3}}}, "unknown": {"other": 1},
    "broken_text": {"broken": "x"}, "huge": {"broken": 10**30}, "negative": {"broken": -1},
    "complete_number": {"complete": 1},
    "policy_without_length": "max_length", "shard_outside": {"path": "../../x.parquet"}, "shard_absolute": {"path": "/x"},
    "shard_rows": {"rows": "many"}, "shard_groups": {"row_groups": ["x"]}, "shard_null": {"sha256": None},
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRONG, *DAMAGED])
def test_a_damaged_manifest_of_a_corpus(corpus, tmp_path, name):
    values = json.loads((corpus / MANIFEST).read_text())
    content = DAMAGED.get(name)
    if content is None:
        change = WRONG[name]
        if isinstance(change, str):
            del values["policy"][change]
        elif name.startswith("shard_"):
            values["shards"][0] |= change
        else:
            values |= change
        content = json.dumps(values).encode()
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(PreparedDataError, match=f"{MANIFEST} is damaged|was prepared under version"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", [*DAMAGED, "shard_outside"])
def test_a_damaged_account_is_no_reason_to_stop_and_removes_nothing_outside(corpus, tmp_path, name):
    content = DAMAGED.get(name)
    if content is None:
        values = json.loads(next((corpus / PROGRESS).glob("*.json")).read_text())
        values["shards"][0]["path"] = "../victim"
        content = json.dumps(values).encode()
    file = tmp_path / "account.json"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        Finished.read(file)


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_states(tmp_path, content):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / CHECKPOINT_MANIFEST).write_bytes(content)
    assert fault_of(folder) is not None
    try:
        assert step_rows_of(folder) is None
    except CheckpointError as error:
        assert CHECKPOINT_MANIFEST in str(error)
    (tmp_path / "ready.json").write_bytes(content)
    with pytest.raises(PreparedDataError, match="ready.json is damaged"):
        Prepared.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS, "a: &a [*a]", "&a {x: *a}", "[" * 3000, "{a: " * 3000, "a: !!python/object:os.system [x]", "a: 2020-99-99",
        "? [1]\n: 2", "a: !!int x", "\x00", "- &a\n- *b", "a: b: c", "a: !!timestamp x",
        "a: !!float x", "a: " + "9" * 5000,
        "<<: 1", "<<: [1]", "a: !!binary é", "%YAML 9.9\n---\na", "a: !!set [1]", "a: !!omap [1]",
    ],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_yaml_of_strangers(tmp_path, text):
    file = tmp_path / "mixture.yaml"
    file.write_text(text)
    with pytest.raises(HFObjectivesError, match="mixture"):
        MixtureConfig.read(str(file))
    with pytest.raises(HFObjectivesError, match="mixture"):
        read_mixture(str(file), {})


def test_files_that_are_not_utf8(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError):
        read_mixture(str(file), {})
    with pytest.raises(ConfigError):
        MixtureConfig.read(str(file))
    template = tmp_path / "x.jinja"
    template.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_template(str(template))


def test_aliases_that_stand_for_little_are_read():
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "ids", ["user", [2**70], [None], {"a": 1}, ["x"], [[1], [1, 2]], [1.5], ["1"], [True]], ids=repr
)
def test_ids_that_are_none(tokenizer, ids):
    with pytest.raises(DataError, match="source 's', row 3: (input_ids|id )"):
        encode_row(tokenizer, {"input_ids": ids}, source="s", row_index=3)


def test_a_log_of_a_byte_order_mark(tmp_path):
    """Found by `benchmarks/fuzz.py`."""
    file = tmp_path / "log.csv"
    file.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(FileFormatError, match="holds no lines"):
        diagnose(str(file))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [{"role": []}]}, r"unknown role \[\]"),
        ({"messages": [], "chat_template_kwargs": [{"role": "user"}]}, "expected a mapping of names to values"),
        ({"conversations": [{"from": [], "value": "user"}]}, r"unknown speaker \[\]"),
        ({"instruction": "user", "output": "user", "history": "user"}, "expected a list of pairs"),
        ({"instruction": "user", "output": "user", "history": ["ab"]}, "expected pairs of a question and its answer"),
    ],
)
def test_values_of_another_kind_in_a_row(tokenizer, row, words):
    with pytest.raises(DataError, match=words):
        encode_row(tokenizer, row)
