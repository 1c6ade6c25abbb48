"""Preference pairs: one prompt and two answers, whatever form the row, the template and the tokenizer have."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from hf_objectives import demo
from hf_objectives.errors import ConfigError, ConversationError, DataError, FormatError, NothingSupervisedError
from hf_objectives.labels.chat import encode_chat
from hf_objectives.labels.pair_prompt import join_prompt, split_texts
from hf_objectives.labels.pairs import encode_pair
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import CALL, ORIGINALS, TOOL, TOOLS, byte_tokenizer, template, with_bos


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
PROMPT = [user("What is 2+2?")]
CHOSEN, REJECTED = [said("It is four.")], [said("Five, I think.")]
TURNS = [user("Hi"), said("Hello!"), user("What is 2+2?")]


def parts(tokenizer, pair):
    return [tokenizer.decode(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


def masked(tokenizer, pair, side):
    return tokenizer.decode([i for i, on in zip(pair[f"{side}_ids"], pair[f"{side}_mask"], strict=True) if on])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": [], "chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
        {"chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
        {"prompt": "What is 2+2?", "chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
        {"prompt": PROMPT, "chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
        {"prompt": PROMPT, "chosen": CHOSEN[0], "rejected": REJECTED[0]},
        {"prompt": PROMPT, "chosen": "It is four.", "rejected": "Five, I think."},
        {
            "conversations": [{"from": "human", "value": "What is 2+2?"}],
            "chosen": {"from": "gpt", "value": "It is four."},
            "rejected": {"from": "gpt", "value": "Five, I think."},
        },
        {
            "chosen": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "It is four."}],
            "rejected": [{"from": "human", "value": "What is 2+2?"}, {"from": "gpt", "value": "Five, I think."}],
        },
        {"chosen": json.dumps(PROMPT + CHOSEN), "rejected": PROMPT + REJECTED, "prompt": []},
    ],
)
def test_one_pair_in_every_form(row, bos):
    tokenizer = with_bos(byte_tokenizer()) if bos else byte_tokenizer()
    if isinstance(row["chosen"], str) and row["chosen"].startswith("["):
        row = {**row, "chosen": json.loads(row["chosen"])}
    pair = encode_pair(tokenizer, row)
    assert parts(tokenizer, pair) == [
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
        "It is four.<|im_end|>\n",
        "Five, I think.<|im_end|>\n",
    ]
    assert masked(tokenizer, pair, "chosen") == "It is four.<|im_end|>"
    assert masked(tokenizer, pair, "rejected") == "Five, I think.<|im_end|>"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Q: two? A:", "chosen": " four", "rejected": " five"}, "Q: two? A:", " four", " five"),
        ({"chosen": "Q: two? A: four", "rejected": "Q: two? A: six"}, "Q: two? A:", " four", " six"),
        ({"prompt": "Q", "chosen": "a<|im_end|>", "rejected": "b"}, "Q", "a", "b"),
    ],
)
def test_plain_text_has_no_template_and_one_eos(row, prompt, chosen, rejected, bos):
    tokenizer = with_bos(byte_tokenizer()) if bos else byte_tokenizer()
    pair = encode_pair(tokenizer, row)
    begin = "<|bos|>" if bos else ""
    assert parts(tokenizer, pair) == [begin + prompt, chosen + "<|im_end|>", rejected + "<|im_end|>"]
    assert pair["chosen_mask"] == [1] * len(pair["chosen_ids"])
    # As TRL tokenises it: the whole text with the tokenizer's special tokens, and EOS.
    assert pair["prompt_ids"] + pair["rejected_ids"] == tokenizer(prompt + rejected + "<|im_end|>")["input_ids"]


@given(st.text("ab ", min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=6), st.text("ab ", max_size=6))
def test_texts_are_split_where_trl_splits_them(chosen, rejected, prompt):
    chosen, rejected = prompt + chosen, prompt + rejected
    at = split_texts(chosen, rejected)
    assert chosen[:at] == rejected[:at] and at < len(chosen) and at < len(rejected)
    if chosen[0] == rejected[0]:  # TRL looks at the last letter of all where the first differs
        assert extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"] == chosen[:at]


ROWS = {
    "explicit": {"prompt": [SYSTEM, *TURNS], "chosen": CHOSEN, "rejected": REJECTED},
    "implicit": {"chosen": [*TURNS, *CHOSEN], "rejected": [*TURNS, *REJECTED]},
    "longer": {
        "chosen": [*TURNS, *CHOSEN, user("Sure?"), said("Yes.")],
        "rejected": [*TURNS, *REJECTED],
    },
    "reasoning": {
        "chosen": [user("2+2?"), said("4", reasoning_content="two and two"), user("3+3?"), said("6")],
        "rejected": [user("2+2?"), said("4", reasoning_content="two and two"), user("3+3?"), said("7")],
    },
    "tools": {"chosen": TOOL, "rejected": [*TOOL[:3], said("It rains.")], "tools": TOOLS},
    "call": {"prompt": TOOL[:1], "chosen": TOOL[1:4], "rejected": [said("I do not know.")], "tools": TOOLS},
}


@pytest.fixture(scope="module", params=ORIGINALS)
def of_template(request):
    tokenizer = byte_tokenizer(template(request.param))
    return with_bos(tokenizer) if len(request.param) % 2 else tokenizer


@pytest.mark.parametrize("kind", ROWS)
def test_prompt_and_chosen_are_what_fine_tuning_has(of_template, kind):
    """Under every template: the ids that SFT has, one prompt for both sides, and the model's own words trained."""
    tokenizer, row = of_template, ROWS[kind]
    try:
        whole = encode_row(tokenizer, row)
        other = encode_row(tokenizer, {**row, "chosen": row["rejected"], "rejected": row["chosen"]})
    except DataError:  # this template has no system turn, tools or whatever it is
        with pytest.raises(DataError):
            encode_pair(tokenizer, row)
        return
    pair = encode_pair(tokenizer, row)
    sides = ((whole, "chosen"), (other, "rejected"))
    assert pair["prompt_ids"], pair
    for sft, side in sides:
        ids, mask = pair[f"{side}_ids"], pair[f"{side}_mask"]
        assert pair["prompt_ids"] + ids == sft["input_ids"]
        assert len(ids) == len(mask)
        # Nothing is trained that SFT does not train, and the last answer, stop token and all, is trained.
        labels = sft["labels"][len(pair["prompt_ids"]) :]
        trained = [i for i, on in zip(ids, mask, strict=True) if on]
        assert all(label != -100 for label, on in zip(labels, mask, strict=True) if on)
        messages = row.get("prompt", []) + row[side]
        last = encode_chat(tokenizer, messages, tools=row.get("tools"), train_on="last_assistant")["labels"]
        answer = [label for label in last if label != -100]
        assert trained[-len(answer) :] == answer
        if kind in ("explicit", "implicit", "reasoning"):  # one answer a side
            assert trained == answer


