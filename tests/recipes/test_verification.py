"""The figures of a run, measured again; what was changed since is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hf_objectives.errors import ConfigError, PushError
from hf_objectives.recipes import dpo, pretrain, reward, sft, verify
from hf_objectives.recipes.evaluated import read_evaluated
from tests.support.hub_server import TOKEN
from tests.support.recipes import save_small_model, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a file, whose folder is then another one, with the file beside it."""
    folder = tmp_path_factory.mktemp("verify")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--model_name_or_path builtin --max_steps 3 --logging_steps 1 --eval_strategy no --save_strategy no"
    words += f" --use_cpu true --dataset_name {folder}/chats.jsonl --eval_share 0.3 --output_dir {folder}/run"
    words += " --report_to none --seed 5"
    sft.main([*words.split(), "--max_length", "64", "--learning_rate", "1e-3"])
    return folder


def checked(run, folder, **options):
    return {check.name: check for check in verify(str(folder), data_dir=str(run), **options)}


def copy(run, tmp_path):
    return Path(shutil.copytree(run / "run", tmp_path / "copy"))


def test_all_figures_hold(run):
    checks = checked(run, run / "run")
    assert all(check.holds for check in checks.values()), checks
    names = {"file model.safetensors", "chat template", "held-out rows", "eval_perplexity", "card, eval_perplexity"}
    assert names | {"eval_bits_per_byte", "eval_num_tokens", "card, eval_bits_per_byte"} <= {*checks}
    assert checks["eval_perplexity"].found == pytest.approx(checks["eval_perplexity"].published, rel=1e-6)


def test_a_changed_weight(run, tmp_path):
    folder = copy(run, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    wrong = {name for name, check in checked(run, folder).items() if not check.holds}
    assert {"file model.safetensors", "eval_perplexity", "eval_loss"} <= wrong and "chat template" not in wrong


def test_a_changed_template(run, tmp_path):
    folder = copy(run, tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text("x" + template.read_text())
    wrong = {name for name, check in checked(run, folder).items() if not check.holds}
    assert {"chat template", "held-out rows"} <= wrong and "file model.safetensors" not in wrong


@pytest.mark.parametrize("file", ["README.md", "evaluated.json"])
def test_a_changed_figure(run, tmp_path, file):
    folder = copy(run, tmp_path)
    figure = read_evaluated(folder)["figures"]["eval_perplexity"]
    text = (folder / file).read_text()
    assert str(figure) in text
    (folder / file).write_text(text.replace(str(figure), str(figure * 0.9)))
    wrong = {name for name, check in checked(run, folder).items() if not check.holds}
    names = {"eval_perplexity", "eval_chats_perplexity"}  # one source, so that both are the same figure
    # Against a changed run both the metadata and the table of its card stand.
    others = names | {f"card's table, {name}" for name in names} if file == "evaluated.json" else set()
    assert wrong == {f"card, {name}" for name in names} | others


def test_changed_rows(run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "chats.jsonl").write_text((run / "chats.jsonl").read_text().replace("It is", "It was"))
    wrong = {check.name for check in verify(str(run / "run"), data_dir=str(data)) if not check.holds}
    assert "held-out rows" in wrong and "eval_perplexity" in wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "evaluated.json").unlink(), "has no evaluated.json; expected a model that a recipe"),
        (lambda folder: (folder / "evaluated.json").write_text("{}"), "is damaged; expected the keys"),
        (lambda folder: (folder / "evaluated.json").write_text("[1"), "Expecting"),
        (lambda folder: rename(folder, "ppo"), "figures of ppo are of sampled answers"),
        (lambda folder: rename(folder, "os"), "'os', which is no recipe"),
    ],
)
def test_what_cannot_be_verified_is_refused(run, tmp_path, change, message):
    folder = copy(run, tmp_path)
    change(folder)
    with pytest.raises(ConfigError, match=message):
        verify(str(folder), data_dir=str(run))


def rename(folder, recipe):
    facts = read_evaluated(folder)
    (folder / "evaluated.json").write_text(json.dumps({**facts, "recipe": recipe}))


def test_a_repository_that_is_not_there(hub):
    with pytest.raises(ConfigError, match="me/none is no folder, and cannot be loaded from the Hub"):
        verify("me/none")


