"""What `hf_compat` relies on in transformers and accelerate, and the watch of a Trainer's steps."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig, dispatch_model
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, JetMoeConfig, MixtralConfig, Trainer, TrainingArguments
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from hf_objectives.collators import DataCollatorForAssistantOnlyLM
from hf_objectives.errors import ConfigError
from hf_objectives.trainers import PerplexityTrainer, StepWatch, hf_compat, watch_steps
from hf_objectives.trainers.hf_compat import free_of_trainers, router_loss
from tests.support.language_models import TOKENIZER, chats, llama, trainer

MOVED = (
    f"transformers {version('transformers')} has changed: {{}}; hf_objectives/trainers/hf_compat.py is written for "
    "transformers>=5.23,<6: install such a release, or adapt the file"
)
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
METHODS = {
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_set_signature_columns_if_needed": ["self"],
    "_prepare_input": ["self", "data"],
    "create_accelerator_and_postprocess": ["self"],
    "_prepare_context_parallel_inputs": ["self", "model", "inputs"],
    "get_cp_size": ["self"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    method = getattr(Trainer, name, None)
    assert method is not None, MOVED.format(f"Trainer has no {name}")
    found = list(inspect.signature(method).parameters)
    assert found == METHODS[name], MOVED.format(f"Trainer.{name} takes {found}")
    for kind in (SFTTrainer, PerplexityTrainer):
        assert callable(getattr(kind, name)), MOVED.format(f"{kind.__name__} has no {name}")


def test_attributes(tmp_path):
    run = trainer(tmp_path)
    for name in ("_train_batch_size", "_signature_columns", "_loss_shifts_labels", "model_accepts_loss_kwargs"):
        assert name in vars(run), MOVED.format(f"Trainer has no {name}")
    assert run.accelerator._models == [], "accelerate has no Accelerator._models; see hf_compat.prepare_sharded"
    for name in ("cp_size", "sp_size", "tp_size"):
        assert hasattr(ParallelismConfig(), name), f"accelerate's ParallelismConfig has no {name}; see refuse_cut_rows"
    assert not hf_compat.is_stateful(run.model) and hasattr(run.model, "_is_stateful"), MOVED.format(
        "_is_stateful has gone"
    )
    assert hasattr(run.accelerator.state, "parallelism_config"), "accelerate's state has no parallelism_config"
    for name in ("_name_or_path", "_attn_implementation"):
        assert hasattr(run.model.config, name), MOVED.format(f"a config has no {name}")
    source = inspect.getsource(Trainer._run_epoch)
    order = [source.index(call) for call in ("._get_grad_norm(", ".on_pre_optimizer_step(", ".optimizer.step(")]
    assert order == sorted(order), MOVED.format("the gradient norm is not computed right before the optimizer's step")


def test_an_evaluation_marks_a_model_as_prepared(tmp_path):
    """accelerate leaves a marked model as it is, so that a later training of several processes would not wrap it in DDP."""
    run = Trainer(
        llama(),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        eval_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}],
    )
    run.evaluate()
    assert vars(run.model)["_is_accelerate_prepared"], "the mark has gone; see TrainerHooks._prepare_for_training"


def test_what_context_parallelism_cuts(tmp_path, monkeypatch):
    """The Trainer's buffers, and ours beside them; they are tensors of one shape, cut along the rows."""
    run = trainer(tmp_path)
    batch = run.data_collator(chats(4))
    context, same = run._prepare_context_parallel_inputs(run.model, batch)
    assert same is batch and not hasattr(context, "keywords")
    monkeypatch.setattr(run.accelerator.state, "parallelism_config", ParallelismConfig(cp_size=2, dp_shard_size=3))
    assert (run.get_cp_size(), hf_compat.copies_of_rows()) == (2, 2)
    batch = DataCollatorForAssistantOnlyLM(TOKENIZER, pad_to_multiple_of=4, return_source=True)(chats(4))
    context, rows = run._prepare_context_parallel_inputs(run.model, batch)
    options = context.keywords
    assert set(options) == {"buffers", "buffer_seq_dims", "no_restore_buffers"}, MOVED.format(f"it has {set(options)}")
    names = [name for tensor in options["buffers"] for name, value in rows.items() if value is tensor]
    assert sorted(names) == ["attention_mask", "input_ids", "position_ids", "shift_labels", "shift_sources"]
    assert options["buffer_seq_dims"] == [1] * 5 and options["no_restore_buffers"] == {*options["buffers"]}
    assert context.func == run.accelerator.maybe_context_parallel


