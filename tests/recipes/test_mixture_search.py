"""The search of mixture weights: killed and gone on with, alike however it runs, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from hf_objectives import build_mixture, demo
from hf_objectives.errors import ConfigError, FileFormatError, PreparedDataError, WorkerError
from hf_objectives.preparation.corpus import load_prepared
from hf_objectives.recipes.mixture_search import Search, SearchData, main, prepare

ROOT = Path(__file__).parents[2]
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two sources of different sizes, as a user would have them, and a file to evaluate on."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, skill, n in (("words", "spelling", 60), ("numbers", "sorting", 200)):
        lines = [json.dumps(row) + "\n" for row in demo.texts(n, skills=[skill])]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    test = demo.texts(20, split="test", skills=["spelling"])
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return folder


def arguments(corpus: Path, out: Path, **changed) -> list[str]:
    given = {
        "model_config": TINY,
        "tokenizer_name": "builtin",
        "sources": {name: str(corpus / f"{name}.jsonl") for name in ("words", "numbers")},
        "evaluation": {"test": str(corpus / "test.jsonl"), "both": {"source": ["words", "numbers"], "weight": 0.5}},
        "trials": 5,
        "parallel": 2,
        "check_seeds": 1,
        "max_length": 64,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "num_proc": 1,
        "use_cpu": "true",
        "output_dir": out,
        **changed,
    }
    text = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in given.items()}
    return [word for name, value in text.items() for word in (f"--{name}", value)]


def finished(out: Path) -> dict[str, float]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in sorted(out.glob("*/*/result.json"))}


@pytest.fixture(scope="module")
def search(corpus, tmp_path_factory) -> tuple[Path, dict[str, float], dict]:
    """A search that was killed once two trials were there, and then run to its end: its folder, what was there when it was
    killed, and its results."""
    out = tmp_path_factory.mktemp("search") / "run"
    run = subprocess.Popen(
        [sys.executable, "recipes/mixture_search.py", *arguments(corpus, out, parallel=1)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 200
    while len(finished(out)) < 2:
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    time.sleep(0.5)  # for the trial that was under way, which ends with its parent
    there = finished(out)
    assert 2 <= len(there) < 5
    return out, there, main(arguments(corpus, out))


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_search_goes_on_without_training_again(search, corpus, capsys):
    out, there, results = search
    now = finished(out)
    assert len(now) == 7 and there.items() <= now.items()
    assert main(arguments(corpus, out)) == results and finished(out) == now
    assert "5 of 5 runs were there already" in capsys.readouterr().out


@pytest.mark.long
def test_results_are_whole(search):
    out, _, results = search
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    trials = [json.loads((out / f"trials/{i:03d}/result.json").read_text()) for i in range(5)]
    assert [list(trial["settings"]["weights"].values()) for trial in trials] == results["trials"]
    assert results["trials"][0] == results["natural"] and sum(results["recommended"]) == pytest.approx(1)
    words, numbers = results["natural"]
    assert 0.1 < words < 0.4 and words + numbers == pytest.approx(1)  # by tokens
    for trial, weights in zip(trials, results["trials"], strict=True):
        given = [source["asked"] for source in trial["given"]["sources"]]
        assert given == pytest.approx(weights)
    sets = results["evaluation"]
    for name in ("test", "both"):
        assert sets[name]["trials"] == [trial["losses"][name] for trial in trials]
        assert set(sets[name]["cv_rmse"]) == {"mixing_law", "ridge", "boosted", "mean"}
    combined = [a + 0.5 * b for a, b in zip(sets["test"]["trials"], sets["both"]["trials"], strict=True)]
    assert sets["combined"]["trials"] == pytest.approx(combined)
    for kind in ("natural", "recommended"):
        assert len(sets["combined"][kind]["measured"]) == 1
    assert (out / "mixture_search.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_recommended_mixture_can_be_built(search):
    out, _, results = search
    given = yaml.safe_load((out / "recommended.yaml").read_text())
    assert list(given["sources"]) == results["sources"]
    mixture = build_mixture(out / "recommended.yaml", tokenizer=demo.build_tokenizer())
    assert mixture.plan.weights == pytest.approx(results["recommended"])
    assert {"input_ids", "source"} <= set(next(iter(mixture)))


@pytest.mark.long
@pytest.mark.long
@pytest.mark.slow
def test_processes_change_nothing_and_more_trials_go_on(search, corpus, tmp_path):
    results = search[2]
    alone = main(arguments(corpus, tmp_path / "run", parallel=1, trials=6, check_seeds=0))
    assert [trials["trials"][:5] for trials in (alone, results)] == [results["trials"]] * 2
    for name in ("test", "both"):
        assert alone["evaluation"][name]["trials"][:5] == results["evaluation"][name]["trials"]


@pytest.mark.long
@pytest.mark.long
@pytest.mark.slow
def test_ray_tune_trains_the_same_and_names_what_fails(search, corpus, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'hf-objectives[ray]'")
    pytest.importorskip("ray.tune", reason="Ray Tune is an extra: pip install 'hf-objectives[ray]'")
    (tmp_path / "run/trials/001/result.draft").mkdir(parents=True)
    trials = [json.loads((search[0] / f"trials/00{i}/result.json").read_text())["settings"] for i in range(2)]
    weights = [np.array(list(trial["weights"].values())) for trial in trials]
    workers = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": workers})
    try:
        searching = Search(arguments(corpus, tmp_path / "run", engine="ray"))
        with pytest.raises(WorkerError, match="1 of 2 runs failed: trials/001 .*IsADirectoryError"):
            searching.losses([(f"trials/00{i}", weights[i], 0) for i in range(2)])
    finally:
        ray.shutdown()
    of_ray, of_processes = (folder / "trials/000/result.json" for folder in (tmp_path / "run", search[0]))
    assert json.loads(of_ray.read_text()) == json.loads(of_processes.read_text())


@pytest.mark.long
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"learning_rate": 2e-2}, ConfigError, "trials/000 was trained otherwise. learning_rate: 0.01 there, 0.02"),
        ({"max_steps": 7}, ConfigError, "max_steps: 6 there, 7 asked for"),
        ({"seed": 1}, ConfigError, "seed: 42 there, 1 asked for"),
        ({"concentration": 2}, ConfigError, "trials/001 was trained otherwise. weights: "),
        ({"max_length": 32}, PreparedDataError, "max_length: 64 there, 32 asked for"),
    ],
)
def test_trials_under_other_settings_are_not_taken(search, corpus, changed, error, words):
    before = finished(search[0])
    with pytest.raises(error, match=words):
        main(arguments(corpus, search[0], **changed))
    assert finished(search[0]) == before


@pytest.mark.long
def test_trials_on_other_data_are_not_taken(search, corpus):
    lines = (corpus / "words.jsonl").read_text()
    (corpus / "words.jsonl").write_text(lines + '{"text": "Spell cat. c a t"}\n')
    try:
        with pytest.raises(ConfigError, match="trials/000 was trained otherwise. .*source 'words': "):
            main(arguments(corpus, search[0]))
    finally:
        (corpus / "words.jsonl").write_text(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"evaluation": {"x": {"source": "wordz"}}}, ConfigError, "'x': source is 'wordz'.*did you mean 'words'"),
        ({"evaluation": {"x": {"weight": 1}}}, ConfigError, "'x': give a path or a source, one of the two"),
        ({"evaluation": {"x": {"path": "a.txt", "wieght": 1}}}, ConfigError, "unknown key 'wieght' .did you mean 'weight'"),
        ({"evaluation": {"x": {"path": "a.txt", "weight": -1}}}, ConfigError, "'x': weight is -1.0; expected a number, 0"),
        ({"evaluation": {"x": {"path": "a.txt", "weight": 0}}}, ConfigError, "weights of all evaluations are 0"),
        ({"evaluation": {"combined": "a.txt"}}, ConfigError, "give it another name"),
        ({"evaluation": {"x": "none.jsonl"}}, FileFormatError, "no such file: none.jsonl"),
        ({"sources": {"a": "a.jsonl"}}, ConfigError, "sources: a; expected at least two to mix"),
        ({"sources": {"a": {"path": "a.jsonl", "weight": -1}, "b": "b.jsonl"}, "evaluation": {"x": {"source": "a"}}},
         ConfigError, "source 'a': weight is -1.0"),
        ({"trials": 4}, ConfigError, "trials is 4; expected at least 5"),
        ({"parallel": 0}, ConfigError, "parallel is 0; expected at least 1"),
        ({"engine": "slurm"}, ConfigError, "engine is 'slurm'; expected one of local, ray"),
        ({"max_steps": -1}, ConfigError, "say how long with max_tokens"),
        ({"concentration": 0}, ConfigError, "concentration 0.0; expected"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_trial(corpus, tmp_path, changed, error, words):
    with pytest.raises(error, match=words):
        main(arguments(corpus, tmp_path / "run", **changed))
    assert not finished(tmp_path / "run")


@pytest.mark.slow
def test_the_built_in_corpus_has_a_source_a_skill(tmp_path):
    settings = SearchData(sources="builtin", max_length=64, num_proc=1)
    named = settings.named_sources()
    asked = {"x": {"source": ["spelling", "sorting"]}}
    folder, places = prepare(settings, named, asked, demo.build_tokenizer(), tmp_path)
    mixture = build_mixture({"sources": {name: {"path": folder} for name in named}})
    assert mixture.names == [name for name in demo.SKILLS if name not in (*demo.FACTS, *demo.HARD)]
    assert max(mixture.plan.weights) > 4 * min(mixture.plan.weights)
    rows = load_prepared(places["x"][0], places["x"][1], sources=places["x"][2])
    said = demo.build_tokenizer().decode([token for row in rows for token in row["input_ids"]])
    assert 'Spell "' in said and "Sort " in said
