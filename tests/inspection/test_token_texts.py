"""Texts of tokens and of runs: nothing lost at the seams, whatever the tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_objectives.diagnostics.batch_record import marked_text
from hf_objectives.inspection.label_preview import save_label_preview
from hf_objectives.inspection.token_texts import TokenTexts, marked_runs
from hf_objectives.recipes.preview import highlight
from tests.support import chat_corpus as corpus


class Letters:
    """A tokenizer without a fast backend: token 0 is a."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """Words with the space before them, and bytes, as Llama 2 and Mistral decode them: a text's first space is not said."""
    words = ["<unk>", "▁we", "▁say", "▁yes", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(list(spaces))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_that_share_a_character_stay_together():
    tokenizer = corpus.byte_tokenizer()
    ids = np.array(tokenizer("a👩é")["input_ids"], np.int32)
    tokens = TokenTexts(tokenizer).tokens(ids, ids)
    assert [(token.text, len(token.ids)) for token in tokens] == [("a", 1), ("👩", 4), ("é", 2)]
    broken = TokenTexts(tokenizer).tokens(ids[:3], ids[:3])  # a row that ends within a character
    assert [len(token.ids) for token in broken] == [1, 2] and broken[1].text == "\ufffd"


def test_a_run_keeps_the_space_before_it(metaspace):
    ids, labels = [1, 2, 3], [-100, -100, 3]  # we say yes
    assert metaspace.decode(ids) == "we say yes"
    assert marked_runs(metaspace, ids, labels) == [("we say", False), (" yes", True)]
    assert marked_text(metaspace, ids, labels) == "we say⟦ yes⟧"
    assert highlight(metaspace, ids, labels, brackets=True).plain == "we say⟦ yes⟧"


def test_a_character_over_two_runs_is_whole(metaspace):
    ids = [1, *(4 + byte for byte in "日".encode())]
    assert marked_runs(metaspace, ids, [-100, -100, -100, ids[3]]) == [("we", False), ("日", True)]
    tokenizer = corpus.byte_tokenizer()
    ids = tokenizer("a👩b")["input_ids"]
    assert marked_runs(tokenizer, ids, [*([-100] * 3), *ids[3:]]) == [("a", False), ("👩b", True)]


def test_a_replacement_character_of_the_text_is_a_character(metaspace):
    tokenizer = corpus.byte_tokenizer()
    ids = tokenizer("a\ufffd<|im_end|>👩")["input_ids"]
    tokens = TokenTexts(tokenizer).tokens(ids, [-100] * 4 + ids[4:])
    assert [(token.text, len(token.ids), token.trained) for token in tokens] == [
        ("a", 1, False),
        ("\ufffd", 3, False),
        ("<|im_end|>", 1, True),
        ("👩", 4, True),
    ]
    broken = [1, 4 + "日".encode()[0], 2]  # one byte of three
    assert marked_runs(metaspace, broken, [-100, -100, 2]) == [("we\ufffd", False), (" say", True)]


def test_the_preview_of_labels_loses_no_space(metaspace, tmp_path):
    path = save_label_preview(
        metaspace, [{"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}], tmp_path / "labels.json"
    )
    assert json.loads(path.read_text())[0]["pieces"] == [["we", False], [" say", True], [" yes", False]]


def test_a_tokenizer_without_a_fast_backend():
    assert marked_runs(Letters(), [0, 1, 2], [-100, 1, 2]) == [("a", False), ("bc", True)]
    assert marked_runs(Letters(), [], []) == []
