"""The first look marks what is trained."""

from __future__ import annotations

import pytest
from rich.console import Console

from hf_objectives.errors import StopTokenError
from hf_objectives.labels.ledger import Ledger
from hf_objectives.labels.rows import EncodingConfig, RowEncoder
from hf_objectives.recipes.preview import check_stops, highlight, print_preview
from tests.support.chat_corpus import PLAIN, byte_tokenizer

TOKENIZER = byte_tokenizer()


def rows():
    ledger = Ledger()
    labelled, *_ = RowEncoder(TOKENIZER, EncodingConfig()).encode([{"messages": PLAIN}], source="chats", ledger=ledger)
    return [{**labelled.row(0), "source": "chats"}], ledger


def test_trained_runs_are_styled_and_bracketed():
    (row,), _ = rows()
    text = highlight(TOKENIZER, row["input_ids"], row["labels"])
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == ["It is four.<|im_end|>", "That makes six.<|im_end|>"]
    assert text.plain == TOKENIZER.decode(row["input_ids"])
    assert "⟦It is four.<|im_end|>⟧\n" in highlight(TOKENIZER, row["input_ids"], row["labels"], brackets=True).plain


def test_a_text_does_not_steer_the_terminal():
    ids = TOKENIZER("a\x1b[31m b\x9b31m")["input_ids"]
    encoded = [{"input_ids": ids, "labels": ids, "source": "c\x1bd"}]
    console = Console(record=True, width=200, force_terminal=False)
    print_preview(TOKENIZER, encoded, Ledger(), console)
    printed = console.export_text()
    assert "[c␛d] ⟦a␛[31m b" in printed and "\x1b" not in printed and "\x9b" not in printed


def test_preview_prints_rows_share_and_ledger():
    encoded, ledger = rows()
    console = Console(record=True, width=200, force_terminal=False)
    print_preview(TOKENIZER, encoded, ledger, console)
    printed = console.export_text()
    trained = sum(label != -100 for label in encoded[0]["labels"])
    assert f"({trained} of {len(encoded[0]['labels'])})" in printed
    assert "[chats]" in printed and "⟦That makes six.<|im_end|>⟧" in printed and "chats: 1 rows" in printed


def test_preview_says_whether_turns_are_taught_to_stop():
    encoded, ledger = rows()
    console = Console(record=True, width=200, force_terminal=False)
    print_preview(TOKENIZER, encoded, ledger, console)
    # The first turn's stop alone: GLM prints none after the last turn.
    unstopped = {**encoded[0], "input_ids": encoded[0]["input_ids"][:-2], "labels": encoded[0]["labels"][:-2]}
    print_preview(TOKENIZER, [unstopped, unstopped, {"input_ids": [5] * 4, "labels": [-100, 5, 5, 5]}], ledger, console)
    printed = console.export_text()
    assert "2 of 2 trained turns in a sample end with a control token <|im_end|>\n" in printed
    assert "2 of 5 trained turns in a sample end with a control token <|im_end|>: the model is hardly taught" in printed


def test_a_sample_whose_turns_do_not_stop_stops_the_run():
    encoded, _ = rows()
    check_stops(TOKENIZER, encoded, allow_no_stop=False)
    endless = [{"input_ids": [5] * 4, "labels": [-100, 5, 5, 5]}] * 3
    with pytest.raises(
        StopTokenError, match="0 of 3 trained turns in a sample.*chat_template that closes.*allow_no_stop"
    ):
        check_stops(TOKENIZER, endless, allow_no_stop=False)
    check_stops(TOKENIZER, endless, allow_no_stop=True)
