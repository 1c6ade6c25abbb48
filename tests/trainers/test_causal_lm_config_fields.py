"""Every field of TrainingArguments was judged: a new one of transformers fails here until somebody has looked."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments, __version__

from hf_objectives.trainers import PerplexityTrainingArguments
from hf_objectives.trainers.causal_lm_config import _REFUSED

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"

#: Honoured by the parent's own code, which nothing here overrides.
PARENT = set(
    """
    output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args
    weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules max_grad_norm bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config neftune_noise_alpha
    torch_empty_cache_steps logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu dataloader_persistent_workers ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp_config deepspeed debug skip_memory_metrics
    local_rank length_column_name
    """.split()
)

#: Honoured by code of this package, in the place of or beside the parent's: where.
OURS = {
    "per_device_train_batch_size": "get_train_dataloader tells it to a stream",
    "per_device_eval_batch_size": "evaluation_loader",
    "gradient_accumulation_steps": "compute_loss divides by the tokens of all micro-batches, and an auxiliary loss by steps",
    "bf16_full_eval": "_evaluation_model casts a whole model, and refuses a sharded one",
    "fp16_full_eval": "_evaluation_model casts a whole model, and refuses a sharded one",
    "torch_compile": "compute_loss takes full logits",
    "auto_find_batch_size": "the loss counts tokens; a stream is told the size that fits",
    "logging_strategy": "a checkpoint logs its step, so that tokens are counted over a resume",
    "logging_nan_inf_filter": "off by default; stop_on_non_finite stops before a loss could be hidden",
    "ignore_data_skip": "set for a stream, which skips by itself",
    "dataloader_num_workers": "evaluation_loader",
    "dataloader_pin_memory": "evaluation_loader",
    "dataloader_prefetch_factor": "evaluation_loader",
    "dataloader_multiprocessing_context": "evaluation_loader",
    "dataloader_in_order": "evaluation_loader",
    "dataloader_drop_last": "training only: an evaluation counts every row",
    "train_sampling_strategy": "training only: an evaluation is in the order of its rows",
    "fsdp": "prepare_sharded",
}

#: Without effect, because there is nothing that they would change: why.
MOOT = {
    "prediction_loss_only": "evaluate keeps no predictions, and predict is refused",
    "eval_accumulation_steps": "no predictions gather in memory",
    "eval_do_concat_batches": "no predictions are joined",
    "eval_use_gather_object": "no predictions are gathered",
    "use_cache": "every forward pass of training and evaluation is without a cache",
    "do_train": "a flag for programs, which no Trainer reads",
    "do_eval": "a flag for programs; eval_strategy decides",
    "do_predict": "a flag for programs, which no Trainer reads",
    "resume_from_checkpoint": "a flag for programs, which no Trainer reads",
}

#: Refused elsewhere than in PerplexityTrainingArguments, for some of their values.
REFUSED_ELSEWHERE = {
    "accelerator_config": "dispatch_batches, and split_batches with a stream: settle_batches",
    "parallelism_config": "sp_size or tp_size over 1: refuse_cut_rows",
    "optim": "that change weights in the backward pass, beside stop_on_non_finite: PerplexityTrainingArguments",
}


def test_every_field_was_judged_once():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    groups = [PARENT, OURS, MOOT, REFUSED_ELSEWHERE, _REFUSED.keys() - {"z_loss"}]
    judged = [name for group in groups for name in group]
    assert not names - set(judged), (
        f"transformers {__version__} has new arguments: {', '.join(sorted(names - set(judged)))}. Are they honoured "
        "where PerplexityTrainer overrides the Trainer's methods? Make each right or refused, and add it to a group here"
    )
    assert len(judged) == len(set(judged)), "a field is in two groups"


def test_what_is_refused_is_in_the_document():
    table = DOCUMENT.read_text()
    own = {field.name for field in dataclasses.fields(PerplexityTrainingArguments)}
    for name in [
        *_REFUSED,
        *REFUSED_ELSEWHERE,
        "compute_metrics",
        "compute_loss_func",
        "preprocess_logits_for_metrics",
    ]:
        assert re.search(rf"^\|.*`{name}", table, re.M), (
            f"docs/compatibility.md does not say that {name} may be refused"
        )
    assert own >= {*_REFUSED, *REFUSED_ELSEWHERE}


@pytest.mark.parametrize("name", ["dataloader_drop_last", "train_sampling_strategy"])
def test_settings_of_training_alone_are_in_the_document(name):
    assert f"`{name}`" in DOCUMENT.read_text()
