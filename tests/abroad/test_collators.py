"""Our collators in other people's trainers and loaders: the right rows reach the model, or an error says what to change."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_objectives import DataCollatorForAssistantOnlyLM, build_mixture
from hf_objectives.errors import FormatError
from tests.support.chat_corpus import byte_tokenizer
from tests.support.hosts import (
    ALONE,
    EXPECTED,
    LENGTH,
    PACKING,
    PADDING,
    RAW,
    TOKENIZER,
    arguments,
    check,
    documents,
    rows,
)
from tests.support.language_models import llama

UNTOUCHED = {"dataset_kwargs": {"skip_prepare_dataset": True}, **ALONE}
# TRL's own way to mask: markers in the template.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

EXACT = [("raw", PADDING, ALONE), ("raw", PACKING, ALONE), ("unpacked", PADDING, {}), ("unpacked", PACKING, {}),
         ("packed", PACKING, {}), ("packed", PACKING, ALONE)]  # fmt: skip
names = [f"{data}-{type(collator).__name__}-{len(options)}" for data, collator, options in EXACT]


@pytest.mark.parametrize(("data", "collator", "options"), EXACT, ids=names)
@pytest.mark.parametrize("workers", [0, 2])
def test_transformers_trainer(data, collator, options, workers, tmp_path):
    args = arguments(TrainingArguments, tmp_path, dataloader_num_workers=workers, **options)
    trainer = Trainer(llama(), args, collator, train_dataset=rows(data))
    check(trainer.get_train_dataloader())
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("options", [{}, ALONE])
def test_transformers_trainer_refuses_a_padding_collator_of_packed_rows(options, tmp_path):
    trainer = Trainer(llama(), arguments(TrainingArguments, tmp_path, **options), PADDING, train_dataset=rows("packed"))
    with pytest.raises(FormatError, match="documents, which would see each other here"):
        trainer.train()


EXACT_IN_SFT = [("raw", PADDING, UNTOUCHED), ("raw", PACKING, UNTOUCHED), ("unpacked", PADDING, {}), ("packed", PACKING, {}),
                ("packed", PACKING, UNTOUCHED)]  # fmt: skip


@pytest.mark.parametrize(("data", "collator", "options"), EXACT_IN_SFT)
def test_sft_trainer(data, collator, options, tmp_path):
    args = arguments(SFTConfig, tmp_path, bf16=False, **options)
    trainer = SFTTrainer(llama(), args, collator, train_dataset=rows(data), processing_class=TOKENIZER)
    check(trainer.get_train_dataloader())
    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("collator", [PADDING, PACKING])
def test_sft_trainer_that_tokenises_conversations_is_refused(collator, tmp_path):
    args = arguments(SFTConfig, tmp_path, bf16=False)
    trainer = SFTTrainer(llama(), args, collator, train_dataset=RAW, processing_class=TOKENIZER)
    with pytest.raises(
        FormatError, match="every token would be trained.*skip_prepare_dataset.*assistant_only_loss=True"
    ):
        trainer.train()


def test_masks_of_sft_trainer_are_kept(tmp_path):
    tokenizer = byte_tokenizer(MARKED)
    args = arguments(SFTConfig, tmp_path, bf16=False, assistant_only_loss=True)
    collator = DataCollatorForAssistantOnlyLM(tokenizer)
    trainer = SFTTrainer(llama(), args, collator, train_dataset=RAW, processing_class=tokenizer)
    for batch in trainer.get_train_dataloader():
        for labels in batch["labels"]:
            assert tokenizer.decode(labels[labels != -100]).startswith("I say")


def test_rows_that_sft_trainer_cut_are_refused(tmp_path):
    args = arguments(SFTConfig, tmp_path, bf16=False, max_length=64)
    trainer = SFTTrainer(llama(), args, PACKING, train_dataset=rows("packed"), processing_class=TOKENIZER)
    with pytest.raises(FormatError, match="seq_lengths add up to .* the row has 64 tokens; something cut the row"):
        trainer.train()


@pytest.mark.parametrize(("data", "collator", "options"), EXACT, ids=names)
@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_loop(data, collator, options, workers):
    loader = DataLoader(rows(data), batch_size=4, collate_fn=collator, num_workers=workers, shuffle=True)
    model, loader = Accelerator(cpu=True).prepare(llama(), loader)
    batches = list(loader)
    check(batches)
    batch = {name: value for name, value in batches[0].items() if name not in ("source_names", "labels")}
    assert torch.isfinite(model(**batch, use_cache=False).logits).all()


@pytest.mark.parametrize("packing", [None, "within", "across"])
def test_rows_of_a_mixture_carry_their_documents(packing):
    config = {"sources": {"chat": {"dataset": RAW}}, "max_length": LENGTH, "packing": packing}
    mixture = build_mixture(config, tokenizer=TOKENIZER)
    for row in itertools.islice(mixture, 12):
        kept = {name: row[name] for name in ("input_ids", "labels", "position_ids") if name in row}  # as Trainer keeps
        batch = PACKING([kept])
        assert all(labels == EXPECTED[ids] for ids, labels in documents(batch).items() if ids in EXPECTED)
        assert any(ids in EXPECTED for ids in documents(batch))
