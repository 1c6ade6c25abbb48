"""Pairs that are too long: what they lose, in which order, and what stays."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives import demo
from hf_objectives.errors import DataError
from hf_objectives.labels.pairs import encode_pair
from tests.support.chat_corpus import TOOL, TOOLS, byte_tokenizer, template, with_bos
from tests.support.preference_rows import CHOSEN, PROMPT, REJECTED, SYSTEM, said, user

OLD = [user("one " * 10), said("two " * 10), user("three " * 8), said("four " * 8)]


def test_the_oldest_turns_of_the_prompt_go_first_and_the_system_message_stays():
    tokenizer = byte_tokenizer()
    row = {"chosen": [SYSTEM, *OLD, *PROMPT, *CHOSEN], "rejected": [SYSTEM, *OLD, *PROMPT, *REJECTED]}
    without_first = {
        side: [SYSTEM, *OLD[2:], *PROMPT, *answer] for side, answer in (("chosen", CHOSEN), ("rejected", REJECTED))
    }
    shortest = {side: [SYSTEM, *PROMPT, *answer] for side, answer in (("chosen", CHOSEN), ("rejected", REJECTED))}
    sizes = []
    for kept in (row, without_first, shortest):
        whole = encode_pair(tokenizer, kept)
        size = len(whole["prompt_ids"]) + max(len(whole["chosen_ids"]), len(whole["rejected_ids"]))
        assert encode_pair(tokenizer, row, max_length=size) == whole
        sizes.append(size)
    assert sizes == sorted(set(sizes), reverse=True)
    assert encode_pair(tokenizer, row, max_length=sizes[0] - 1) == encode_pair(tokenizer, without_first)


def test_then_the_last_question_loses_its_beginning():
    tokenizer = byte_tokenizer()
    question = "abcdefghijklmnopqrstuvwxyz" * 4
    row = {"prompt": [SYSTEM, user(question)], "chosen": CHOSEN, "rejected": REJECTED}
    whole = encode_pair(tokenizer, row)
    size = len(whole["prompt_ids"]) + len(whole["rejected_ids"])
    pair = encode_pair(tokenizer, row, max_length=size - 30)  # a byte a token: 30 letters
    assert pair == encode_pair(tokenizer, {**row, "prompt": [SYSTEM, user(question[30:])]})


def test_content_in_blocks_loses_its_beginning_too():
    tokenizer = byte_tokenizer(template("qwen3_vl"))
    blocks = [{"type": "text", "text": text} for text in ("a" * 20, "b" * 60)]
    row = {"prompt": [{"role": "user", "content": blocks}], "chosen": CHOSEN, "rejected": REJECTED}
    whole = encode_pair(tokenizer, row)
    size = len(whole["prompt_ids"]) + len(whole["rejected_ids"])
    prompt = tokenizer.decode(encode_pair(tokenizer, row, max_length=size - 25)["prompt_ids"])
    assert "a" not in prompt.split("user\n")[1].split("<|im_end|>")[0] and prompt.count("b") == 55


def test_answers_are_cut_at_their_ends_and_stay_trained():
    tokenizer = byte_tokenizer()
    row = {"prompt": PROMPT, "chosen": [said("x" * 300)], "rejected": [said("y" * 10)]}
    whole = encode_pair(tokenizer, row)
    pair = encode_pair(tokenizer, row, max_length=150)
    # The prompt is under half of it, so that it stays whole.
    assert pair["prompt_ids"] == whole["prompt_ids"] and len(whole["prompt_ids"]) < 75
    left = 150 - len(whole["prompt_ids"])
    assert tokenizer.decode(pair["chosen_ids"]) == "x" * left and pair["chosen_mask"] == [1] * left
    assert pair["rejected_ids"] == whole["rejected_ids"] and pair["rejected_mask"] == whole["rejected_mask"]


def test_a_prompt_gives_way_to_half_of_the_length_only():
    tokenizer = byte_tokenizer()
    row = {"prompt": "p" * 100, "chosen": "x" * 90, "rejected": "y" * 5}
    pair = encode_pair(with_bos(tokenizer), row, max_length=60)
    assert tokenizer.decode(pair["prompt_ids"]) == "<|bos|>" + "p" * 29
    assert tokenizer.decode(pair["chosen_ids"]) == "x" * 30
    short = encode_pair(tokenizer, {**row, "chosen": "x" * 9}, max_length=60)
    assert tokenizer.decode(short["prompt_ids"]) == "<|bos|>" + "p" * 49  # 9 letters and EOS fit


@pytest.mark.parametrize(
    ("row", "limit", "words"),
    [
        ({"prompt": [{**SYSTEM, "content": "s" * 90}, *PROMPT], "chosen": CHOSEN, "rejected": REJECTED}, 64, "no room"),
        ({"prompt": PROMPT, "chosen": [*TOOL[1:4]], "rejected": CHOSEN, "tools": TOOLS}, 60, "no room|to train"),
        ({"prompt": "q", "chosen": "x" * 50 + "a", "rejected": "x" * 50 + "b"}, 20, "same first 19 tokens"),
    ],
)
def test_what_cannot_be_made_to_fit(row, limit, words):
    tokenizer = byte_tokenizer(template("qwen3") if row.get("tools") else byte_tokenizer().chat_template)
    with pytest.raises(DataError, match=f"row 3: .*({words})"):
        encode_pair(tokenizer, row, max_length=limit, row_index=3)


TINY = demo.build_tokenizer()


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("ab é", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=4),
    st.text("cd", min_size=1, max_size=40),
    st.text("ef", min_size=1, max_size=40),
    st.integers(40, 200),
    st.booleans(),
)
def test_a_cut_pair_fits_keeps_both_answers_and_ends_its_prompt_as_before(questions, chosen, rejected, limit, system):
    tokenizer, prompt = TINY, [SYSTEM] * system
    for question in questions:
        prompt += [user(question), said("ok")]
    row = {"prompt": prompt[:-1], "chosen": [said(chosen)], "rejected": [said(rejected)]}
    whole, pair = encode_pair(tokenizer, row), encode_pair(tokenizer, row, max_length=limit)
    begin = len(encode_pair(tokenizer, {**row, "prompt": [SYSTEM] * system + [user("x")]})["prompt_ids"])
    for side in ("chosen", "rejected"):
        assert len(pair["prompt_ids"]) + len(pair[f"{side}_ids"]) <= limit
        assert any(pair[f"{side}_mask"])
        assert whole[f"{side}_ids"][: len(pair[f"{side}_ids"])] == pair[f"{side}_ids"]
        if len(pair["prompt_ids"]) > max(begin, limit // 2):  # the prompt gives way before an answer does
            assert pair[f"{side}_ids"] == whole[f"{side}_ids"]
    assert pair["prompt_ids"][-4:] == whole["prompt_ids"][-4:]
