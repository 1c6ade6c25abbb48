"""The loss of each document of a batch, against one document at a time."""

from __future__ import annotations

import pytest
import torch

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.evaluation import document_losses, documents
from hf_objectives.labels import encode_row
from tests.support.language_models import TOKENIZER, chats, llama, nats_of


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_documents_one_at_a_time(packed, together):
    model, rows = llama(), [{**row, "row": i} for i, row in enumerate(chats(8))]
    collate = (
        DataCollatorWithEosPacking(TOKENIZER, max_length=200, return_source=True)
        if packed
        else DataCollatorForAssistantOnlyLM(TOKENIZER, return_source=True)
    )
    found = {document.row: document for document in document_losses(model, collate(rows), together=together)}
    assert found.pop(None, None) is None or packed  # the padding of packed rows
    assert found.keys() == set(range(8))
    for i, row in enumerate(rows):
        encoded = encode_row(TOKENIZER, row)
        nats = nats_of(model, encoded["input_ids"])
        trained = [nats[k - 1] for k in range(1, len(nats) + 1) if encoded["labels"][k] != -100]
        document = found[i]
        assert document.nats == pytest.approx(sum(trained), rel=1e-6) and document.tokens == len(trained)
        assert document.source == row["source"]
        assert document.ids.tolist() == encoded["input_ids"] and document.labels.tolist() == encoded["labels"]
        assert document.end - document.begin >= len(encoded["input_ids"])


def test_documents_that_only_their_lengths_tell_apart():
    inputs = {"input_ids": torch.zeros(2, 6), "cu_seq_lens_q": torch.tensor([0, 4, 6, 9, 12])}
    assert [documents._starts(inputs, i) for i in range(2)] == [[0, 4], [0, 3]]


def test_rows_are_taken_a_few_at_a_time(monkeypatch):
    model, batch = llama(), DataCollatorForAssistantOnlyLM(TOKENIZER)(chats(5))
    together = [document.nats for document in document_losses(model, batch, together=True)]
    monkeypatch.setattr(documents, "_TOKENS", 2 * batch["input_ids"].shape[1])
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    apart = [document.nats for document in document_losses(model, batch)]
    assert seen == [2, 2, 1] and apart == pytest.approx(together, abs=1e-5)
