"""What a step reads from its device: on a GPU each reading waits for all work before it."""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_objectives import (
    DataCollatorWithEosPacking,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    demo,
    prepare_dataset,
)

TOKENIZER = demo.build_tokenizer()
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default"}


class Reads(TorchDispatchMode):
    """Counts operations whose result, or the size of it, the program waits for, by the file of ours that asked."""

    def __init__(self):
        super().__init__()
        self.found, self.is_on = Counter(), False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        by_mask = str(operation) == "aten.index.Tensor" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if self.is_on and (str(operation) in READS or by_mask):
            files = [frame.filename for frame in traceback.extract_stack() if "hf_objectives" in frame.filename]
            own = [file for file in files if "/tests/" not in file]
            innermost = traceback.extract_stack()
            theirs = any("transformers/masking_utils" in frame.filename for frame in innermost)
            self.found["theirs" if theirs else own[-1].rpartition("/")[2]] += 1
        return operation(*args, **(kwargs or {}))


class OneStep(TrainerCallback):
    def __init__(self, reads):
        self.reads = reads

    def on_step_begin(self, args, state, control, **kwargs):
        self.reads.is_on = state.global_step == 2

    def on_step_end(self, args, state, control, **kwargs):
        self.reads.is_on = False


@pytest.mark.parametrize("sources", [False, True])
def test_a_micro_batch_reads_the_places_of_its_targets_alone(tmp_path, monkeypatch, sources):
    # On an accelerator labels outside the head's entries become NaN, and the guard of the step names them.
    monkeypatch.setattr("hf_objectives.evaluation.logits.check_targets", lambda targets, entries: None)
    rows = demo.chats(60)
    rows = [{**row, "source": f"source {i % 2}"} for i, row in enumerate(rows)] if sources else rows
    arguments = PerplexityTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=4, logging_steps=100, per_device_train_batch_size=2,
        gradient_accumulation_steps=3, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    reads = Reads()
    trainer = PerplexityTrainer(
        demo.build_model(TOKENIZER), arguments, DataCollatorWithEosPacking(TOKENIZER, max_length=128),
        train_dataset=prepare_dataset(rows, TOKENIZER, max_length=128), processing_class=TOKENIZER,
        callbacks=[OneStep(reads)],
    )  # fmt: skip
    with reads:
        trainer.train()
    reads.found.pop("theirs", None)  # transformers looks for packed rows
    # The places of the targets of each micro-batch. What is finite is one list, which a CPU reads without an operation.
    assert reads.found == {"logits.py": 3}