def test_the_card_says_what_the_run_knows(run):
    card = (run / "run" / "README.md").read_text()
    assert "- chats: local file" in card and str(run) not in card and "hf-objectives sft --config training.yaml" in card
    assert "dataset_name: chats.jsonl" in (run / "run" / "training.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "precision", "figures"),
    [
        (reward, None, {"eval_loss", "eval_accuracy", "eval_margin"}),
        (dpo, None, {"eval_chosen_perplexity", "eval_rejected_perplexity"}),  # TRL's configs ask for bf16
        (dpo, "false", {"eval_chosen_perplexity", "eval_rejected_perplexity"}),
        (pretrain, None, {"eval_perplexity", "eval_bits_per_byte"}),
    ],
)
def test_figures_of_other_recipes_hold(tmp_path, recipe, precision, figures):
    def turn(role, text):
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": turn("user", f"Say {i}"),
            "chosen": turn("assistant", f"It is {i}"),
            "rejected": turn("assistant", "no"),
        }
        for i in range(40)
    ]
    words = ["--model_name_or_path", "builtin"]
    source = ["--dataset_name", f"{tmp_path}/rows.jsonl"]
    if recipe is pretrain:  # from scratch
        source = ["--sources", json.dumps({"numbers": {"path": f"{tmp_path}/rows.jsonl"}})]
        rows = [{"text": f"the number {i} and then {i * 3}"} for i in range(40)]
        sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        words = ["--model_config", json.dumps(sizes), "--tokenizer_name", "builtin"]
    write_rows(tmp_path / "rows.jsonl", rows)
    words += "--eval_share 0.3 --max_length 64 --max_steps 2 --use_cpu true".split()
    words += f"--eval_strategy no --save_strategy no --report_to none --seed 5 --output_dir {tmp_path}/run".split()
    recipe.main([*words, *source, *([] if precision is None else ["--bf16", precision])])
    checks = checked(tmp_path, tmp_path / "run")
    assert not [check for check in checks.values() if not check.holds] and figures <= {*checks}
    named = "numbers" if recipe is pretrain else "rows.jsonl"
    assert f"- {named}: local file\n" in (tmp_path / "run" / "README.md").read_text()
    if precision == "false" or recipe is pretrain:
        assert all(checks[name].found == pytest.approx(checks[name].published, rel=1e-6) for name in figures)


