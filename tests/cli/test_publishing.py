"""hf-objectives push and verify, as a user types them."""

from __future__ import annotations

import json
import sys

import pytest

from hf_objectives.cli.main import main
from hf_objectives.recipes import Check


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "mine"


def test_push(hub, folder, capsys):
    main(["push", str(folder), "--private", "true"])
    assert "Pushed to http" in capsys.readouterr().out and hub.repos["me/mine"].private
    main(["push", str(folder), "--hub_model_id", "me/other", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == {"url": f"{hub.url}/me/other", "files": ["model.safetensors"]}


def test_a_push_that_fails_has_an_exit_code_of_its_own(hub, folder, capsys):
    hub.fail = ("commit", 403)
    with pytest.raises(SystemExit) as ended:
        main(["push", str(folder)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        ended.value.code == 3
        and said.startswith("PushError: ")
        and f"try again with: hf-objectives push {folder}" in said
    )


def test_push_of_something_else(tmp_path, refused):
    with refused("ConfigError: .* holds no model.safetensors"):
        main(["push", str(tmp_path)])


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_verify(monkeypatch, capsys, holds, code):
    checks = [Check("eval_loss", 1.5, 1.5, True), Check("eval_perplexity", 4.0, 5.0, holds)]
    given = {}

    def verify(where, **options):
        given.update(options, where=where)
        return checks

    monkeypatch.setattr(sys.modules["hf_objectives.cli.publishing"], "verify_figures", verify)
    for words in ([], ["--json"]):
        try:
            main(["verify", "me/mine", "--data_dir", "d", *words])
            ended = 0
        except SystemExit as stop:
            ended = stop.code
        said = capsys.readouterr().out
        assert ended == code and given == {
            **{"where": "me/mine", "revision": None, "data_dir": "d", "use_cpu": None, "trust_remote_code": False}
        }
        if words:
            assert [check["holds"] for check in json.loads(said)] == [True, holds]
        else:
            assert ("2 of 2 hold" if holds else "1 of 2 hold, 1 do not") in said and "eval_perplexity" in said
