"""hf-objectives prepare and mixture, as a user types them."""

from __future__ import annotations

import json

import pytest
from datasets import load_dataset

from hf_objectives import demo
from hf_objectives.cli.main import main


@pytest.fixture
def files(tmp_path):
    demo.build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demo.texts(50)))
    (tmp_path / "b.txt").write_text("one line\nanother line\n")
    (tmp_path / "corpus.yaml").write_text(
        f"tokenizer: {tmp_path}/tokenizer\nmax_length: 128\noutput_dir: {tmp_path}/out\n"
        f"sources:\n  a: {tmp_path}/*.jsonl\n  b: {{path: {tmp_path}/b.txt, documents: line, weight: 2}}\n"
    )
    return tmp_path


def test_prepare(files, capsys):
    main(["prepare", "--config", str(files / "corpus.yaml"), "--eval_share", "0.2"])
    said = capsys.readouterr().out
    assert "a: 50 rows" in said and "b: 2 rows" in said and "rows of 128 tokens" in said
    assert set(load_dataset("parquet", data_dir=str(files / "out"))) == {"train", "validation"}


def test_prepare_and_mixture_as_json(files, capsys):
    main(["prepare", "--config", str(files / "corpus.yaml"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {name: account["rows_in"] for name, account in found["ledgers"]["train"].items()} == {"a": 50, "b": 2}
    yaml = f"sources:\n  a: {{path: {files}/out, weight: 1}}\nunit: rows\n"
    (files / "one.yaml").write_text(yaml)
    main(["mixture", "--mixture", str(files / "one.yaml"), "--rows", "60", "--json", "--plot", str(files / "plan.png")])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["row"], report["sources"][0]["share"]) == (60, 1.0) and "plan.png" in printed.err


def test_sources_are_checked(files, refused):
    config = ["prepare", "--config", str(files / "corpus.yaml")]
    with refused("give dataset_name or sources, one of the two"):
        main([*config, "--dataset_name", "x.jsonl"])
    with refused("sources is not a mapping"):
        main([*config, "--sources", "[1]"])
    with refused("chat_template names a file that does not exist"):
        main([*config, "--chat_template", "none.jinja"])


def test_what_is_not_there_is_one_line(files, refused):
    config = ["prepare", "--config", str(files / "corpus.yaml")]
    with refused("OSError: .*nowhere"):
        main([*config, "--tokenizer", "/nowhere"])
    with refused("FileExistsError: .*b.txt"):
        main([*config, "--output_dir", str(files / "b.txt")])


@pytest.mark.slow
def test_mixture(files, capsys, tmp_path):
    main(["prepare", "--config", str(files / "corpus.yaml")])
    (files / "mixture.yaml").write_text(
        f"sources:\n  a: {{path: {files}/out, weight: 0.9}}\n  b: {{path: {files}/out, weight: 0.2}}\nunit: rows\n"
    )
    capsys.readouterr()
    main(["mixture", "--mixture", str(files / "mixture.yaml"), "--rows", "110", "--plot", str(tmp_path / "plan.png")])
    said = capsys.readouterr().out
    assert (
        "after 110 rows, shares of rows" in said
        and "81.82%" in said
        and "source 'b' will be repeated 20.0 times" in said
    )
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    main(["mixture", "--mixture", str(files / "mixture.yaml"), "--tokens", "5e3"])
    tokens = [int(line.split("│")[4].replace(",", "")) for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert sum(tokens) == pytest.approx(5_000, rel=0.1)
    log = [{"step": 2, "loss": 1.0, "mixture/a/asked": 0.5, "mixture/a/share": 0.49, "mixture/a/tokens": 7,
            "mixture/a/examples": 2, "mixture/a/epochs": 0.5}]  # fmt: skip
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    main(["mixture", "--run", str(tmp_path), "--plot", str(tmp_path / "run.svg")])
    assert "after 2 steps" in capsys.readouterr().out and (tmp_path / "run.svg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "ConfigError: give mixture or run, one of the two"),
        (["--mixture", "a", "--run", "b"], "ConfigError: give mixture or run, one of the two"),
        (["--mixture", "none.yaml"], "ConfigError: cannot read none.yaml"),
        (["--mixture", "a", "--rows", "0"], "ConfigError: rows is 0 and tokens None; expected at least 1"),
        (["--run", "nowhere"], "FileFormatError: no log at nowhere"),
    ],
)
def test_a_mixture_that_cannot_be_looked_at_is_a_line(words, message, refused):
    with refused(message):
        main(["mixture", *words])