def test_turns_of_others_inside_an_answer_are_not_trained():
    tokenizer = byte_tokenizer()
    pair = encode_pair(tokenizer, ROWS["longer"])
    assert masked(tokenizer, pair, "chosen") == "It is four.<|im_end|>Yes.<|im_end|>"
    assert "Sure?" in tokenizer.decode(pair["chosen_ids"])
    assert "Hello!" in tokenizer.decode(pair["prompt_ids"])
    last = encode_pair(tokenizer, ROWS["longer"], train_on="last_assistant")
    assert masked(tokenizer, last, "chosen") == "Yes.<|im_end|>"
    every = encode_pair(tokenizer, ROWS["longer"], train_on="all")
    assert every["chosen_mask"] == [1] * len(pair["chosen_ids"]) and every["prompt_ids"] == pair["prompt_ids"]


def test_tool_turns_inside_an_answer_are_not_trained():
    tokenizer = byte_tokenizer(template("qwen3"))
    pair = encode_pair(tokenizer, ROWS["call"])
    words = masked(tokenizer, pair, "chosen")
    assert '"name": "get_weather"' in words and "It is sunny." in words and "<tool_response>" not in words
    assert CALL["function"]["arguments"]["city"] in words


def test_a_turn_that_says_not_to_be_trained_is_not():
    tokenizer = byte_tokenizer()
    row = {"prompt": PROMPT, "chosen": [said("A.", train=False), user("And?"), said("B.")], "rejected": REJECTED}
    assert masked(tokenizer, encode_pair(tokenizer, row), "chosen") == "B.<|im_end|>"


def test_template_arguments_come_from_the_row_and_from_the_caller():
    tokenizer = byte_tokenizer(template("qwen3"))
    row = {**ROWS["implicit"], "chat_template_kwargs": {"enable_thinking": False}}
    assert encode_pair(tokenizer, row) == encode_pair(tokenizer, ROWS["implicit"], enable_thinking=False)
    assert "<think>\n\n</think>\n\n" in tokenizer.decode(encode_pair(tokenizer, row)["prompt_ids"])


def test_control_tokens_in_a_question_are_text():
    tokenizer = byte_tokenizer()
    row = {"prompt": [user("<|im_end|>")], "chosen": CHOSEN, "rejected": REJECTED}
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode_pair(tokenizer, row)["prompt_ids"].count(stop) == 1
    assert encode_pair(tokenizer, row, control_tokens="allow")["prompt_ids"].count(stop) == 2


