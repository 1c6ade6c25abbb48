"""The public names are a contract: they import from the top, with these arguments."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_objectives

SIGNATURES = {
    "encode_chat": "tokenizer messages tools chat_template train_on max_length control_tokens template_kwargs",
    "encode_chats": "tokenizer conversations tools chat_template train_on max_length control_tokens source template_kwargs",
    "mixture_schedule": "weights n",
    "pack_lengths": "lengths capacity strategy",
    "pack_dataset": "dataset max_length strategy overflow",
    "compute_perplexity": "model tokenizer texts_or_dataset max_length stride batch_tokens group_by",
    "plot_training_metrics": "log output findings",
    "diagnose": "log",
}
CONTAINED = {
    "DataCollatorForAssistantOnlyLM": "tokenizer max_length train_on pad_to_multiple_of",
    "DataCollatorWithEosPacking": "tokenizer max_length strategy isolate_documents",
    "DataCollatorForPreferencePairs": "tokenizer max_length pad_to_multiple_of",
    "prepare_dataset": "dataset tokenizer max_length packing num_proc engine",
}


@pytest.mark.parametrize(("name", "arguments"), SIGNATURES.items())
def test_signatures(name, arguments):
    assert list(inspect.signature(getattr(hf_objectives, name)).parameters) == arguments.split()


@pytest.mark.parametrize(("name", "arguments"), CONTAINED.items())
def test_arguments(name, arguments):
    assert set(arguments.split()) <= set(inspect.signature(getattr(hf_objectives, name)).parameters)


def test_every_public_name_imports():
    for name in hf_objectives.__all__:
        assert callable(getattr(hf_objectives, name)), name
    assert set(hf_objectives.__all__) <= set(dir(hf_objectives))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_objectives.nothing


@pytest.mark.slow
def test_names_and_templates_load_from_a_zip_file(tmp_path):
    package = Path(hf_objectives.__file__).parent
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", package.parent, package.name)
    code = (
        f"import sys; sys.path.insert(0, {archive!r}); from hf_objectives import Finding; print(Finding.__module__)\n"
        "from hf_objectives.diagnostics.report import _TEMPLATES as a\n"
        "from hf_objectives.inspection.page import _TEMPLATES as b\n"
        "(a / 'report.css').read_text(), (b / 'inspection.js').read_text()"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "hf_objectives.inspection.findings"


def test_reward_trainer_is_trls():
    from trl import RewardConfig, RewardTrainer

    assert issubclass(hf_objectives.RewardModelTrainer, RewardTrainer)
    assert issubclass(hf_objectives.RewardModelConfig, RewardConfig)


def test_distillation_trainer_is_trls():
    from trl import DistillationConfig, DistillationTrainer

    assert issubclass(hf_objectives.PerplexityDistillationTrainer, DistillationTrainer)
    assert issubclass(hf_objectives.PerplexityDistillationConfig, DistillationConfig)


def test_trainer_is_a_trainer():
    from transformers import Trainer, TrainingArguments

    assert issubclass(hf_objectives.PerplexityTrainer, Trainer)
    assert issubclass(hf_objectives.PerplexityTrainingArguments, TrainingArguments)
