"""Each warning on a case made by hand, and silence on sound rows."""

from __future__ import annotations

import pytest

from hf_objectives.inspection.rows import inspect_rows
from tests.support import chat_corpus as corpus

NO_STOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
NO_STOP += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def sound(count: int = 4) -> list[dict]:
    return [chat(f"question {i}", f"answer {i}") for i in range(count)]


def warnings(rows, template=corpus.CHATML, names=None, **settings):
    tokenizer = corpus.byte_tokenizer(template, **names or {})
    return {one.kind: one for one in inspect_rows(rows, tokenizer, **settings).warnings}


def test_sound_rows_give_none():
    assert warnings(sound()) == {}
    assert warnings([{"text": "one"}, {"text": "two"}]) == {}
    assert warnings(sound(), train_on="all") == {}  # the newline after a stop hides it from nobody


def test_no_stop_token():
    found = warnings(sound(), NO_STOP)["no_stop_token"]
    assert found.severity == "error" and found.evidence.startswith("4 of 4 trained turns end without")
    assert found.rows == tuple(("data", i) for i in range(4)) and "first is trained turn 0 of data 0" in found.evidence


def test_a_stop_that_is_none():
    other = {"eos_token": "<|endoftext|>"}
    found = warnings(sound(), names=other)["stop_is_not_eos"]
    assert found.evidence.startswith("4 of 4 trained turns end with <|im_end|>, at which") and len(found.rows) == 4
    assert found.evidence.endswith("it stops at <|endoftext|>") and found.severity == "warning"
    im_end = corpus.byte_tokenizer().convert_tokens_to_ids("<|im_end|>")
    known = corpus.byte_tokenizer(**other).convert_tokens_to_ids("<|im_end|>")
    assert im_end != known and "stop_is_not_eos" not in warnings(sound(), names=other, stops=[known])
    assert warnings([{"text": "one"}, {"text": "two"}], names=other) == {}


def test_a_turn_that_ends_with_an_added_token():
    called = corpus.CHATML.replace("'<|im_end|>'", "('<|im_end|>' if message.role == 'user' else '</tool_call>')")
    found = warnings(sound(), called)
    assert "end with </tool_call>, at which generation does not stop" in found["stop_is_not_eos"].evidence


def test_nothing_trained():
    rows = [*sound(), chat("question", "answer", train=False)]
    found = warnings(rows)["nothing_trained"]
    assert found.rows == (("data", 4),) and found.severity == "warning"
    assert warnings(rows[4:])["nothing_trained"].severity == "error"


@pytest.mark.parametrize(("policy", "severity"), [("plain", "warning"), ("allow", "error")])
def test_control_tokens_in_text(policy, severity):
    rows = [*sound(), chat("so <|im_end|> he said", "yes")]
    found = warnings(rows, control_tokens=policy)["control_tokens_in_text"]
    assert found.rows == (("data", 4),) and found.severity == severity
    assert "<|im_end|>" in found.evidence and "by the user of turn 0" in found.evidence


def test_control_tokens_in_a_rejected_answer():
    pair = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    pair["prompt"] = [{"role": "user", "content": "question"}]
    forged = {**pair, "rejected": [{"role": "assistant", "content": "b<|im_end|>\n<|im_start|>user"}]}
    found = warnings([pair, forged])["control_tokens_in_text"]
    assert found.rows == (("data", 1),) and "by the assistant of turn 1 of the rejected answer" in found.evidence
    plain = {"prompt": "question ", "chosen": "a<|im_end|>", "rejected": "b<|im_end|>"}  # EOS at the end is the end
    assert "control_tokens_in_text" not in warnings([plain])
    plain["rejected"] = "b<|im_end|>c"
    assert "by the rejected text" in warnings([plain])["control_tokens_in_text"].evidence


def test_control_tokens_in_a_document():
    assert warnings([{"text": "fine"}, {"text": "a<|im_end|>b"}])["control_tokens_in_text"].rows == (("data", 1),)


def test_duplicates():
    rows = sound()
    found = warnings([*rows, rows[1], rows[1]])["duplicates"]
    assert found.rows == (("data", 4), ("data", 5)) and "2 of 6 rows" in found.evidence
    assert "3 times in all" in found.evidence and "data 1, again as data 4" in found.evidence
    assert found.positions == (1, 4, 5)


def test_truncation():
    rows = [*sound(), chat("long", "x" * 300)]
    found = warnings(rows, max_length=200)["longer_than_max_length"]
    assert found.rows == (("data", 4),) and "1 of 5 rows" in found.evidence and "left out" in found.advice
    assert found.severity == "warning"
    texts = warnings([{"text": "x" * 300}, {"text": "y"}], max_length=200, packing=True)["longer_than_max_length"]
    assert texts.severity == "info" and "no token is lost" in texts.advice


def test_few_trained_tokens():
    found = warnings([chat("x" * 900, "a")])
    assert "of the tokens are trained" in found["few_trained_tokens"].evidence  # 2 of about 930


def test_a_doubled_bos():
    twice = "{{ bos_token }}{{ bos_token }}" + corpus.CHATML
    found = warnings(sound(2), twice)["doubled_bos"]
    assert found.severity == "error" and len(found.rows) == 2
    assert "doubled_bos" not in warnings(sound(2), "{{ bos_token }}" + corpus.CHATML)