WRONG = {
    "equal": (
        {"prompt": PROMPT, "chosen": CHOSEN, "rejected": CHOSEN},
        FormatError,
        "are equal, assistant 'It is four.'",
    ),
    "equal whole": ({"chosen": PROMPT + CHOSEN, "rejected": PROMPT + CHOSEN}, FormatError, "are equal"),
    "equal text": ({"prompt": "q", "chosen": "a", "rejected": "a"}, FormatError, "are equal, 'qa'"),
    "no rejected": ({"prompt": PROMPT, "chosen": CHOSEN}, FormatError, "rejected is missing"),
    "null chosen": ({"prompt": PROMPT, "chosen": None, "rejected": CHOSEN}, FormatError, "chosen is missing"),
    "neither": ({"text": "a"}, FormatError, "chosen and rejected is missing"),
    "no row": ([1], FormatError, "a row is list"),
    "contradiction": (
        {"prompt": "What?", "chosen": PROMPT + CHOSEN, "rejected": PROMPT + REJECTED},
        FormatError,
        "prompts differ: the prompt ends with user 'What\\?' and chosen begins with user 'What is 2\\+2\\?'",
    ),
    "one repeats": (
        {"prompt": PROMPT, "chosen": PROMPT + CHOSEN, "rejected": REJECTED},
        FormatError,
        "chosen repeats the prompt and rejected does not",
    ),
    "other systems": (
        {"prompt": PROMPT, "chosen": [SYSTEM, *PROMPT, *CHOSEN], "rejected": PROMPT + REJECTED},
        FormatError,
        "prompts differ: chosen begins with system 'Be brief.' and rejected with user",
    ),
    "other questions": (
        {"chosen": [SYSTEM, user("a"), *CHOSEN], "rejected": [SYSTEM, user("b"), *REJECTED]},
        FormatError,
        "prompts differ: chosen asks with user 'a' and rejected with user 'b'",
    ),
    "no answer": ({"prompt": PROMPT, "chosen": [], "rejected": CHOSEN}, FormatError, "chosen is empty, no message"),
    "stops early": (
        {"chosen": [*TURNS, *CHOSEN], "rejected": TURNS},
        FormatError,
        "rejected is empty, no message after the prompt",
    ),
    "empty answer": (
        {"prompt": PROMPT, "chosen": CHOSEN, "rejected": [said("")]},
        ConversationError,
        "rejected: empty",
    ),
    "empty text": ({"prompt": "q", "chosen": " ", "rejected": "a"}, FormatError, "chosen is empty"),
    "user's answer": (
        {"prompt": [SYSTEM, *TURNS[:2]], "chosen": [user("x")], "rejected": [user("y")]},
        NothingSupervisedError,
        "chosen has no assistant message",
    ),
    "untrained": (
        {"prompt": PROMPT, "chosen": CHOSEN, "rejected": [said("b", train=False)]},
        NothingSupervisedError,
        "rejected: no assistant message to train",
    ),
    "alike": (
        {"prompt": PROMPT, "chosen": CHOSEN, "rejected": [{**CHOSEN[0], "note": "unseen by the template"}]},
        FormatError,
        "the template renders them alike",
    ),
    "unknown role": ({"prompt": PROMPT, "chosen": CHOSEN, "rejected": [{"role": "x"}]}, DataError, "rejected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_no_pair(name):
    row, error, words = WRONG[name]
    with pytest.raises(error, match=f"^source 'pairs', row 7.*: .*{words}") as caught:
        encode_pair(byte_tokenizer(), row, source="pairs", row_index=7)
    assert (caught.value.source, caught.value.row) == ("pairs", 7)


@pytest.mark.parametrize(("name", "value"), [("max_length", 1), ("train_on", "users"), ("control_tokens", "never")])
def test_settings_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=name):
        encode_pair(byte_tokenizer(), ROWS["explicit"], **{name: value})


# -- too long ----------------------------------------------------------------------------------------------------------

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


def test_a_prompt_that_the_sides_repeat_is_said_once():
    head, answers = join_prompt([*TURNS], [[SYSTEM, *TURNS, *CHOSEN], [SYSTEM, *TURNS, *REJECTED]])
    assert [turn["content"] for turn in head] == ["Be brief.", "Hi", "Hello!", "What is 2+2?"]
    assert head[2]["train"] is False and answers == [CHOSEN, REJECTED]
    head, answers = join_prompt([SYSTEM, *PROMPT], [PROMPT + CHOSEN, PROMPT + REJECTED])
    assert head == [SYSTEM, *PROMPT] and answers == [CHOSEN, REJECTED]
    head, answers = join_prompt([SYSTEM], [PROMPT + CHOSEN, PROMPT + REJECTED])  # a prompt that the sides go on from
    assert head == [SYSTEM] and answers == [PROMPT + CHOSEN, PROMPT + REJECTED]
