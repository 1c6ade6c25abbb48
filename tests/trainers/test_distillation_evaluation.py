"""The figures of an evaluation of distillation: by hand, and the same in every layout."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset

from hf_objectives.errors import ConfigError
from hf_objectives.trainers import distillation as module
from hf_objectives.trainers.distillation_evaluation import GIVEN, OWN, EvaluatedRows, RowSums, figures_of
from tests.support.distillation_worlds import CHATS, ROWS, by_hand, distillation, encoded

TIMES = ("runtime", "per_second")


def measured(run, **options) -> dict[str, float]:
    found = run.evaluate(**options)
    return {key: value for key, value in found.items() if not any(word in key for word in TIMES) and key != "epoch"}


class Noted(module.PerplexityDistillationTrainer):
    """Notes the student's answers."""

    answers: dict[int, list[int]]

    def answer(self, inputs):
        batch = super().answer(inputs)
        kept = zip(self._numbers, batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
        begun = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        self.answers |= {
            number: (prompt[there].tolist(), ids[mask].tolist())
            for (number, ids, mask), (prompt, there) in zip(kept, begun, strict=True)
        }
        return batch


def test_figures_by_hand(tmp_path):
    """Given answers and those that the student draws, under another temperature than that of perplexity."""
    run = distillation(tmp_path, kind=Noted, eval_dataset=ROWS, beta=0.3, temperature=1.5, lmbda=0.25,
                       per_device_eval_batch_size=4)  # fmt: skip
    run.answers = {}
    found = measured(run)
    given = by_hand(run, encoded(CHATS))
    own = by_hand(run, [(begin + ids, [-100] * len(begin) + ids) for begin, ids in run.answers.values()])
    assert len(run.answers) == 6 and found["eval_num_tokens"] == 20
    expected = {
        "eval_perplexity": math.exp(given["nats"] / 20),
        "eval_teacher_perplexity": math.exp(given["teacher_nats"] / 20),
        "eval_divergence": given["divergence"] / 20,
        "eval_on_policy_divergence": own["divergence"] / own["tokens"],
        "eval_entropy": own["entropy"] / own["tokens"],
        "eval_completions/mean_length": own["tokens"] / 6,
    }
    expected["eval_loss"] = 0.25 * expected["eval_on_policy_divergence"] + 0.75 * expected["eval_divergence"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    # `a` to `e` are a byte each, and <eos> is none: 13 letters are answered.
    assert found["eval_bits_per_byte"] == pytest.approx(given["nats"] / math.log(2) / 13, rel=1e-5)


@pytest.mark.slow
def test_the_batch_size_and_padding_change_nothing(tmp_path):
    found = [
        measured(
            distillation(
                tmp_path, eval_dataset=ROWS, lmbda=0.5, per_device_eval_batch_size=size, pad_to_multiple_of=pad
            )
        )
        for size, pad in ((1, None), (4, None), (6, 8))
    ]
    dropping = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}
    found.append(measured(distillation(tmp_path, eval_dataset=ROWS, lmbda=0.5, **dropping)))
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=1e-5)


def test_sets_by_name_and_what_is_logged(tmp_path):
    """Each set under its own name alone; under lmbda 0 there are texts and no answers of the student's."""
    sets = {"chats": ROWS, "short": ROWS[:2]}
    run = distillation(tmp_path, eval_dataset=sets, beta=0.5)
    run.evaluate()
    first, second = run.state.log_history
    assert all(key.startswith("eval_chats_") for key in first if key not in ("step", "epoch"))
    assert second["eval_short_num_tokens"] == 8  # c <eos>, d e <eos>, b c <eos>
    alone = distillation(tmp_path, eval_dataset=ROWS[:2], beta=0.5).evaluate()
    assert second["eval_short_perplexity"] == pytest.approx(alone["eval_perplexity"], rel=1e-6)
    later = run.evaluate(eval_dataset=ROWS[:2], metric_key_prefix="later")
    assert later["later_perplexity"] == second["eval_short_perplexity"]
    texts = [{"text": "a b c"}, {"text": "d e"}]
    figures = distillation(tmp_path, texts, lmbda=0.0, eval_dataset=texts).evaluate()
    assert figures["eval_num_tokens"] == 5 and "eval_on_policy_divergence" not in figures
    assert figures["eval_loss"] == figures["eval_divergence"]


def test_prompts_alone_have_figures_of_own_answers(tmp_path):
    rows = [{"prompt": chat[:1]} for chat in CHATS]
    figures = distillation(tmp_path, rows, eval_dataset=rows).evaluate()
    assert figures["eval_loss"] == figures["eval_on_policy_divergence"] and "eval_perplexity" not in figures


def test_a_stream_is_refused(tmp_path):
    run = distillation(tmp_path, eval_dataset=Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(ConfigError, match="eval_dataset is a stream"):
        run.evaluate()


def test_rows_that_fill_a_batch_count_once(monkeypatch):
    """Two processes of three rows, of five in all: the last is the first again."""
    sums = {0: [1.0, 2.0, 3.0], 1: [4.0, 5.0, 1.0]}
    rows = [EvaluatedRows(5), EvaluatedRows(5)]
    parts = []
    for one in (0, 1):
        monkeypatch.setattr("hf_objectives.trainers.distillation_evaluation.rank", lambda one=one: one)
        monkeypatch.setattr("hf_objectives.trainers.distillation_evaluation.world_size", lambda: 2)
        numbers = rows[one].next_numbers(3)
        assert [*numbers] == [3 * one, 3 * one + 1, 3 * one + 2] and [*rows[one].next_numbers(1)] == [6 + one]
        values = np.array(sums[one])
        rows[one].add(GIVEN, numbers, RowSums(values * 0 + 2, values, *[values * 0] * 5))
        parts.append(rows[one]._parts[GIVEN])
    monkeypatch.setattr(
        "hf_objectives.trainers.distillation_evaluation.gather_objects", lambda own: parts if own else [own, own]
    )
    found = rows[0].over_ranks()
    assert list(found) == [GIVEN] and found[GIVEN].divergence.tolist() == [1, 2, 3, 4, 5]
    figures = figures_of(found, lmbda=0.0)
    assert figures["divergence"] == figures["loss"] == 15 / 10 and figures["num_tokens"] == 10


def test_no_token_is_no_number():
    nothing = np.zeros(2)
    figures = figures_of({OWN: RowSums(*[nothing] * 7)}, lmbda=1.0)
    assert math.isnan(figures["loss"]) and figures["completions/clipped_ratio"] == 0
