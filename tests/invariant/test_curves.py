"""Losses, perplexities and masks of five architectures: those of independent judges, and those that were stored.

A change of any dependency that moves a number fails here, and says which number and which versions.
"""

from __future__ import annotations

import json
import math
from importlib.metadata import version

import pytest
import torch

from hf_objectives import __version__, compute_perplexity
from hf_objectives.labels import encode_row
from tests.support import recorded_curves as curves
from tests.support.language_models import nats_of

pytestmark = pytest.mark.long
KINDS = sorted(curves.ARCHITECTURES)


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads((curves.CURVES / f"{__version__}.json").read_text())


def moved(stored: dict) -> str:
    """What else is installed than when the numbers were stored."""
    now = {name: version(name) for name in curves.PACKAGES}
    changed = [
        f"{name} {stored['versions'][name]} -> {now[name]}" for name in now if stored["versions"][name] != now[name]
    ]
    return f"packages that changed: {', '.join(changed) or 'none'}"


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_that_were_stored(kind, stored):
    found, known = curves.recorded(kind), stored["curves"][kind]
    assert found.keys() == known.keys()
    for name in known:
        assert found[name] == pytest.approx(known[name], rel=2e-5), f"{name} of {kind} moved; {moved(stored)}"


def test_masks_are_those_that_were_stored(stored):
    assert curves.masks() == stored["masks"], moved(stored)


def chat_rows() -> list[tuple[list[int], list[int]]]:
    rows = [encode_row(curves.TOKENIZER, chat) for chat in curves.CHATS]
    return [(list(row["input_ids"]), list(row["labels"])) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_is_a_plain_loop_over_single_rows(kind, tmp_path):
    model, rows, losses = curves.model(kind), chat_rows(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(10):
        batch = rows[4 * step : 4 * step + 4]
        trained = sum(label != -100 for _, labels in batch for label in labels[1:])
        total = 0.0
        for ids, labels in batch:
            log_p = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            total = total - sum(log_p[i - 1, label] for i, label in enumerate(labels) if i and label != -100)
        (total / trained).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / trained)
    trainer = curves.fine_tuning(kind, str(tmp_path))
    assert curves.losses(trainer) == pytest.approx(losses, rel=2e-5)
    nats = [
        loss
        for ids, labels in rows[40:]
        for loss, label in zip(nats_of(trainer.model.eval(), ids), labels[1:], strict=True)
        if label != -100
    ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)


@pytest.mark.parametrize("stage", [curves.preferences, curves.rewards])
@pytest.mark.parametrize("kind", KINDS)
def test_preference_pairs_have_the_losses_of_trl(kind, stage, tmp_path):
    own, theirs = (curves.losses(stage(kind, str(tmp_path), theirs=theirs)) for theirs in (False, True))
    assert own == pytest.approx(theirs, rel=2e-5) and len(own) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_a_loop_in_float64(kind):
    model = curves.model(kind).eval()
    nats = [loss for text in curves.TEXTS for loss in nats_of(model, curves.TOKENIZER(text)["input_ids"])]
    found = compute_perplexity(model, curves.TOKENIZER, curves.TEXTS)
    assert found.num_tokens == len(nats)
    assert math.log(found.perplexity) == pytest.approx(sum(nats) / len(nats), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_lm_eval(kind):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'hf-objectives[judges]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = curves.model(kind).eval(), curves.TOKENIZER
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", max_length=512)
    documents = [tokenizer(text)["input_ids"] for text in curves.TEXTS]
    asked = [
        Instance("loglikelihood", {}, (tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:])), 0) for ids in documents
    ]
    judged = -sum(score for score, _ in judge.loglikelihood(asked, disable_tqdm=True))
    assert compute_perplexity(model, tokenizer, curves.TEXTS).nll == pytest.approx(judged, rel=1e-6)
