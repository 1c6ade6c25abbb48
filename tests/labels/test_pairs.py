"""Preference pairs: one prompt and two answers, whatever form the row, the template and the tokenizer have."""

from __future__ import annotations

import json

import pytest

from hf_objectives.errors import ConfigError, ConversationError, DataError, FormatError, NothingSupervisedError
from hf_objectives.labels.chat import encode_chat
from hf_objectives.labels.pairs import encode_pair
from hf_objectives.labels.rows import encode_row
from tests.support.chat_corpus import CALL, ORIGINALS, TOOL, TOOLS, byte_tokenizer, template, with_bos
from tests.support.preference_rows import CHOSEN, PROMPT, REJECTED, SYSTEM, TURNS, masked, parts, said, user


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


# Of Gemma 4's five versions the first and the last: those between differ in nothing that pairs look at.
@pytest.fixture(
    scope="module", params=[name for name in ORIGINALS if name not in ("gemma4_v2", "gemma4_v3", "gemma4_v4")]
)
def of_template(request):
    tokenizer = byte_tokenizer(template(request.param))
    return with_bos(tokenizer) if len(request.param) % 2 else tokenizer


@pytest.mark.slow
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
