"""Which rows made a step: what `hf-objectives rows` finds is held against the batches that the Trainer was given."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Trainer

from hf_objectives import demo
from hf_objectives.cli.main import main as command
from hf_objectives.errors import ConfigError, FileFormatError
from hf_objectives.recipes import dpo, pretrain, reward, rows_of_step, sft
from tests.support.recipes import QUIET, command_line, run_two_processes, save_small_model, sharegpt, write_rows

#: A launch of two processes writes what each was given: the row of each document, by step.
_PROGRAM = """
import json, os, sys
from pathlib import Path
from tests.recipes.test_step_rows import recorded
from hf_objectives.recipes.sft import main
with recorded() as steps:
    main(sys.argv[2:])
Path(sys.argv[1], os.environ["RANK"] + ".json").write_text(json.dumps(steps))
"""


class Killed(BaseException):
    """What ends a run in the middle."""


def train(corpus: Path, out: Path, name: str, *, kill_at: int | None = None, **given) -> dict[int, list]:
    """Run one of `RUNS`, see `run_until`."""
    return run_until(kill_at, RUNS[name][0].main, [*launch(corpus, out, name), *command_line(given)])


def run_until(kill_at: int | None, main, words: list[str]) -> dict[int, list]:
    """Run a recipe, until it is killed after this step, and return the documents of each step that it finished."""
    with recorded() as steps:
        step = Trainer.training_step

        def training_step(trainer, *args, **kwargs):
            if trainer.state.global_step == kill_at:
                raise Killed
            return step(trainer, *args, **kwargs)

        Trainer.training_step = training_step
        with contextlib.suppress(Killed):
            main(words)
    return steps


class recorded:
    """While it lasts, the documents that each step is given: `(source, row, tokens)` of rows, token ids of pairs."""

    def __enter__(self) -> dict[int, list]:
        self.usual, steps = Trainer.training_step, defaultdict(list)

        def training_step(trainer, model, inputs, *args, **kwargs):
            steps[trainer.state.global_step + 1] += documents(inputs)
            return self.usual(trainer, model, inputs, *args, **kwargs)

        Trainer.training_step = training_step
        return steps

    def __exit__(self, *error) -> None:
        Trainer.training_step = self.usual


def documents(batch) -> list:
    if "source_ids" not in batch:
        return [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    found = []
    # A row may follow itself, at the end of one epoch of its source and the beginning of the next.
    begun = (batch["position_ids"] == 0).cumsum(-1) if "position_ids" in batch else torch.zeros_like(batch["row_ids"])
    for places in torch.stack([batch["source_ids"], batch["row_ids"], begun], -1).view(len(batch["input_ids"]), -1, 3):
        kinds, counts = torch.unique_consecutive(places, dim=0, return_counts=True)
        found += [
            (batch["source_names"][source], row, count)
            for (source, row, _), count in zip(kinds.tolist(), counts.tolist(), strict=True)
            if source >= 0
        ]
    return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A user's folder: a small model, conversations, texts and pairs."""
    folder = tmp_path_factory.mktemp("user")
    save_small_model(folder)
    write_rows(folder / "chats.jsonl", demo.chats(23))
    write_rows(folder / "more.jsonl", demo.chats(9, seed=5))
    write_rows(folder / "texts.jsonl", demo.texts(120))
    write_rows(folder / "pairs.jsonl", [sharegpt(row) for row in demo.preferences(19)])
    return folder


def arguments(corpus: Path, out: Path, given: dict) -> list[str]:
    usual = {"model_name_or_path": corpus / "model", "output_dir": out, "max_length": 96, "save_strategy": "steps",
             "save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    return command_line({**QUIET, **usual, **given})


CHATS = {"chats": "chats.jsonl", "more": "more.jsonl"}
WEIGHTS = json.dumps({"sources": {"chats": {"weight": 0.3}, "more": {"weight": 0.7}}})
BIGGER = {"per_device_train_batch_size": 3}
EPOCHS = {"num_train_epochs": 3, "eval_share": 0.2}
RUNS = {
    "rows": (sft, CHATS, {**EPOCHS, "packing": "false"}),
    "packed": (sft, CHATS, {**EPOCHS, "strategy": "concat", "data_seed": 7, "dataloader_drop_last": "true"}),
    "mixed": (sft, CHATS, {"mixture": WEIGHTS, "packing": "false", "max_steps": 7}),
    "mixed and packed": (sft, CHATS, {"mixture": WEIGHTS, "max_steps": 7}),
    "pretraining": (pretrain, {"texts": "texts.jsonl"}, {"num_train_epochs": 2}),
    "streamed": (pretrain, {"texts": "texts.jsonl"}, {"streaming": "true", "max_steps": 7}),
}


def launch(corpus: Path, out: Path, name: str) -> list[str]:
    _, sources, given = RUNS[name]
    paths = {name: str(corpus / path) for name, path in sources.items()}
    return arguments(corpus, out, {"sources": json.dumps(paths), **given})


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_rows_of_every_step(corpus, tmp_path, name):
    run = tmp_path / "run"
    with recorded() as steps:
        RUNS[name][0].main(launch(corpus, run, name))
    assert len(steps) >= 6
    check(run, steps)
    # The first checkpoint may be gone, and the folder elsewhere.
    shutil.rmtree(run / "checkpoint-3")
    check(run.rename(tmp_path / "moved"), steps)


def check(run: Path, steps: dict[int, list]) -> None:
    for step, given in steps.items():
        assert [(row.source, row.row, row.tokens) for row in rows_of_step(run, step)] == given, step


SMALLER = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "data_seed": 5, "save_steps": 50}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "mixed and packed", "streamed"])
def test_a_run_that_was_resumed_with_other_batches(corpus, tmp_path, name):
    """Each step is of the launch that made it, also where no checkpoint came after it."""
    first = train(corpus, tmp_path, name, kill_at=5)
    second = train(corpus, tmp_path, name, kill_at=6, resume_from_checkpoint="true", **SMALLER)
    assert list(first) == [1, 2, 3, 4, 5] and list(second) == [4, 5, 6]
    check(tmp_path, {**first, **second})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "streamed"])
