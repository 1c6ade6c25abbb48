"""What alignment costs the language model: the same perplexity as evaluated alone, against the start, with a bound."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import Trainer

from hf_objectives.errors import ConfigError, NothingSupervisedError
from hf_objectives.evaluation.language_model import EvaluatesLanguageModels, LanguageModelEvaluation
from hf_objectives.evaluation.perplexity import compute_perplexity
from hf_objectives.trainers import PerplexityTrainer
from tests.support.chat_corpus import byte_tokenizer, with_bos
from tests.support.language_models import TOKENIZER, arguments, chats, llama

TEXTS = [{"text": "The cat sat on mat number " + " ".join(map(str, range(i % 7)))} for i in range(11)]


def evaluation(datasets, tokenizer=TOKENIZER, **options) -> LanguageModelEvaluation:
    return LanguageModelEvaluation(datasets, tokenizer, **{"max_length": None, "batch_size": 4, **options})


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_perplexity_of_texts_is_compute_perplexitys(batch_size, bos):
    """A document's own EOS is a token to predict here, as in training."""
    tokenizer = with_bos(byte_tokenizer()) if bos else TOKENIZER
    found = evaluation(TEXTS, tokenizer, batch_size=batch_size).measure(llama())
    expected = compute_perplexity(llama(), tokenizer, [row["text"] + tokenizer.eos_token for row in TEXTS])
    assert found["eval_lm_perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert found["eval_lm_bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found["eval_lm_num_tokens"] == expected.num_tokens
    assert found["eval_lm_perplexity_increase"] == 0


def test_perplexity_of_chats_is_perplexity_trainers(tmp_path):
    run = PerplexityTrainer(llama(), arguments(tmp_path), eval_dataset=chats(), processing_class=TOKENIZER)
    expected = run.evaluate()
    found = evaluation({"chat": chats(), "lm": Dataset.from_list(TEXTS)}, batch_size=5).measure(run.model, prefix="x")
    assert found["x_chat_perplexity"] == pytest.approx(expected["eval_perplexity"], rel=1e-6)
    assert found["x_chat_num_tokens"] == expected["eval_num_tokens"]
    assert len(found) == 10


def test_long_rows_are_cut():
    found = evaluation(TEXTS, max_length=12).measure(llama())
    expected = compute_perplexity(llama(), TOKENIZER, TEXTS, max_length=12)
    assert found["eval_lm_num_tokens"] == 11 * 11
    assert found["eval_lm_perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_as_it_was(training):
    model = llama().train(training)
    evaluation(TEXTS).measure(model)
    assert model.training is training and all(parameter.grad is None for parameter in model.parameters())


def test_the_increase_is_against_the_first_measurement():
    model, watched = llama(), evaluation({"a": TEXTS[:3], "b": TEXTS[3:]})
    first = watched.measure(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    second = watched.measure(model)
    for name in ("a", "b"):
        assert second[f"eval_{name}_perplexity_at_start"] == first[f"eval_{name}_perplexity"]
        increase = second[f"eval_{name}_perplexity"] / first[f"eval_{name}_perplexity"] - 1
        assert second[f"eval_{name}_perplexity_increase"] == pytest.approx(increase) and increase != 0
    assert watched.worst(second)[1] == max(second["eval_a_perplexity_increase"], second["eval_b_perplexity_increase"])


def test_one_name_may_end_with_another():
    watched = evaluation({"lm": TEXTS[:2], "my_lm": TEXTS[2:4]})
    for order in ((0.1, 0.5), (0.5, 0.1)):
        figures = {"eval_my_lm_perplexity_increase": order[0], "eval_lm_perplexity_increase": order[1]}
        assert watched.worst(figures) == (("my_lm", "lm")[order[0] < order[1]], 0.5)
    watched.recall([{"eval_my_lm_perplexity_at_start": 7.0, "eval_lm_perplexity_at_start": 3.0, "loss": 1.0}])
    assert watched.start == {"lm": 3.0, "my_lm": 7.0}


def test_datasets_that_cannot_be():
    with pytest.raises(ConfigError, match="eval_lm_datasets has no dataset"):
        evaluation({})
    with pytest.raises(ConfigError, match="eval_lm_datasets: 'lm' is a stream"):
        evaluation(IterableDataset.from_generator(lambda: iter(TEXTS)))
    with pytest.raises(NothingSupervisedError):
        evaluation({"a": []})


# -- in a trainer ----------------------------------------------------------------------------------------------------


class Watched(EvaluatesLanguageModels, Trainer):
    """The smallest trainer that evaluates: its loss makes the language model worse at once."""

    def __init__(self, folder, datasets, *, eval_dataset=None, max_increase=None, callbacks=None, **options):
        args = arguments(folder, learning_rate=0.05, **{"max_steps": 8, **options})
        ids = [TOKENIZER(row["text"])["input_ids"][:20] for row in TEXTS + TEXTS]
        rows = [{"input_ids": one, "labels": one} for one in ids]
        super().__init__(llama(), args, train_dataset=rows, eval_dataset=rows[:3] if eval_dataset else None)
        self.watch_language_models(datasets, TOKENIZER, max_length=None, max_increase=max_increase)

    def compute_loss(self, model: nn.Module, inputs, return_outputs=False, num_items_in_batch=None):
        loss = -model(**inputs).loss
        return (loss, {"loss": loss}) if return_outputs else loss


EVERY = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": True}


def increases(run) -> list[float]:
    return [log["eval_lm_perplexity_increase"] for log in run.state.log_history if "eval_lm_perplexity_increase" in log]


@pytest.mark.slow
def test_the_start_and_every_evaluation_are_in_the_logs(tmp_path):
    run = Watched(tmp_path, TEXTS, **EVERY)
    run.train()
    found = [log for log in run.state.log_history if "eval_lm_perplexity" in log]
    assert [log["step"] for log in found] == [0, 2, 4, 6, 8]
    assert increases(run)[0] == 0 and increases(run)[-1] > 0.1
    start = compute_perplexity(llama(), TOKENIZER, [row["text"] + TOKENIZER.eos_token for row in TEXTS]).perplexity
    assert {log["eval_lm_perplexity_at_start"] for log in found} == {found[0]["eval_lm_perplexity"]}
    assert found[0]["eval_lm_perplexity"] == pytest.approx(start, rel=1e-6)
    end = compute_perplexity(run.model, TOKENIZER, [row["text"] + TOKENIZER.eos_token for row in TEXTS]).perplexity
    assert found[-1]["eval_lm_perplexity"] == pytest.approx(end, rel=1e-6)


def test_evaluate_has_the_figures_once(tmp_path):
    run = Watched(tmp_path, TEXTS, eval_dataset=True)
    metrics = run.evaluate(metric_key_prefix="test")
    assert {"test_loss", "test_lm_perplexity"} <= metrics.keys()
    several = run.evaluate({"one": run.eval_dataset, "two": run.eval_dataset})
    assert {"eval_one_loss", "eval_two_loss", "eval_lm_perplexity"} <= several.keys()
    assert not any(key.startswith("eval_one_lm") for key in several)
    assert sum("eval_lm_perplexity" in log for log in run.state.log_history) == 1
    without = Watched(tmp_path, TEXTS).evaluate()
    assert set(without) == {key for key in several if "_lm_" in key}


@pytest.mark.slow
def test_the_bound_stops_the_run_and_says_why(tmp_path, caplog):
    free = Watched(tmp_path, TEXTS, **EVERY)
    free.train()
    past = increases(free)
    assert past[1] < past[2]
    with caplog.at_level(logging.WARNING):
        run = Watched(tmp_path, TEXTS, max_increase=(past[1] + past[2]) / 2, **EVERY)
        run.train()
    assert run.state.global_step == 4 and increases(run) == pytest.approx(past[:3])
    assert "stopping at step 4: perplexity of lm is" in caplog.text and "max_perplexity_increase=" in caplog.text
    roomy = Watched(tmp_path, TEXTS, max_increase=past[-1] * 2, **EVERY)
    roomy.train()
    assert roomy.state.global_step == 8


@pytest.mark.slow
def test_a_resumed_run_keeps_the_start(tmp_path):
    whole = Watched(tmp_path / "whole", TEXTS, **EVERY, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = Watched(tmp_path / "resumed", TEXTS, **EVERY)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert increases(resumed) == pytest.approx(increases(whole)) and increases(whole)[-1] != 0


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="max_perplexity_increase needs eval_lm_datasets"):
        Watched(tmp_path, None, max_increase=0.1)
    with pytest.raises(ConfigError, match="max_perplexity_increase is 0; expected more than 0"):
        Watched(tmp_path, TEXTS, max_increase=0)
    plain = Watched(tmp_path, None, eval_dataset=True)
    assert not any("_lm_" in key for key in plain.evaluate())


def test_a_model_that_says_nan_passes_every_bound():
    figures = {"eval_a_perplexity_increase": float("nan"), "eval_b_perplexity_increase": 0.5}
    both = evaluation({"a": TEXTS, "b": TEXTS})
    assert both.worst(figures)[0] == "a"
    figures = {"eval_a_perplexity_increase": 0.1, "eval_b_perplexity_increase": float("nan")}
    assert both.worst(figures)[0] == "b"


def test_a_lost_model_stops_the_run(tmp_path):
    run = Watched(tmp_path, TEXTS, max_increase=10.0, **EVERY)
    run.evaluate()
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    run.is_in_train = True
    run.measure_language_models()
    assert run.control.should_training_stop


@pytest.mark.slow
def test_a_start_that_was_measured_before_is_in_the_new_history(tmp_path):
    run = Watched(tmp_path, TEXTS, **{**EVERY, "eval_strategy": "no"})
    run.evaluate()
    start = run.lm_evaluation.start["lm"]
    run.train()
    assert [
        entry["eval_lm_perplexity_at_start"]
        for entry in run.state.log_history
        if "eval_lm_perplexity_at_start" in entry
    ] == [start]
