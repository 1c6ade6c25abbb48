"""A card that passes the Hub's own reader, and holds measured facts alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_objectives.inspection import Finding
from hf_objectives.publishing import CardFacts, card_figures, card_table, settings_to_show, write_card

RESULTS = {
    "before": {"eval_perplexity": 10.0, "eval_num_tokens": 7},
    "after": {"eval_perplexity": 5.0, "eval_num_tokens": 7, "eval_web_bits_per_byte": 1.25, "eval_runtime": 3.0},
    "ledger": {"chats": {"rows_in": 3, "tokens_in": 30, "trained": 9, "dropped_tokens": {"too long": 4}}},
    "mixture": {
        "unit": "tokens",
        "sources": [{"name": "web", "asked": 0.5, "share": 0.25, "tokens": 8, "epochs": 1.5}],
    },
}


def card(folder, base_model=None, **facts):
    facts = {"objective": "sft", "recipe": "sft", "results": RESULTS, **facts}
    return ModelCard.load(write_card(folder, CardFacts(base_model=base_model, **facts)))


def test_figures_ledger_and_mixture(tmp_path):
    read = card(tmp_path, "org/base")
    assert "| perplexity | 7 | 10 | 5 |" in read.text and "| chats | 3 | 30 | 9 | 4 |" in read.text
    assert "| web | 50.00% | 25.00% | 8 | 1.50 |" in read.text and "| web_bits_per_byte |  | - | 1.25 |" in read.text
    assert card_figures(tmp_path / "README.md") == {"eval_perplexity": 5.0, "eval_web_bits_per_byte": 1.25}


@pytest.mark.parametrize(
    ("adapter", "relation", "library"), [(False, "finetune", "transformers"), (True, "adapter", "peft")]
)
def test_metadata(tmp_path, adapter, relation, library):
    if adapter:
        (tmp_path / "adapter_config.json").write_text("{}")
    data = card(tmp_path, "org/base", sources={"web": "org/set", "own": "chats.jsonl", "demo": "builtin"}).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", relation, library)
    assert data.datasets == ["org/set"] and data.license is None and data.pipeline_tag == "text-generation"
    web = next(result for result in data.eval_results if result.metric_type == "bits_per_byte")
    assert (web.dataset_type, web.dataset_name, web.metric_value) == ("org/set", "held-out rows, web", 1.25)


def test_subset_and_revision_of_a_data_set(tmp_path):
    read = card(tmp_path, sources={"web": "org/set"}, parts={"web": {"config": "en", "revision": "abc"}})
    assert "- web: public data set `org/set`, config `en`, revision `abc`" in read.text
    web = next(result for result in read.data.eval_results if result.metric_type == "bits_per_byte")
    assert (web.dataset_type, web.dataset_config, web.dataset_revision) == ("org/set", "en", "abc")


def test_licence_and_language_are_those_of_a_local_base_which_is_not_called_a_hub_id(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# base\n")
    read = card(tmp_path, str(base))
    assert (read.data.license, read.data.language, read.data.base_model) == ("mit", "en", None)
    assert str(tmp_path) not in read.text


def test_how_it_was_trained(tmp_path):
    settings = {"dataset_name": "org/set", "learning_rate": 1e-4}
    finding = Finding("plateau", 30, "warning", "flat for 90 steps", "raise the rate")
    text = card(tmp_path, settings=settings, labels="Trained is every token.", findings=[finding]).text
    assert "hf-objectives sft --config training.yaml" in text and "Trained is every token." in text
    assert "- warning, plateau," in text and "flat for 90 steps" in text
    assert yaml.safe_load((tmp_path / "training.yaml").read_text()) == settings
    assert "not judged, too short" in card(tmp_path, findings="too short").text
    assert "nothing was found" in card(tmp_path).text


def test_settings_show_no_secret_and_no_folder():
    given = {
        **{"hub_token": "hf_x", "hub_model_id": "me/x", "push_to_hub": True, "output_dir": "/srv/me/runs", "seed": 3},
        **{"dataset_name": "/srv/me/chats.jsonl", "sources": '{"a": {"path": "/data/a.json", "weight": 1}}'},
        "deepspeed": {"file": "/etc/x"},
    }
    expected = {"seed": 3, "dataset_name": "chats.jsonl", "sources": {"a": {"path": "a.json", "weight": 1}}}
    assert settings_to_show(given) == {**expected, "deepspeed": {"file": "x"}}


def test_settings_are_scrubbed_and_tokens_of_a_vocabulary_stay():
    secret = "hf_" + "A" * 34
    given = {
        **{"eos_token": "<|end|>", "pad_token": "<pad>", "wandb_api_key": "k1", "note": f"with {secret}"},
        "dataset_name": "https://me:pw1@host/rows.jsonl?X-Amz-Signature=sig1",
        "sources": '{"a": {"path": "https://me:pw1@host/a.jsonl?sig=sig1", "token": "k1"}}',
        "data_files": ["/srv/me/a.json", "b.json"],
    }
    shown = settings_to_show(given)
    assert (
        shown["eos_token"] == "<|end|>"
        and shown["pad_token"] == "<pad>"
        and shown["data_files"] == ["a.json", "b.json"]
    )
    assert shown["dataset_name"] == "https://host/rows.jsonl" and shown["sources"] == {
        "a": {"path": "https://host/a.jsonl"}
    }
    assert not [word for word in (secret, "pw1", "sig1", "k1", "/srv") if word in str(shown)]


def test_the_table_of_a_card_is_read_back(tmp_path):
    card(tmp_path)
    assert card_table(tmp_path / "README.md") == {"eval_perplexity": "5", "eval_web_bits_per_byte": "1.25"}
    (tmp_path / "README.md").write_text("# mine\n")
    assert card_table(tmp_path / "README.md") == {}


def test_a_card_is_utf_8_whatever_the_machine_writes(tmp_path, monkeypatch):
    usual, encodings = Path.write_text, []

    def write_text(path, text, encoding="cp1252", **options):
        encodings.append(encoding)
        return usual(path, text, encoding=encoding, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    (tmp_path / "模型").mkdir()
    assert "# 模型" in card(tmp_path / "模型").text and {*encodings} == {"utf-8"}