def test_checkpoints_of_another_run_in_the_folder(corpus, tmp_path, name):
    train(corpus, tmp_path, name)
    check(tmp_path, train(corpus, tmp_path, name, kill_at=4, max_steps=5, save_steps=50, **BIGGER))
    with pytest.raises(ConfigError, match="step is 6; the run in .* has steps 1 to 5"):
        rows_of_step(tmp_path, 6)
    with pytest.raises(ConfigError, match="checkpoint-3 is no checkpoint of the last run in"):
        rows_of_step(tmp_path / "checkpoint-3", 2)
    # Neither are the other run's checkpoints gone on from.
    with pytest.raises(ConfigError, match="no checkpoint of the last run in .*, only of others before it"):
        train(corpus, tmp_path, name, resume_from_checkpoint="true")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "streamed"])
def test_a_run_that_was_killed_before_any_checkpoint(corpus, tmp_path, name):
    check(tmp_path, train(corpus, tmp_path, name, kill_at=2))
    with pytest.raises(ConfigError, match=r"step is 1000; the run in .* has steps 1 to \d"):
        rows_of_step(tmp_path, 1000)


@pytest.mark.slow
def test_the_batch_size_that_fits_counts(corpus, tmp_path):
    """`auto_find_batch_size` begins anew with a smaller one."""
    with recorded() as steps:
        step, larger = Trainer.training_step, []

        def training_step(trainer, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2 and trainer.state.global_step == 1:
                larger.extend(steps.pop(1))
                raise RuntimeError("CUDA out of memory.")
            return step(trainer, model, inputs, *args, **kwargs)

        Trainer.training_step = training_step
        given = {"auto_find_batch_size": "true", "per_device_train_batch_size": 4, "save_steps": 1}
        sft.main([*launch(corpus, tmp_path, "rows"), *command_line(given)])
    assert larger and min(steps) == 1
    check(tmp_path, steps)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [dpo, reward])
