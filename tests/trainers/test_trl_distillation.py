"""What `trl_distillation` relies on in TRL: each private part is named where it moves."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from hf_objectives.evaluation import HeadInputs
from hf_objectives.evaluation.head import After
from hf_objectives.trainers.distillation import PerplexityDistillationTrainer
from hf_objectives.trainers.trl_distillation import target_nats, token_divergences
from tests.support.distillation_worlds import LETTERS, distillation, divergence, softmax, student, teacher
from tests.support.ppo_worlds import SETTINGS

MOVED = (
    f"trl {version('trl')} has changed: {{}}; hf_objectives/trainers/trl_distillation.py is written for trl>=1.16,<1.17: "
    "install such a release, or adapt the file"
)
PARAMETERS = {
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_get_train_sampler": ["self", "dataset"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "log": ["self", "logs", "start_time"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_methods(name):
    found = list(inspect.signature(getattr(DistillationTrainer, name)).parameters)
    assert found == PARAMETERS[name], MOVED.format(f"{name} takes {found}")


def test_arguments_are_the_parents():
    ours, theirs = (
        list(inspect.signature(kind.__init__).parameters)
        for kind in (PerplexityDistillationTrainer, DistillationTrainer)
    )
    assert ours == [*theirs, "teacher_processing_class", "eval_lm_datasets"], MOVED.format(f"it takes {theirs}")


def test_attributes(tmp_path):
    run = distillation(tmp_path)
    for name in (
        *("_metrics", "_tokenizer", "_is_vlm", "_total_train_tokens", "_buffered_inputs", "_step", "eos_token_ids"),
        *("generation_config", "generation_kwargs", "pad_to_multiple_of", "teacher_model", "temperature", "beta"),
        *("use_vllm", "max_completion_length"),
    ):
        assert hasattr(run, name), MOVED.format(f"it has no {name}")
    assert DistillationTrainer.loss_is_scaled_for_ga is True, MOVED.format("it scales its loss otherwise")
    pad = list(inspect.signature(trl.trainer.utils.pad).parameters)
    assert pad[:4] == ["tensors", "padding_value", "padding_side", "pad_to_multiple_of"], MOVED.format(
        f"pad takes {pad}"
    )


def test_the_kernel():
    """Logits of two models that scale and cap them, against loops; nothing is asked of no token."""
    expected = ["student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias",
                "beta", "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale",
                "teacher_final_logit_softcapping"]  # fmt: skip
    found = list(inspect.signature(ChunkedDivergenceFunction.forward).parameters)[1:]
    assert found == expected, MOVED.format(f"the kernel takes {found}")
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(3, width, generator=draw) for width in (4, 6)]
    weights = [torch.randn(7, width, generator=draw) for width in (4, 6)]
    one = HeadInputs(states[0], weights[0], torch.randn(7, generator=draw), After(None, 0.5))
    other = HeadInputs(states[1], weights[1], None, After(3.0, 2.0))
    ours = 0.5 * (one.states.double() @ one.weight.double().T + one.bias.double())
    theirs = 3 * torch.tanh(2 * (other.states.double() @ other.weight.double().T) / 3)
    for beta in (0.0, 0.2, 1.0):
        for temperature in (1.0, 2.5):
            nats, entropy = token_divergences(one, other, beta=beta, temperature=temperature)
            for i in range(3):
                p, q = theirs[i].tolist(), ours[i].tolist()
                assert float(nats[i]) == pytest.approx(divergence(p, q, beta, temperature), rel=1e-5, abs=1e-6)
                heated = torch.tensor(softmax(q, temperature), dtype=torch.float64)
                assert float(entropy[i]) == pytest.approx(float(-(heated * heated.log()).sum()), rel=1e-5)
    targets = torch.tensor([1, 6, 0])
    expected_nats = -ours.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(target_nats(one, targets).double(), expected_nats, atol=1e-5)
    empty = one._replace(states=states[0][:0].requires_grad_())
    nats, _ = token_divergences(empty, other._replace(states=states[1][:0]), beta=0.2, temperature=1.0)
    nats.sum().backward()
    assert nats.shape == (0,) and empty.states.grad.shape == (0, 4)


def test_the_loss_is_the_parents(tmp_path):
    """Of the same answers, under positions that do not count padding."""
    settings = {key: value for key, value in SETTINGS.items() if key != "steps_per_generation"}
    rows = [{"prompt": text} for text in ("u a ask", "u b c d ask", "u e e ask", "u c ask")]
    args = DistillationConfig(
        str(tmp_path), per_device_train_batch_size=4, max_completion_length=4, beta=0.3, **settings
    )
    parent = DistillationTrainer(student(), teacher(), args, Dataset.from_list(rows), processing_class=LETTERS)
    parent.model.train()
    batch = parent._generate_and_score_completions(rows)
    theirs = parent.compute_loss(parent.model, batch)
    run = distillation(tmp_path, rows, beta=0.3)
    run.model.train()
    ours = run.compute_loss(run.model, batch)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    theirs.backward()
    ours.backward()
    for (name, a), b in zip(parent.model.named_parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_a_batch_of_answers(tmp_path):
    """What the trainer makes of given answers has the keys of TRL's batch, with the mask that tools have there."""
    run = distillation(tmp_path, lmbda=0.5)
    run.model.train()
    rows = [*run.train_dataset]
    run._rows, run._numbers = range(6), range(6)
    generated = DistillationTrainer._generate_and_score_completions(run, rows)
    given = run.given_answers(rows)
    assert {*given} == {*generated, "tool_mask"}, MOVED.format(f"a batch has {sorted(generated)}")
    source = inspect.getsource(DistillationTrainer._compute_loss)
    assert 'completion_mask * inputs["tool_mask"]' in source, MOVED.format("tool_mask is no mask of the loss")


def test_an_evaluation_leaves_the_random_state_of_training(tmp_path):
    run = distillation(tmp_path, eval_dataset=[{"prompt": "u a ask"}, {"prompt": "u b ask"}])
    before = torch.get_rng_state()
    run.evaluate()
    assert torch.equal(torch.get_rng_state(), before)