@pytest.mark.parametrize(
    ("config", "weight"),
    [
        (MixtralConfig(**TINY, num_local_experts=2, router_aux_loss_coef=0.25, output_router_logits=True), 0.25),
        (JetMoeConfig(**TINY, num_local_experts=2, kv_channels=8, aux_loss_coef=0.5, output_router_logits=True), 0.5),
    ],
)
def test_the_loss_of_a_router_and_its_weight(config, weight):
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(12).reshape(2, 6)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    for one in (model, wrapped):
        output = model(ids, labels=ids)
        plain = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        aux, found = router_loss(one, output)
        assert found == weight, MOVED.format("a mixture of experts names its auxiliary weight otherwise")
        assert torch.allclose(plain + weight * aux, output.loss, atol=1e-5), MOVED.format("its loss has other terms")


def test_a_router_whose_weight_is_not_known_is_refused():
    model = llama()
    assert router_loss(model, model(torch.tensor([[1, 2]]))) is None
    for aux, words in ((torch.ones(()), "without a known weight"), (0, "auxiliary loss 0")):
        with pytest.raises(ConfigError, match=f"{words}.*output_router_logits=False"):
            router_loss(model, SimpleNamespace(aux_loss=aux))
    with pytest.raises(ConfigError, match="Module returns an auxiliary loss without a known weight"):
        router_loss(torch.nn.Module(), SimpleNamespace(aux_loss=torch.ones(())))


class Seen(StepWatch):
    def __init__(self, name, calls, fail=False):
        self.name, self.calls, self.fail = name, calls, fail

    def step_begins(self):
        self.calls.append((self.name, "begins"))

    def step_ends(self, batches, grad_norm):
        self.calls.append(
            (self.name, len(batches), float(grad_norm) > 0, all("labels" in batch for batch, _ in batches))
        )
        if self.fail:
            raise ArithmeticError("stop")

    def step_fails(self):
        self.calls.append((self.name, "fails"))


@pytest.mark.slow
def test_every_watch_sees_every_step_and_leaves_no_trace(tmp_path):
    run, calls = trainer(tmp_path, gradient_accumulation_steps=2, stop_on_non_finite=False), []
    ends = [watch_steps(run, Seen(name, calls)) for name in "ab"]
    run.train()
    step = [("b", "begins"), ("a", "begins"), ("b", 2, True, True), ("a", 2, True, True)]
    assert calls == step * 2
    assert "training_step" in vars(run)
    for end in (*ends, ends[0]):
        end()
    assert not {"training_step", "_get_grad_norm", "_watched_steps"} & vars(run).keys()


@pytest.mark.slow
def test_an_error_reaches_all_watches_and_the_caller(tmp_path):
    run, calls = trainer(tmp_path, stop_on_non_finite=False), []
    for name, fail in (("fails", True), ("sees first", False)):
        watch_steps(run, Seen(name, calls, fail))
    with pytest.raises(ArithmeticError, match="stop"):
        run.train()
    assert [call[0] for call in calls[2:4]] == ["sees first", "fails"]
    assert calls[4:] == [("sees first", "fails"), ("fails", "fails")] and run.state.global_step == 0


# -- what trainers put around `forward` -------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7]])


def with_other_weights(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    return other


@pytest.mark.parametrize("around", ["nothing", "autocast", "an adapter"])
def test_a_copy_of_a_model_with_trls_head_is_freed_of_it(around):
    model = llama()
    plain = model(IDS).logits
    add_fused_lm_head(model)
    if around == "autocast":
        AcceleratorState._reset_state(reset_partial_state=True)
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        AcceleratorState._reset_state(reset_partial_state=True)
    other = with_other_weights(model)
    if around == "an adapter":
        other = get_peft_model(other, LoraConfig(target_modules=["q_proj"]))
    assert other(IDS).logits.any()  # those of `model`: if not, TRL has mended it
    free_of_trainers(other, model, None, "a path")
    assert not other(IDS).logits.any() and torch.equal(model(IDS).logits, plain)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("below", [False, True])
def test_a_forward_of_the_users_stays(below):
    model = llama()

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        output = type(model).forward(self, *args, **kwargs)
        output.logits = output.logits + 1
        return output

    expected = model(IDS).logits + 1
    model.forward = types.MethodType(forward, model)
    if below:
        add_fused_lm_head(model)
    free_of_trainers(model)
    assert torch.equal(model(IDS).logits, expected)
    assert not (with_other_weights(model)(IDS).logits - 1).any()


def test_hooks_of_several_devices_stay():
    model = dispatch_model(llama(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    hook = model._hf_hook
    add_fused_lm_head(model)
    other = with_other_weights(model)
    free_of_trainers(other, model)
    assert not other(IDS).logits.any() and model(IDS).logits.any() and model._hf_hook is hook
    assert isinstance(other.forward, functools.partial) and other._old_forward.__self__ is other


def test_a_copy_is_what_is_trained(tmp_path):
    model = llama()
    add_fused_lm_head(model)
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    trainer(tmp_path, model=other, rows=chats(4), max_steps=1).train()
    assert not torch.equal(other.lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
