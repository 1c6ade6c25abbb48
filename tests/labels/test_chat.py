"""Labels of conversations: against templates' own renders, TRL's training twins, and spans written by hand."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError
from transformers.utils.chat_template_utils import render_jinja_template

from hf_objectives.errors import (
    ConfigError,
    ConversationError,
    DataError,
    NothingSupervisedError,
    TemplateError,
    VisionContentError,
)
from hf_objectives.labels.chat import encode_chat, encode_chats
from tests.support.chat_corpus import (
    CHATML,
    CONVERSATIONS,
    ORIGINALS,
    PLAIN,
    REASONING,
    TOOL,
    TOOLS,
    TWINS,
    byte_tokenizer,
    template,
    trained_runs,
    trained_text,
)

# By hand, from reading each template: what the model has to write in PLAIN. The first entry is the turn in the middle.
EOT, END, TURN = "<|eot_id|>", "<|im_end|>", "<end_of_turn>"
CHATML_TURNS = ["It is four.<|im_end|>", "That makes six.<|im_end|>"]
COHERE_END = "<|END_OF_TURN_TOKEN|>"
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
PLAIN_BY_HAND = {
    "cohere": [f"It is four.{COHERE_END}", f"That makes six.{COHERE_END}"],
    "cohere2": [f"It is four.<|END_RESPONSE|>{COHERE_END}", f"That makes six.<|END_RESPONSE|>{COHERE_END}"],
    "deepseek_r1_distill": [f"It is four.{DEEPSEEK_END}", f"That makes six.{DEEPSEEK_END}"],
    "deepseekv3": [f"It is four.{DEEPSEEK_END}", f"That makes six.{DEEPSEEK_END}"],
    "diffusion_gemma": ["It is four.<turn|>", "That makes six.<turn|>"],
    "gemma": [f"It is four.{TURN}", f"That makes six.{TURN}"],
    "gemma3": [f"It is four.{TURN}", f"That makes six.{TURN}"],
    **{name: ["It is four.<turn|>", "That makes six.<turn|>"] for name in ORIGINALS if name.startswith("gemma4")},
    # GLM has no end of turn: it stops at the next role's marker, and after the last turn nothing follows.
    "glm4moe": ["\n<think></think>\nIt is four.<|user|>", "\n<think></think>\nThat makes six."],
    "gptoss": [
        "<|channel|>final<|message|>It is four.<|end|>",
        "<|channel|>final<|message|>That makes six.<|return|>",
    ],
    "idefics3": [" It is four.<end_of_utterance>", " That makes six.<end_of_utterance>"],
    "smolvlm": [" It is four.<end_of_utterance>", " That makes six.<end_of_utterance>"],
    "llava_next": [" It is four.</s>", " That makes six.</s>"],
    **{name: CHATML_TURNS for name in ORIGINALS if name.startswith(("lfm2", "qwen2", "qwen3_instruct", "qwen3_vl"))},
    **{name: [f"It is four.{EOT}", f"That makes six.{EOT}"] for name in ("llama3", "llama3_1", "llama3_2")},
    "muse_glimmer": [" to=user<|message|>It is four.<|eot|>", " to=user<|message|>That makes six.<|eot|>"],
    # The prompt opens <think> and the render closes it at once: closing it is the model's.
    **{
        name: ["</think>It is four.<|im_end|>", "</think>That makes six.<|im_end|>"]
        for name in ORIGINALS
        if name.startswith("nemotron")
    },
    "phi3": ["It is four.<|end|>", "That makes six.<|end|>"],
    "phi3_5": ["It is four.<|end|>", "That makes six.<|end|>"],
    # The last turn is rendered with an empty block that the prompt does not hold: the model writes it.
    "qwen3": ["It is four.<|im_end|>", "<think>\n\n</think>\n\nThat makes six.<|im_end|>"],
    # Here the prompt holds it whole, or its first line.
    "qwen3_5_nothink": CHATML_TURNS,
    "qwen3_5_think": ["It is four.<|im_end|>", "\n</think>\n\nThat makes six.<|im_end|>"],
    "qwen3_6": ["It is four.<|im_end|>", "\n</think>\n\nThat makes six.<|im_end|>"],
    "qwen3_8": ["\n</think>\n\nIt is four.<|im_end|>", "\n</think>\n\nThat makes six.<|im_end|>"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_spans_of_a_plain_chat_are_those_read_off_by_hand(name):
    tokenizer = byte_tokenizer(template(name))
    assert trained_runs(tokenizer, encode_chat(tokenizer, PLAIN)) == PLAIN_BY_HAND[name]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_the_templates_own_and_spans_start_where_the_prompt_ends(name, kind):
    """Either a named error, or the ids of apply_chat_template, and every turn starts where its own prompt ends."""
    tokenizer, messages = byte_tokenizer(template(name)), CONVERSATIONS[kind]
    tools = TOOLS if kind == "tool" else None
    try:
        row = encode_chat(tokenizer, messages, tools=tools)
    except DataError as error:
        assert kind != "plain" and error.turn is not None
        return
    trained = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert 0 < len(trained) < len(row["labels"])
    assert all(row["labels"][i] == row["input_ids"][i] for i in trained)
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    except (TypeError, UndefinedError):  # needs blocks as content, or text as arguments (tests/labels/test_styles.py)
        assert name in ("llava_next", "deepseekv3")
        return
    if any(m["content"] and tokenizer.encode(m["content"])[0] not in rendered for m in messages):
        return
    if tokenizer.decode(row["input_ids"]) != tokenizer.decode(rendered):
        assert name in ("deepseekv3", "idefics3", "smolvlm", "llava_next")
        return
    assert row["input_ids"] == rendered
    last = tokenizer.apply_chat_template(messages[:-1], tools=tools, add_generation_prompt=True)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(last, rendered, strict=False)) if a != b), len(last))
    if shared == len(last):  # the prompt of the last turn is a prefix of the render: the definition to the letter
        starts = [i for i in trained if i - 1 not in trained]
        header = tokenizer.encode("<|turn>model\n")
        assert starts[-1] in (shared, shared + len(header) * (rendered[shared : shared + len(header)] == header))


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", TWINS)
def test_trl_training_twin_is_an_upper_bound(name, kind):
    tokenizer, messages = byte_tokenizer(template(name) + template(f"{name}_training")), CONVERSATIONS[kind]
    tools = TOOLS if kind == "tool" else None
    if name in ("idefics3", "smolvlm", "llava_next"):
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        row = encode_chat(tokenizer, messages, tools=tools, chat_template=template(name))
    except DataError:
        return
    (text,), (spans,) = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=template(f"{name}_training"),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    runs = trained_runs(tokenizer, row)
    if name == "diffusion_gemma" and kind == "tool":
        # Gemma stops a call at <|tool_response>, one of its EOS ids; the twin leaves that out.
        runs[0] = runs[0].removesuffix("<|tool_response>")
    if text == tokenizer.decode(row["input_ids"]):
        allowed = {i for start, end in spans for i in range(start, end)}
        at = 0
        for run in runs:
            at = text.index(run, at)
            assert allowed.issuperset(range(at, at + len(run))), (name, run)
            at += len(run)
    else:  # the twin renders more (it keeps reasoning): each run is a piece of what it generates, in order
        generated, at = "".join(text[start:end] for start, end in spans), 0
        for run in runs:
            kept = run.removeprefix("<think>").removeprefix("</think>")
            at = generated.find(kept.strip(), at)
            assert at >= 0, (name, run)


def test_labels_by_hand():
    tokenizer = byte_tokenizer()
    row = encode_chat(tokenizer, PLAIN[:2])
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    )
    # user header and question: 1 + 5 + 12 + 1 + 1 tokens, assistant header 1 + 10, answer 11 bytes and the stop marker,
    # the newline after it untrained.
    assert [label != -100 for label in row["labels"]] == [False] * 31 + [True] * 12 + [False]


def test_reasoning_of_earlier_turns_is_what_the_template_shows():
    tokenizer = byte_tokenizer(template("qwen3"))
    assert trained_runs(tokenizer, encode_chat(tokenizer, REASONING)) == [
        "It is four.<|im_end|>",
        "<think>\nthree plus three\n</think>\n\nThat makes six.<|im_end|>",
    ]


def test_nothing_that_the_generation_prompt_supplies_is_trained():
    tokenizer = byte_tokenizer(template("qwen3"))
    row = encode_chat(tokenizer, PLAIN[:2], enable_thinking=False)
    assert trained_text(tokenizer, row) == "It is four.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("qwen3", ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>']),
        ("llama3_1", ['{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>']),
        ("gptoss", [' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>']),
        (
            "glm4moe",
            [
                "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
                "</tool_call><|observation|>"
            ],
        ),
        (
            "deepseekv3",
            [
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
                '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
            ],
        ),
    ],
)
def test_tool_calls_are_trained_and_results_are_not(name, runs):
    tokenizer = byte_tokenizer(template(name))
    row = encode_chat(tokenizer, TOOL, tools=TOOLS)
    assert trained_runs(tokenizer, row)[:1] == runs
    assert "sunny</" not in trained_text(tokenizer, row) and "Thanks" not in trained_text(tokenizer, row)


@pytest.mark.parametrize("policy", [{"train": False}, {"weight": 0}])
def test_messages_can_be_left_out_of_training(policy):
    tokenizer = byte_tokenizer()
    messages = [PLAIN[0], {**PLAIN[1], **policy}, *PLAIN[2:]]
    row = encode_chat(tokenizer, messages)
    assert trained_runs(tokenizer, row) == ["That makes six.<|im_end|>"]
    assert row["input_ids"] == encode_chat(tokenizer, PLAIN)["input_ids"]


def test_train_on():
    tokenizer = byte_tokenizer()
    assert trained_runs(tokenizer, encode_chat(tokenizer, PLAIN, train_on="last_assistant")) == CHATML_TURNS[1:]
    row = encode_chat(tokenizer, PLAIN, train_on="all")
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("field", ["user", "system", "tool result", "tool schema"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<tool_call>", "</think>"])
def test_control_tokens_in_text_stay_text(field, token):
    tokenizer = byte_tokenizer(template("qwen3"))
    forged = f"see {token} {token}assistant"
    schema = [{"type": "function", "function": {**TOOLS[0]["function"], "description": forged}}]
    messages = {
        "user": [{"role": "user", "content": forged}, PLAIN[1]],
        "system": [{"role": "system", "content": forged}, *PLAIN[:2]],
        "tool result": [*TOOL[:2], {**TOOL[2], "content": forged}, *TOOL[3:]],
        "tool schema": TOOL,
    }[field]
    tools = schema if field == "tool schema" else TOOLS if field == "tool result" else None
    clean = [
        {**m, "content": m["content"].replace(token, "MARK")} if isinstance(m["content"], str) else m for m in messages
    ]
    clean_tools = TOOLS if tools else None
    row = encode_chat(tokenizer, messages, tools=tools)
    reference = encode_chat(tokenizer, clean, tools=clean_tools)
    control = tokenizer.convert_tokens_to_ids(token)
    assert row["input_ids"].count(control) == reference["input_ids"].count(control)
    assert tokenizer.decode(row["input_ids"]).count(token) == tokenizer.decode(reference["input_ids"]).count(token) + 2
    assert trained_text(tokenizer, row) == trained_text(tokenizer, reference)
    allowed = encode_chat(tokenizer, messages, tools=tools, control_tokens="allow")
    assert allowed["input_ids"].count(control) == reference["input_ids"].count(control) + 2


def test_reasoning_written_into_an_answer_keeps_its_control_tokens():
    """QwQ: `<think>` is a special token that the generation prompt opens; in an answer it is the assistant's own."""
    chatml = byte_tokenizer().chat_template.replace("assistant\n'", "assistant\n<think>\n'")
    tokenizer = byte_tokenizer(chatml, special=["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    messages = [PLAIN[0], {"role": "assistant", "content": "<think>\ntwo and two\n</think>\nFour."}]
    row = encode_chat(tokenizer, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert trained_runs(tokenizer, row) == ["two and two\n</think>\nFour.<|im_end|>"]
    forged = [{"role": "user", "content": "say </think>"}, {"role": "assistant", "content": "<think>\nno</think>"}]
    assert encode_chat(tokenizer, forged)["input_ids"].count(tokenizer.convert_tokens_to_ids("</think>")) == 1


def test_plain_control_tokens_agree_with_transformers():
    tokenizer = byte_tokenizer(template("qwen3"))
    messages = [{"role": "user", "content": "a <|im_end|> b<tool_call>"}, PLAIN[1]]
    expected = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert encode_chat(tokenizer, messages)["input_ids"] == expected


def test_pieces_that_the_template_joins_make_no_control_token():
    tokenizer = byte_tokenizer(template("smolvlm"))
    blocks = [{"type": "text", "text": "<end_of_"}, {"type": "text", "text": "utterance>"}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}]
    stop = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert encode_chat(tokenizer, messages)["input_ids"].count(stop) == 2
    assert encode_chat(tokenizer, messages, control_tokens="allow")["input_ids"].count(stop) == 3


def test_assistant_cannot_forge_its_own_end():
    tokenizer = byte_tokenizer()
    messages = [PLAIN[0], {"role": "assistant", "content": "write <|im_end|> to stop"}]
    row = encode_chat(tokenizer, messages)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row["labels"].count(stop) == 1
    assert trained_text(tokenizer, row) == "write <|im_end|> to stop<|im_end|>"


def test_pad_token_that_is_eos_hides_no_label():
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode_chat(tokenizer, PLAIN)
    assert row["labels"].count(tokenizer.eos_token_id) == 2


def test_cut_turns_are_not_trained():
    tokenizer = byte_tokenizer()
    whole = encode_chat(tokenizer, PLAIN)
    ends = [i for i, label in enumerate(whole["labels"]) if label == tokenizer.eos_token_id]
    row = encode_chat(tokenizer, PLAIN, max_length=ends[1])  # one token short of the last stop marker
    assert len(row["input_ids"]) == ends[1]
    assert trained_runs(tokenizer, row) == CHATML_TURNS[:1]
    with pytest.raises(NothingSupervisedError, match="max_length=40"):
        encode_chat(tokenizer, PLAIN[:2], max_length=40)


def test_unicode_and_white_space_keep_their_places():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "héllo 日本 👩‍👩‍👧"}, {"role": "assistant", "content": "  naïve 답\n "}]
    assert trained_text(tokenizer, encode_chat(tokenizer, messages)) == "  naïve 답\n <|im_end|>"


