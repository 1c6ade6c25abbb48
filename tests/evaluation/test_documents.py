"""The loss of each document of a batch, against one document at a time."""

from __future__ import annotations

import pytest

from hf_objectives.collators import DataCollatorForAssistantOnlyLM, DataCollatorWithEosPacking
from hf_objectives.evaluation import document_losses
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
