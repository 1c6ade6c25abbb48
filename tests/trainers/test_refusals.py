"""What a Trainer would take and never use is refused, with what to do instead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from datasets import Dataset
from transformers import Trainer

from hf_objectives.errors import ConfigError
from hf_objectives.trainers import PerplexityTrainer, PerplexityTrainingArguments, RewardModelConfig, RewardModelTrainer
from hf_objectives.trainers.refusals import refuse_cut_rows, refuse_data_parallel
from tests.support import dpo_worlds
from tests.support.language_models import arguments, llama, trainer
from tests.support.ppo_worlds import ppo


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compute_metrics", "on_evaluate"),
        ("preprocess_logits_for_metrics", "leave it out"),
        ("compute_loss_func", "override compute_loss"),
    ],
)
def test_callables_that_would_never_be_called(tmp_path, name, words):
    with pytest.raises(ConfigError, match=f"{name} .*{words}"):
        PerplexityTrainer(llama(), arguments(tmp_path), **{name: lambda *_, **__: {}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_parallelism_that_cuts_rows_is_refused_by_every_trainer(tmp_path, folders, name):
    cut, refused = {"parallelism_config": ParallelismConfig(**{name: 2})}, f"parallelism_config has {name}=2: .*label"
    with pytest.raises(ConfigError, match=refused):
        trainer(tmp_path, **cut)
    with pytest.raises(ConfigError, match=refused):
        dpo_worlds.ours(folders[0], tmp_path, **cut)
    with pytest.raises(ValueError, match=f"parallelism_config.{name} > 1"):  # TRL's own
        ppo(tmp_path, **cut)
    options = RewardModelConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **cut)
    with pytest.raises(ConfigError, match=refused):
        rows = Dataset.from_list(dpo_worlds.PAIRS)
        RewardModelTrainer(folders[0], options, train_dataset=rows, processing_class=dpo_worlds.TOKENIZER)


def test_parallelism_that_accelerate_was_launched_with_is_refused(tmp_path, monkeypatch):
    """`accelerate launch --parallelism_config_cp_size 2` sets no argument; the accelerator has it."""
    create = Trainer.create_accelerator_and_postprocess

    def launched(self):
        create(self)
        self.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(cp_size=2))

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", launched)
    with pytest.raises(ConfigError, match="parallelism_config has cp_size=2"):
        trainer(tmp_path)


def test_parallelism_that_leaves_rows_whole_passes():
    refuse_cut_rows(None)
    refuse_cut_rows(ParallelismConfig(tp_size=2, dp_shard_size=2))


def test_one_process_with_several_gpus_is_refused(tmp_path, monkeypatch):
    refuse_data_parallel(SimpleNamespace(n_gpu=1))
    monkeypatch.setattr(PerplexityTrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="one process with 2 GPUs .* accelerate launch"):
        trainer(tmp_path)