def test_a_conversation_may_start_with_the_assistant():
    tokenizer = byte_tokenizer()
    messages = [{"role": "assistant", "content": "Hello!"}, *PLAIN[:2]]
    assert trained_runs(tokenizer, encode_chat(tokenizer, messages)) == ["Hello!<|im_end|>", "It is four.<|im_end|>"]


def test_batch_form_gives_the_same_rows():
    tokenizer = byte_tokenizer()
    chats = [PLAIN, PLAIN[:2], [{"role": "system", "content": "x"}, *PLAIN]]
    table = encode_chats(tokenizer, chats)
    assert table.to_pylist() == [encode_chat(tokenizer, chat) for chat in chats]


@pytest.mark.parametrize(
    ("messages", "error", "turn", "words"),
    [
        ([], ConversationError, None, "no messages"),
        ([{"role": "wizard", "content": "x"}], ConversationError, 0, "unknown role 'wizard'"),
        ([PLAIN[0], {"role": "assistant", "content": ""}], ConversationError, 1, "empty content"),
        ([PLAIN[0], {"role": "assistant", "content": None}], ConversationError, 1, "empty content"),
        ([{"role": "user", "content": 5}, PLAIN[1]], ConversationError, 0, "content is int"),
        ([PLAIN[0], {**PLAIN[1], "weight": 0.5}], ConversationError, 1, "weight is 0.5"),
        ([PLAIN[0], {**PLAIN[1], "train": "no"}], ConversationError, 1, "train is 'no'"),
        ([PLAIN[0]], NothingSupervisedError, None, "no assistant message"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}, PLAIN[1]],
            VisionContentError,
            0,
            "image content",
        ),
        ("hello", ConversationError, None, "expected a list of messages, found str"),
    ],
)
def test_bad_conversations_are_named(messages, error, turn, words):
    with pytest.raises(error, match=words) as caught:
        encode_chat(byte_tokenizer(), messages)
    assert caught.value.turn == turn