@pytest.mark.slow
def test_the_snippet_of_the_card_runs(run, monkeypatch, capsys):
    card = (run / "run" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run)
    exec(compile(snippet, "card", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_pushed_by_a_recipe_and_verified_from_there(hub, tmp_path, run):
    """A secret in every setting that takes one; none is in a file or in what was sent."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "private_notes.txt").write_text("marked text")
    words = f"--model_name_or_path builtin --dataset_name {run}/chats.jsonl --max_length 64 --max_steps 2"
    words += " --use_cpu true --report_to none --eval_strategy no --save_strategy steps --save_steps 1"
    words += f" --hub_strategy checkpoint --push_to_hub true --hub_model_id me/mine --hub_token {TOKEN}"
    words += " --hub_private_repo true --hub_revision main"
    sft.main([*words.split(), "--output_dir", str(tmp_path / "mine")])
    files = hub.repos["me/mine"].files["main"]
    assert {"README.md", "results.json", "evaluated.json", "training.yaml", "model.safetensors"} <= {*files}
    assert "last-checkpoint/optimizer.pt" in files and hub.repos["me/mine"].private
    assert not {"labels.json", "environment.json", "private_notes.txt", "training_args.bin"} & {
        n.split("/")[-1] for n in files
    }
    sent = b"".join(hub.bodies)
    assert TOKEN.encode() not in sent and b"marked text" not in sent
    on_disk = [
        path for path in (tmp_path / "mine").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()
    ]
    assert not on_disk
    pulled = tmp_path / "pulled"
    for name, data in files.items():
        (pulled / name).parent.mkdir(parents=True, exist_ok=True)
        (pulled / name).write_bytes(data)
    assert all(check.holds for check in verify(str(pulled), data_dir=str(run)))


@pytest.mark.slow
def test_a_failed_push_of_a_recipe_costs_nothing_but_the_push(hub, tmp_path, run, monkeypatch):
    hub.fail = ("/commit/", 500)
    monkeypatch.setattr(sft.Sft, "draw", lambda *a: 1 / 0)  # nor does a picture
    words = (
        f"--model_name_or_path builtin --dataset_name {run}/chats.jsonl --max_steps 1 --use_cpu true --report_to none"
    )
    words += " --save_strategy no --push_to_hub true --hub_model_id me/mine --hub_private_repo true "
    words += f"--output_dir {tmp_path}/x"
    with pytest.raises(PushError, match=f"hf-objectives push {tmp_path}/x --hub_model_id me/mine --private true"):
        sft.main([*words.split(), "--max_length", "64"])
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert {
        "model.safetensors",
        "README.md",
        "results.json",
        "evaluated.json",
    } <= names and "training_curves.png" not in names


def changed(run, tmp_path, **settings):
    """A copy of the run whose settings a stranger has changed."""
    folder = copy(run, tmp_path)
    facts = read_evaluated(folder)
    facts["settings"] |= settings
    (folder / "evaluated.json").write_text(json.dumps(facts))
    return folder


def test_settings_of_a_stranger_neither_log_in_nor_run_code_nor_choose_files(hub, run, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    asked = {
        "push_to_hub": True,
        "hub_model_id": "me/theirs",
        "attn_implementation": "their/kernels",
        "use_kernels": True,
    }
    asked |= {
        "trust_remote_code": True,
        "report_to": "all",
        "eval_tasks": "a",
        "eval_tasks_folder": str(tmp_path / "tasks"),
    }
    loaded = []
    usual = sft.load_model

    def load_model(config, **loading):
        loaded.append((config.attn_implementation, config.use_kernels, loading["trust_remote_code"]))
        return usual(config, **loading)

    monkeypatch.setattr("hf_objectives.recipes.sft.load_model", load_model)
    checks = verify(str(changed(run, tmp_path, **asked)), data_dir=str(run))
    assert loaded == [(None, False, False)] and not hub.repos and all(check.holds for check in checks)
    verify(str(tmp_path / "copy"), data_dir=str(run), trust_remote_code=True)
    assert loaded[1] == (None, False, True)


@pytest.mark.parametrize("value", [["64", "--trust_remote_code=true"], "64 --trust_remote_code=true"])
def test_a_value_cannot_pose_as_another_option(run, tmp_path, monkeypatch, value):
    def load_model(config, **loading):
        raise AssertionError("it was read")

    monkeypatch.setattr("hf_objectives.recipes.sft.load_model", load_model)
    with pytest.raises(ConfigError, match="max_length"):
        verify(str(changed(run, tmp_path, max_length=value)), data_dir=str(run))


def test_a_template_that_was_named_by_its_file_is_that_of_the_model(run, tmp_path):
    assert all(check.holds for check in checked(run, changed(run, tmp_path, chat_template="mine.jinja")).values())


def test_a_figure_that_cannot_be_measured_again_does_not_hold(run, tmp_path):
    folder = copy(run, tmp_path)
    facts = read_evaluated(folder)
    facts["figures"]["eval_mine_accuracy"] = 0.99
    (folder / "evaluated.json").write_text(json.dumps(facts))
    wrong = [check for check in checked(run, folder).values() if not check.holds]
    assert [(check.name, check.found) for check in wrong] == [("eval_mine_accuracy", "not measured")]


def test_a_figure_that_was_changed_in_the_table_of_the_card_alone(run, tmp_path):
    folder = copy(run, tmp_path)
    card = (folder / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("| perplexity |"))
    cells = line.split(" | ")
    (folder / "README.md").write_text(card.replace(line, " | ".join([*cells[:-1], "1.5 |"])))
    wrong = [check for check in checked(run, folder).values() if not check.holds]
    assert [(check.name, check.published) for check in wrong] == [("card's table, eval_perplexity", "1.5")]
    assert cells[-1] == f"{read_evaluated(folder)['figures']['eval_perplexity']:.4g} |"


def test_an_adapter(run, tmp_path):
    save_small_model(tmp_path)
    words = (
        "--max_steps 3 --logging_steps 1 --eval_strategy no --save_strategy no --use_cpu true --report_to none --seed 5"
    )
    words += f" --model_name_or_path {tmp_path}/model --dataset_name {run}/chats.jsonl --eval_share 0.3 --max_length 64"
    words += f" --use_peft true --lora_r 4 --learning_rate 1e-2 --output_dir {tmp_path}/lora"
    sft.main(words.split())
    checks = checked(run, tmp_path / "lora")
    assert all(check.holds for check in checks.values()), checks
    assert {"file adapter_model.safetensors", "eval_perplexity"} <= {*checks}
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: weight * 2 for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    wrong = {name for name, check in checked(run, tmp_path / "lora").items() if not check.holds}
    assert {"file adapter_model.safetensors", "eval_perplexity"} <= wrong
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base model, so that nobody can load the adapter"):
        checked(run, tmp_path / "lora")
