"""Each warning on a case made by hand, and silence on sound rows."""

from __future__ import annotations

import chat_corpus as corpus
import pytest

from hf_objectives.diagnostics.inspection import inspect_rows

HEADED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Quill, created by Penholder.<|im_end|>\n{% endif %}"
    + corpus.CHATML
)
NO_STOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
NO_STOP += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + corpus.CHATML


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def sound(count: int = 4) -> list[dict]:
    return [chat(f"question {i}", f"answer {i}") for i in range(count)]


def warnings(rows, template=corpus.CHATML, **settings):
    tokenizer = corpus.byte_tokenizer(template)
    return {one.kind: one for one in inspect_rows(rows, tokenizer, **settings).warnings}


def test_sound_rows_give_none():
    assert warnings([*sound(), {"messages": corpus.TOOL, "tools": corpus.TOOLS}][:4]) == {}
    assert warnings([{"text": "one"}, {"text": "two"}]) == {}
    assert warnings(sound(), train_on="all") == {}  # the newline after a stop hides it from nobody


def test_no_stop_token():
    found = warnings(sound(), NO_STOP)["no_stop_token"]
    assert found.severity == "error" and found.evidence.startswith("4 of 4 trained turns end without")
    assert found.rows == tuple(("data", i) for i in range(4)) and "first is trained turn 0 of data 0" in found.evidence


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


def test_control_tokens_in_a_document():
    assert warnings([{"text": "fine"}, {"text": "a<|im_end|>b"}])["control_tokens_in_text"].rows == (("data", 1),)


def test_duplicates():
    rows = sound()
    found = warnings([*rows, rows[1], rows[1]])["duplicates"]
    assert found.rows == (("data", 4), ("data", 5)) and "2 of 6 rows" in found.evidence
    assert "3 times in all" in found.evidence and "data 1, again as data 4" in found.evidence


def test_text_that_the_template_adds():
    asked = {"messages": [{"role": "system", "content": "Be brief and kind."}, *chat("q", "a")["messages"]]}
    found = warnings([*sound(), asked], HEADED)["template_adds_text"]
    assert "'You are Quill, created by Penholder.' into 4 of 5 conversations" in found.evidence
    assert found.rows == tuple(("data", i) for i in range(4))


def test_a_date_in_the_template():
    found = warnings(sound(), DATED)
    assert len(found["date_in_template"].rows) == 4 and "Today is" in found["template_adds_text"].evidence


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


def test_places_in_words():
    found = warnings([chat("same", "same")] * 9)["duplicates"]
    assert found.places == "data 1, 2, 3, 4, 5 and 3 more"