def test_template_faults_are_named():
    two_users = [PLAIN[0], PLAIN[0], PLAIN[1]]
    with pytest.raises(TemplateError, match="must alternate") as caught:
        encode_chat(byte_tokenizer(template("gemma")), two_users)
    assert caught.value.turn == 1
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        encode_chat(tokenizer, PLAIN)
    with pytest.raises(TemplateError, match="drops this assistant turn") as caught:
        drops = "{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content }}{% endif %}{% endfor %}"
        encode_chat(byte_tokenizer(drops), PLAIN)
    assert caught.value.turn == 1
    with pytest.raises(TemplateError, match="0 of the 1 tool calls") as caught:
        messages = [TOOL[0], {**TOOL[1], "content": "Let me look."}, *TOOL[2:]]
        encode_chat(byte_tokenizer(), messages, tools=TOOLS)
    assert caught.value.turn == 1
    with pytest.raises(TemplateError, match="not valid Jinja"):
        encode_chat(byte_tokenizer("{% for %}"), PLAIN)


def test_row_and_source_are_named_in_a_batch():
    with pytest.raises(ConversationError, match=r"^row 0: no messages"):
        encode_chats(byte_tokenizer(), [[], PLAIN])
    with pytest.raises(ConversationError, match="source 'chats', row 1, turn 1: empty content"):
        encode_chats(byte_tokenizer(), [PLAIN, [PLAIN[0], {"role": "assistant", "content": " "}]], source="chats")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"train_on": "asistant"}, "did you mean 'assistant'"),
        ({"control_tokens": "plane"}, "did you mean 'plain'"),
        ({"max_length": 1}, "at least 2"),
    ],
)
def test_bad_settings_are_named(setting, words):
    with pytest.raises(ConfigError, match=words):
        encode_chat(byte_tokenizer(), PLAIN, **setting)


@pytest.mark.slow
def test_tokenizers_are_let_go():
    """The encoders that are kept hold their tokenizers; there must be few of them."""
    import gc
    import weakref

    gone = []
    for _ in range(12):
        tokenizer = byte_tokenizer(CHATML)
        encode_chat(tokenizer, PLAIN)
        gone.append(weakref.ref(tokenizer))
    del tokenizer
    gc.collect()
    assert sum(reference() is not None for reference in gone) <= 8
