"""hf-objectives perplexity, as a user types it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from hf_objectives import demo
from hf_objectives.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), demo.build_tokenizer()
    demo.build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_figures_of_all_texts_and_of_each_source(model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = {"a": ["Name the month 1 before June.", "Sort 321."], "b": ["Reverse 12."]}
    for name, lines in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    sources = json.dumps({name: f"{tmp_path}/{name}.jsonl" for name in texts})
    words = ["perplexity", "--model", str(model), "--sources", sources]
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    for name, lines in texts.items():
        nats, tokens = 0.0, 0
        for line in lines:
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            with torch.no_grad():
                logs = net(ids).logits[0, :-1].double().log_softmax(-1)
            nats -= logs.gather(1, ids[0, 1:, None]).sum().item()
            tokens += ids.shape[1] - 1
        group = found["groups"][name]
        assert group["num_tokens"] == tokens and group["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    main(words)
    said = capsys.readouterr().out
    assert "bits per byte" in said and f"{found['perplexity']:.6g}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "x.jsonl"], "ConfigError: model is missing"),
        (["--model", "x", "--dtype", "fp4"], "dtype is 'fp4'; expected one of float32, bfloat16"),
        (["--model", "nowhere", "--dataset_name", "x.jsonl"], "ConfigError: no model can be loaded from nowhere: "),
    ],
)
def test_what_cannot_be_measured(words, message, refused):
    with refused(message):
        main(["perplexity", *words])
