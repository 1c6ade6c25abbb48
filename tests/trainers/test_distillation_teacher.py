"""What distillation asks of a teacher."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification

from hf_objectives.errors import ConfigError
from hf_objectives.trainers.distillation_teacher import check_tokenizers, refuse_same_model
from tests.support.distillation_worlds import LETTERS, TEMPLATE, distillation, student, teacher
from tests.support.ppo_worlds import small_model, words


def other_words(*known: str, template: str | None = TEMPLATE):
    tokenizer = words(*known)
    tokenizer.chat_template = template
    return tokenizer


def save(model, folder, tokenizer=None) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_another_size_of_vocabulary(tmp_path):
    """Of models, and of folders before they are loaded."""
    small = small_model(8)
    for of in (small, save(small, tmp_path / "teacher")):
        with pytest.raises(
            ConfigError, match="a vocabulary of 9 ids and the teacher one of 8; .* resize_token_embeddings"
        ):
            distillation(tmp_path, of=of)


def test_another_vocabulary_of_the_same_size(tmp_path):
    swapped = other_words("ask", "u", "b", "a", "c", "d", "e")
    with pytest.raises(ConfigError, match="id 4 is 'a' for the student's tokenizer and 'b' for the teacher's"):
        distillation(tmp_path, teacher_processing_class=swapped)
    longer = other_words("ask", "u", "a", "b", "c", "d", "e", "f")
    with pytest.raises(ConfigError, match="id 9 is None for the student's tokenizer and 'f'"):
        check_tokenizers(LETTERS, longer)


def test_the_tokenizer_of_the_teachers_folder(tmp_path):
    """Read from there, and refused or asked for where it is another or none."""
    folder = save(teacher(), tmp_path / "teacher", LETTERS)
    of = type(teacher()).from_pretrained(folder)
    for one in (folder, of):
        assert distillation(tmp_path, of=one, teacher_processing_class=None).teacher_model is not None
    other_words("ask", "u", "b", "a", "c", "d", "e").save_pretrained(folder)
    with pytest.raises(ConfigError, match="id 4 is 'a'"):
        distillation(tmp_path, of=folder, teacher_processing_class=None)
    with pytest.raises(ConfigError, match="comes from no folder and no repository.*pass teacher_processing_class"):
        distillation(tmp_path, teacher_processing_class=None)
    bare = save(teacher(), tmp_path / "bare")
    with pytest.raises(ConfigError, match="tokenizer.* pass teacher_processing_class"):
        distillation(tmp_path, of=bare, teacher_processing_class=None)


def test_another_chat_template_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        check_tokenizers(LETTERS, other_words("ask", "u", "a", "b", "c", "d", "e"))
        assert not caplog.text
        check_tokenizers(LETTERS, other_words("ask", "u", "a", "b", "c", "d", "e", template="{{ messages }}"))
    assert "the teacher has another chat template than the student" in caplog.text


def test_the_student_as_its_own_teacher():
    """Itself, a copy, and the model that a new adapter changes nothing of; an adapter that does is another model."""
    model = student()
    for other in (model, student()):
        with pytest.raises(ConfigError, match="gives the student's own logits"):
            refuse_same_model(model, other)
    refuse_same_model(model, teacher())
    adapted = get_peft_model(student(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    with pytest.raises(ConfigError, match="gives the student's own logits"):
        refuse_same_model(adapted, student())
    assert adapted.training
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_()
    refuse_same_model(adapted, student())


def test_the_folder_of_the_student_as_teacher(tmp_path):
    folder = save(student(), tmp_path / "student", LETTERS)
    with pytest.raises(ConfigError, match="gives the student's own logits"):
        distillation(tmp_path, model=folder, of=folder, teacher_processing_class=None)


def test_models_that_are_no_causal_language_models(tmp_path):
    classifier = small_model(len(LETTERS), kind=LlamaForSequenceClassification)
    sizes = {"vocab_size": len(LETTERS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = BertForMaskedLM(BertConfig(**sizes))
    for model, reason in (
        (classifier, "has a head for SequenceClassification"),
        (masked, "is a masked language model"),
    ):
        for given in ({"model": model}, {"of": model}):
            with pytest.raises(ConfigError, match=reason):
                distillation(tmp_path, **given)
