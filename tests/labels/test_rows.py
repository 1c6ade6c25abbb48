"""Rows to ids and labels: over-length policies, expansion of turns, and a ledger that adds up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConversationError, FormatError
from hf_objectives.labels.batches import BatchEncoder
from hf_objectives.labels.config import EncodingConfig
from hf_objectives.labels.ledger import CUT, TOO_LONG, UNSUPERVISED, Ledger
from hf_objectives.labels.rows import RowEncoder, encode_row
from tests.support.chat_corpus import PLAIN, REASONING, byte_tokenizer, template, trained_runs, trained_text, with_bos

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


def encode(rows, **options):
    ledger = Ledger()
    labelled, sources, origins = RowEncoder(TOKENIZER, EncodingConfig(**options)).encode(
        rows, source="s", ledger=ledger
    )
    return [labelled.row(i) for i in range(len(sources))], sources, origins, ledger


@pytest.mark.parametrize("splits_documents", [False, True])
def test_each_of_several_documents_has_its_own_begin_and_end(splits_documents):
    tokenizer = with_bos(byte_tokenizer())
    bos, (a, b, c) = tokenizer.bos_token_id, tokenizer.encode("abc", add_special_tokens=False)
    rows = [{"text": "ab"}, {"text": "c"}, {"text": "b"}]
    encoder = BatchEncoder(tokenizer, EncodingConfig(splits_documents=splits_documents))  # True: all in arrays
    table, _ = encoder.encode(rows, source="s", numbers=range(3))
    assert table["input_ids"].to_pylist() == [[bos, a, b, EOS], [bos, c, EOS], [bos, b, EOS]]
    labelled, *_ = RowEncoder(tokenizer, EncodingConfig()).encode(rows, source="s", ledger=Ledger())
    assert [labelled.row(i)["labels"] for i in range(3)] == [[-100, a, b, EOS], [-100, c, EOS], [-100, b, EOS]]
    asked = [{"prompt": "a", "completion": "b"}, {"prompt": "bc", "completion": "a"}]
    labelled, *_ = RowEncoder(tokenizer, EncodingConfig()).encode(asked, source="s", ledger=Ledger())
    assert [labelled.row(i) for i in range(2)] == [
        {"input_ids": [bos, a, b, EOS], "labels": [-100, -100, b, EOS]},
        {"input_ids": [bos, b, c, a, EOS], "labels": [-100, -100, -100, a, EOS]},
    ]


@pytest.mark.parametrize("ids", [[5, 70_000, 7], [-1, 3]])
def test_ids_of_another_tokenizer_are_named(ids):
    with pytest.raises(FormatError, match=r"source 's', row 1: id -?\d+ is not one of the tokenizer's, 0 to \d+"):
        encode([{"input_ids": [1, 2]}, {"input_ids": ids}])
    with pytest.raises(FormatError, match="row 0: label 70000 is not one"):
        encode([{"input_ids": [1, 2], "labels": [-100, 70_000]}])


def test_drop_leaves_long_rows_out_and_books_them():
    rows = [{"messages": PLAIN}, {"messages": PLAIN[:2]}]
    whole, *_ = encode(rows)
    sizes = [len(row["input_ids"]) for row in whole]
    kept, sources, origins, ledger = encode(rows, max_length=sizes[1])
    assert kept == whole[1:] and sources == ["s"] and origins == [1]
    account = ledger["s"]
    assert (account.rows_in, account.rows_out, account.tokens_in) == (2, 1, sum(sizes))
    assert account.dropped_tokens == {TOO_LONG: sizes[0]} and account.dropped_examples == {TOO_LONG: [0]}
    assert account.balance() == 0


def test_cut_keeps_the_beginning_and_trains_no_turn_that_it_goes_through():
    rows = [{"messages": PLAIN}, {"messages": PLAIN[:2]}]
    (long, short), *_ = encode(rows)
    limit = len(short["input_ids"]) + 20
    kept, _, _, ledger = encode(rows, max_length=limit, overlength="cut")
    assert [len(row["input_ids"]) for row in kept] == [limit, len(short["input_ids"])]
    assert trained_runs(TOKENIZER, kept[0]) == ["It is four.<|im_end|>"]
    account = ledger["s"]
    assert account.dropped_tokens == {CUT: len(long["input_ids"]) - limit} and account.balance() == 0


def test_cut_that_leaves_nothing_drops_the_row():
    kept, _, _, ledger = encode([{"messages": PLAIN[:2]}], max_length=30, overlength="cut")
    assert kept == [] and ledger["s"].dropped_rows == {UNSUPERVISED: 1} and ledger["s"].balance() == 0


def test_split_turns_makes_rows_of_whole_turns_behind_the_system_message():
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": [system, *PLAIN]}]
    (first,), *_ = encode([{"messages": [system, *PLAIN[:2]]}])
    (second,), *_ = encode([{"messages": [system, *PLAIN[2:]]}])
    limit = max(len(first["input_ids"]), len(second["input_ids"]))
    kept, _, origins, ledger = encode(rows, max_length=limit, overlength="split_turns")
    assert kept == [first, second] and origins == [0, 0]
    assert ledger["s"].rows_in == 1 and ledger["s"].rows_out == 2 and ledger["s"].balance() == 0


def test_expand_turns_gives_each_answer_its_prompt_of_inference():
    tokenizer = byte_tokenizer(template("qwen3"))
    encoder = RowEncoder(tokenizer, EncodingConfig(expand_turns=True))
    labelled, *_ = encoder.encode([{"messages": REASONING}], source="s", ledger=Ledger())
    rows = [labelled.row(0), labelled.row(1)]
    assert [trained_text(tokenizer, row) for row in rows] == [
        "<think>\ntwo and two\n</think>\n\nIt is four.<|im_end|>",
        "<think>\nthree plus three\n</think>\n\nThat makes six.<|im_end|>",
    ]
    for row, k in zip(rows, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(REASONING[:k], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt) and row["labels"][len(prompt)] != -100


def test_a_long_expanded_conversation_is_split_once():
    """Each turn is trained once, whether it is its own row or was split off a longer one."""
    rows = [{"messages": [*PLAIN, *PLAIN[:2]]}]
    whole, *_ = encode(rows, expand_turns=True)
    limit = len(whole[1]["input_ids"])
    kept, _, _, ledger = encode(rows, expand_turns=True, max_length=limit, overlength="split_turns")
    runs = [run for row in kept for run in trained_runs(TOKENIZER, row)]
    assert runs == [run for row in whole for run in trained_runs(TOKENIZER, row)]
    assert ledger["s"].balance() == 0


def test_a_long_conversation_without_an_answer_is_counted_not_lost():
    unanswered = {"messages": [{"role": "user", "content": "a" * 80}]}
    kept, _, _, ledger = encode([unanswered, {"messages": PLAIN[:2]}], max_length=70, overlength="split_turns")
    assert len(kept) == 1 and ledger["s"].dropped_rows == {TOO_LONG: 1} and ledger["s"].balance() == 0


def test_every_row_that_cannot_be_used_is_counted_in_order():
    rows = [{"text": "a"}, {"text": None}, {"text": "half \ud800"}, {"text": 7}]
    ledger = Ledger()
    encoder = RowEncoder(TOKENIZER, EncodingConfig())
    _, _, kept = encoder.encode(rows, source="s", ledger=ledger, skip=True)
    assert kept == [0]
    assert ledger["s"].dropped_examples == {"FormatError, skipped": [1, 2, 3]}
    with pytest.raises(FormatError, match="source 'mine', row 5: half of a surrogate pair"):
        encode_row(TOKENIZER, rows[2], source="mine", row_index=5)


def test_rows_of_bad_ids_are_refused_one_by_one():
    ledger = Ledger()
    encoder = RowEncoder(TOKENIZER, EncodingConfig())
    labelled, _, kept = encoder.encode(
        [{"input_ids": [5, 70_000]}, {"input_ids": [5, 6]}], source="s", ledger=ledger, skip=True
    )
    assert kept == [1] and labelled.ids.tolist() == [5, 6] and ledger["s"].dropped_rows == {"FormatError, skipped": 1}


def test_mixed_formats_name_the_row():
    with pytest.raises(FormatError, match="source 's', row 1: a row in text format among rows in messages format"):
        encode([{"messages": PLAIN}, {"text": "x"}])


def test_rows_name_their_own_source():
    _, sources, _, ledger = encode([{"messages": PLAIN, "source": "a"}, {"messages": PLAIN}])
    assert sources == ["a", "s"] and set(ledger.accounts) == {"a", "s"}


@pytest.mark.parametrize("row", [{"text": "  "}, {"prompt": "q", "completion": ""}])
def test_empty_documents_are_dropped_and_booked(row):
    other = {"text": "ab"} if "text" in row else {"prompt": "q", "completion": "a"}
    kept, _, origins, ledger = encode([row, other])
    assert len(kept) == 1 and origins == [1]
    assert ledger["s"].dropped_rows == {UNSUPERVISED: 1} and ledger["s"].balance() == 0


def test_conversations_that_train_nothing_are_dropped_and_booked():
    silent = [PLAIN[0], {**PLAIN[1], "train": False}]
    kept, _, origins, ledger = encode([{"messages": silent}, {"messages": PLAIN[:1]}, {"messages": PLAIN}])
    assert len(kept) == 1 and origins == [2]
    assert ledger["s"].dropped_examples == {UNSUPERVISED: [0, 1]} and ledger["s"].balance() == 0


def test_rows_keep_the_number_that_they_carry():
    rows = [{"messages": PLAIN, "row": 17}, {"messages": [], "row": 40}]
    with pytest.raises(ConversationError, match="source 's', row 40: no messages"):
        encode(rows)
    assert encode(rows[:1])[2] == [17]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=30)
spoken = words.filter(str.strip)
chats = st.lists(spoken, min_size=2, max_size=8).map(
    lambda texts: {
        "messages": [
            {"role": "user" if i % 2 == 0 else "assistant", "content": text}
            for i, text in enumerate(texts[: len(texts) // 2 * 2])
        ]
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(chats, min_size=1, max_size=6), st.sampled_from(["drop", "cut", "split_turns"]), st.integers(20, 200))
def test_every_token_is_booked_and_no_cut_turn_is_trained(rows, overlength, max_length):
    kept, _, _, ledger = encode(rows, max_length=max_length, overlength=overlength)
    account = ledger["s"]
    assert account.balance() == 0 and account.rows_in == len(rows) and account.rows_out == len(kept)
    assert account.trained + account.masked == sum(len(row["input_ids"]) for row in kept)
    answers = {message["content"] + "<|im_end|>" for row in rows for message in row["messages"][1::2]}
    for row in kept:
        assert 0 < len(row["input_ids"]) <= max_length
        runs = trained_runs(TOKENIZER, row)
        assert runs and answers.issuperset(runs)
