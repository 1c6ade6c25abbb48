"""A push: what goes up, where to, and what a failure says and costs; against a server that speaks the Hub's protocol."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import ConfigError, PushError
from hf_objectives.publishing import files_to_push, push
from tests.support.hub_server import TOKEN, Repo

MARK = "secret-marked-text"


@pytest.fixture
def run(tmp_path):
    """The folder of a run: what is to go up, and secrets and texts everywhere else."""
    folder = tmp_path / "mine"
    wanted = ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md", "results.json")
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith("json") else f"fine {name}")
    others = [
        *(
            "training_args.bin",
            "labels.json",
            "environment.json",
            "trainer_state.json",
            "notes.txt",
            ".env",
            "model.bin",
        ),
        *(
            "prepared/0a/ready.json",
            "prepared/0a/data.arrow",
            "diagnostics/step_3/event.json",
            "runs/x/events.out",
        ),
        *("checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt", "ref/model.safetensors", "data.safetensors"),
    ]
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{MARK} {TOKEN}")
    (folder / "tokenizer_config.json").symlink_to(folder / "labels.json")
    return folder, sorted(wanted)


def test_what_is_needed_goes_up_and_nothing_that_happens_to_lie_there(hub, run):
    folder, wanted = run
    url = push(folder, "me/mine")
    assert url == f"{hub.url}/me/mine" and sorted(hub.repos["me/mine"].files["main"]) == wanted
    assert hub.repos["me/mine"].files["main"]["model.safetensors"] == b"fine model.safetensors"
    sent = b"".join(hub.bodies)
    assert MARK.encode() not in sent and TOKEN.encode() not in sent


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no model.safetensors and no adapter"):
        push(tmp_path, "me/mine")


@pytest.mark.parametrize("base", ["/srv/models/base", "builtin", None])
def test_an_adapter_of_a_base_that_nobody_else_can_load_is_refused(run, base):
    folder, wanted = run
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ConfigError, match="the adapter's base model is .*, which nobody else can load"):
        files_to_push(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert sorted(files_to_push(folder)) == sorted([*wanted, "adapter_config.json"])


def test_code_of_the_model_goes_up_where_its_config_names_it(run):
    folder, wanted = run
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_mine.Mine"}}')
    for name in ("modeling_mine.py", "other.py"):
        (folder / name).write_text("")
    assert sorted(files_to_push(folder)) == sorted([*wanted, "modeling_mine.py"])


@pytest.mark.parametrize("private", [True, False])
def test_private_and_branch(hub, run, private):
    push(run[0], None, private=private, revision="v2")  # named after its folder
    repo = hub.repos["me/mine"]
    assert repo.private is private and repo.files["main"] == {} and "model.safetensors" in repo.files["v2"]


def test_a_repository_that_is_there_keeps_what_it_is(hub, run):
    hub.repos["me/mine"] = Repo(private=True)
    push(run[0], "me/mine", private=False)
    assert hub.repos["me/mine"].private


STATUSES = (401, 403, 409, 413, 429, 500, 503, 0)
PLACES = [*((status, "/commit/") for status in STATUSES), (401, "repos/create"), (0, "repos/create"), (404, "/branch/")]


@pytest.mark.parametrize(("status", "where"), [*PLACES, (429, "preupload"), (403, "PUT /lfs"), (0, "PUT /lfs")])
def test_a_failure_is_one_line_with_the_command_that_tries_again(hub, run, status, where):
    folder = run[0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail = (where, status)
    with pytest.raises(PushError) as failed:
        push(folder, "me/mine", private=True, revision="v2", token=TOKEN)
    said = str(failed.value)
    assert f"hf-objectives push {folder} --hub_model_id me/mine --private true --revision v2" in said
    assert "\n" not in said and TOKEN not in said and (not status or str(status) in said)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail = None
    push(folder, "me/mine", private=True, revision="v2")
    assert "model.safetensors" in hub.repos["me/mine"].files["v2"] and hub.repos["me/mine"].private


@pytest.mark.parametrize(
    ("name", "words"),
    [("me/mi ne", "HFValidationError"), ("a/b/c", "HFValidationError"), ("me/" + "x" * 100, "HFValidationError")],
)
def test_a_name_that_is_not_allowed(hub, run, name, words):
    with pytest.raises(PushError, match=words):
        push(run[0], name)
    assert not hub.repos


def test_no_login_and_no_connection(hub, run, monkeypatch):
    with pytest.raises(PushError, match="401"):
        push(run[0], "me/mine", token="hf_" + "B" * 34)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(PushError, match="ConnectError"):
        push(run[0], "me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="OfflineModeIsEnabled"):
        push(run[0], "me/mine")