def test_the_pairs_of_every_step(corpus, tmp_path, recipe):
    given = {"dataset_name": corpus / "pairs.jsonl", "num_train_epochs": 2, "eval_share": 0.2}
    with recorded() as steps:
        recipe.main(arguments(corpus, tmp_path / "run", given))
    tokenizer = AutoTokenizer.from_pretrained(corpus / "model")
    rows = [json.loads(line) for line in (corpus / "pairs.jsonl").read_text().splitlines()]
    for step, sides in steps.items():
        found = rows_of_step(tmp_path / "run", step, text=True)
        assert 2 * len(found) == len(sides)
        texts = sorted(tokenizer.decode(ids) for ids in sides)
        parts = [row.text.removeprefix("prompt: ").split("\nrejected: ") for row in found]
        prompts, chosen = zip(*(("\n" + left).rsplit("\nchosen: ", 1) for left, _ in parts), strict=True)
        answers = [(chosen[i], right) for i, (_, right) in enumerate(parts)]
        assert texts == sorted(
            prompt[1:] + side for prompt, sides in zip(prompts, answers, strict=True) for side in sides
        )
        for row in found:
            assert row.source == "pairs.jsonl" and rows[row.row]["chosen"]["value"] in row.text


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes(corpus, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    run_two_processes(program, [str(tmp_path), *launch(corpus, tmp_path / "run", "rows")])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for step in ranks[0]:
        given = sorted(tuple(row) for rank in ranks for row in rank[step])
        assert sorted((row.source, row.row, row.tokens) for row in rows_of_step(tmp_path / "run", int(step))) == given


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    sft.main(launch(corpus, folder, "packed"))
    return folder


def test_the_command(run, capsys):
    capsys.readouterr()
    command(["rows", str(run), "--step", "2", "--json", "--text"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["source"] for row in printed} <= set(CHATS) and any("⟦" in row["text"] for row in printed)
    command(["rows", str(run / "checkpoint-3"), "--step", "2"])
    said = capsys.readouterr().out
    assert f"step 2: {len(printed)} documents, {sum(row['tokens'] for row in printed)} tokens" in said


@pytest.mark.parametrize("step", [0, -1, 10_000])
def test_a_step_that_the_run_does_not_have(run, step):
    with pytest.raises(ConfigError, match=rf"step is {step}; the run in .* has steps 1 to \d+"):
        rows_of_step(run, step)


def changed(run: Path, tmp_path: Path, launch: dict | None = None, **settings) -> Path:
    """A copy of the run whose environment has other settings, or another launch."""
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    environment = json.loads((folder / "environment.json").read_text())
    environment["settings"] |= settings
    environment["settings"]["launches"][-1] |= launch or {}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"launch": {"sampling": "group_by_length"}}, "the order of such a run depends on more than its seed"),
        ({"launch": {"ignore_data_skip": True}}, "ignore_data_skip=True"),
        ({"launch": {"begin": 2}}, "step 2 came before the checkpoint of step 2, which does not say how it was made"),
        ({"recipe": "ppo"}, "recipe is 'ppo'; expected one of sft, pretrain, dpo, reward"),
        ({"max_length": 80}, "the rows are not those that .* was trained on"),
    ],
)
def test_an_order_that_cannot_be_told_is_refused(run, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        rows_of_step(changed(run, tmp_path, **settings), 2)


def test_data_that_changed_is_refused(corpus, run, tmp_path):
    other = tmp_path / "chats.jsonl"
    other.write_text((corpus / "chats.jsonl").read_text().replace("2", "3"))
    sources = {"chats": str(other), "more": str(corpus / "more.jsonl")}
    with pytest.raises(ConfigError, match="the rows are not those"):
        rows_of_step(changed(run, tmp_path, sources=json.dumps(sources)), 2)


MIXED = """
sources: {texts: {path: TEXTS, weight: 1}, more: {path: MORE, weight: 2}}
blocklist: BLOCKLIST
"""


@pytest.mark.parametrize("changed", ["texts.jsonl", "blocklist.json", "mixture.yaml"])
def test_what_a_mixture_names_changed(corpus, tmp_path, changed):
    """No checkpoint says what the mixture was: the run was killed before the first. All lengths stay as they are."""
    texts = [json.loads(line) for line in (corpus / "texts.jsonl").read_text().splitlines()]
    for name, rows in {"texts": texts[:40], "more": texts[40:60]}.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "blocklist.json").write_text('{"texts": [3]}')
    settings = MIXED
    for name in ("texts.jsonl", "more.jsonl", "blocklist.json"):
        settings = settings.replace(name.split(".")[0].upper(), str(tmp_path / name))
    (tmp_path / "mixture.yaml").write_text(settings)
    given = {"mixture": tmp_path / "mixture.yaml", "max_steps": 7}
    check(tmp_path / "run", run_until(2, pretrain.main, arguments(corpus, tmp_path / "run", given)))
    path = tmp_path / changed
    old, new = ("weight: 2", "weight: 3") if changed == "mixture.yaml" else ("3", "5")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match="the rows are not those"):
        rows_of_step(tmp_path / "run", 1)


def test_names_and_texts_are_printed_as_they_are(corpus, tmp_path, capsys):
    """Markup of rich and control characters in the name of a source."""
    sources = json.dumps({"[bold]a[/bold]\x1b[31m": str(corpus / "more.jsonl")})
    sft.main(arguments(corpus, tmp_path, {"sources": sources, "max_steps": 1, "eval_share": 0}))
    capsys.readouterr()
    command(["rows", str(tmp_path), "--step", "1"])
    assert "[bold]a[/bold]␛[31m" in capsys.readouterr().out


def test_a_folder_without_a_recipes_run(tmp_path):
    with pytest.raises(
        FileFormatError, match="no environment.json can be read in .*; expected the output folder of a recipe"
    ):
        rows_of_step(tmp_path / "run", 2)
    for settings in ({}, {"recipe": "sft"}, {"recipe": "sft", "launches": []}):
        (tmp_path / "environment.json").write_text(json.dumps({"settings": settings}))
        with pytest.raises(FileFormatError, match="names no recipe and its launches"):
            rows_of_step(tmp_path, 2)
    with pytest.raises(FileFormatError, match="no environment.json"):  # not that of the folder around it
        rows_of_step(tmp_path / "chekpoint-3", 2)
