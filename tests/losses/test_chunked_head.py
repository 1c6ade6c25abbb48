"""Loss and gradients in chunks, against torch's cross-entropy of full logits in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.losses import fused_linear_cross_entropy
from tests.support.heads import CHUNK, LargestTensor, by_autograd, close, example, ours


@given(
    tokens=st.integers(0, 40),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z=st.sampled_from([0.0, 1e-2]),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.25]),
    has_bias=st.booleans(),
    has_weights=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_option_in_every_company(tokens, smoothing, z, softcap, scale, has_bias, has_weights, ignored, seed):
    hidden, weight, bias, targets = example(tokens, seed=seed)
    bias = bias if has_bias else None
    generator = torch.Generator().manual_seed(seed)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) if has_weights else None
    after = {"weights": weights, "softcap": softcap, "scale": scale}
    loss, nats, gradients = by_autograd(hidden, weight, bias, targets, smoothing=smoothing, z=z, **after)
    result, found = ours(hidden, weight, bias, targets, label_smoothing=smoothing, z_loss=z, **after)
    trained = targets != -100
    assert result.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert torch.allclose(result.token_nll, nats, rtol=1e-12, atol=1e-12)
    assert result.nll.item() == pytest.approx(nats.sum().item(), rel=1e-12)
    assert result.weight.item() == pytest.approx(float(trained.sum() if weights is None else weights[trained].sum()))
    close(found, gradients, 1e-12)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2}, {"softcap": 5.0}, {"label_smoothing": 0.1}], ids=str)
def test_float32_is_float64s_to_six_digits(options):
    parts = example(200, 64, 501, torch.float32)
    names = {"z_loss": "z", "label_smoothing": "smoothing"}
    loss, nats, gradients = by_autograd(*parts, **{names.get(name, name): value for name, value in options.items()})
    result, found = ours(*parts, **options)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.loss.dtype == result.token_nll.dtype == torch.float32
    assert torch.allclose(result.token_nll.double(), nats, rtol=1e-6, atol=3e-6)
    close(found, gradients, 1e-5)


def test_logits_that_overflow_and_a_sure_token():
    hidden, weight = torch.tensor([[100.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1e-3]])
    result = fused_linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    # logits (300, -300, 0): the target is sure; (0, 0, 0.001): -log softmax by hand
    assert result.token_nll.tolist() == pytest.approx([0.0, math.log(2 + math.exp(1e-3))], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_logits_of_the_model_and_sums_in_float32(dtype):
    hidden, weight, bias, targets = example(60, 32, 97, dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias).double()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    result, found = ours(hidden, weight, bias, targets)
    assert result.loss.item() == pytest.approx(expected, rel=1e-6) and result.loss.dtype == torch.float32
    assert [part.dtype for part in found] == [dtype] * 3
    close(found, by_autograd(hidden, weight, bias, targets)[2], 2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_under_autocast_weights_keep_float32_gradients():
    hidden, weight, bias, targets = example(60, 32, 97, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        assert logits.dtype == torch.bfloat16
        result, found = ours(hidden, weight, bias, targets)
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert [part.dtype for part in found] == [torch.float32] * 3
    close(found, by_autograd(hidden, weight, bias, targets)[2], 2e-2)


def test_a_tied_weight_gets_both_gradients():
    _, weight, _, targets = example(30)
    ids = torch.arange(30)
    tied, plain = (weight.clone().requires_grad_() for _ in range(2))
    fused_linear_cross_entropy(torch.tanh(tied[ids]), tied, targets, chunk_bytes=CHUNK).loss.backward()
    torch.nn.functional.cross_entropy(torch.tanh(plain[ids]) @ plain.t(), targets, reduction="sum").backward()
    assert torch.allclose(tied.grad, plain.grad, atol=1e-12)


def test_the_gradient_of_the_loss_multiplies_all():
    parts = example(30)
    grown = [part.clone().requires_grad_() for part in parts[:3]]
    (fused_linear_cross_entropy(grown[0], grown[1], parts[3], bias=grown[2], chunk_bytes=CHUNK).loss * -0.3).backward()
    close([part.grad for part in grown], [-0.3 * part for part in by_autograd(*parts)[2]], 1e-12)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_is_trained_gets_a_gradient(wanted):
    parts = example(30)
    given_parts = [part.clone().requires_grad_(i == wanted) for i, part in enumerate(parts[:3])]
    fused_linear_cross_entropy(given_parts[0], given_parts[1], parts[3], bias=given_parts[2]).loss.backward()
    assert [part.grad is not None for part in given_parts] == [i == wanted for i in range(3)]
    close([given_parts[wanted].grad], [by_autograd(*parts)[2][wanted]], 1e-12)


def test_without_grad_mode_nothing_is_kept():
    hidden, weight, bias, targets = example(30)
    with torch.no_grad():
        result = fused_linear_cross_entropy(hidden, weight.requires_grad_(), targets, bias=bias)
    assert not result.loss.requires_grad and weight.grad is None
    assert result.loss.item() == pytest.approx(by_autograd(hidden, weight, bias, targets)[0], rel=1e-12)


def test_no_targets_still_reach_the_graph():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    result = fused_linear_cross_entropy(hidden, weight, torch.full((3,), -100))
    result.loss.backward()
    assert result.loss.item() == 0 and result.weight.item() == 0 and result.token_nll.tolist() == [0, 0, 0]
    assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_a_second_backward_is_refused():
    hidden, weight, _, targets = example(5)
    loss = fused_linear_cross_entropy(hidden.requires_grad_(), weight, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="compute the loss again for each"):
        loss.backward()


def test_the_largest_tensor_is_a_chunk():
    """Every tensor that any operation returns is counted: none has more elements than weight or chunk."""
    hidden, weight, _, targets = example(400, 4, 997, torch.float32)
    with LargestTensor() as largest:
        fused_linear_cross_entropy(
            hidden.requires_grad_(), weight.requires_grad_(), targets, chunk_bytes=2**16
        ).loss.backward()
    assert 2**15 < largest.bytes <= 2**16 < 400 * 997 * 4
