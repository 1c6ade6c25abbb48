"""Log-probabilities, entropies and their gradients in chunks, against torch's log_softmax of full logits in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_objectives.errors import ConfigError
from hf_objectives.losses import token_log_probs
from hf_objectives.losses.token_scores import FIGURES, scores_of_logits
from tests.support.heads import CHUNK, LargestTensor, close, example

LARGE = 2**20  # bytes that hold all tokens


def by_autograd(hidden, weight, bias, targets, of_logps, of_entropy=None, *, softcap=None, scale=1.0, temperature=1.0):
    """Log-probabilities, entropies, and gradients of `of_logps` @ logps + `of_entropy` @ entropies, in float64."""
    parts = [None if part is None else part.detach().double().requires_grad_() for part in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*parts) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    every = torch.log_softmax(logits / temperature, dim=-1)
    logps, entropy = every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(dim=-1)
    total = (logps * of_logps).sum() + (0 if of_entropy is None else (entropy * of_entropy).sum())
    total.backward()
    return logps.detach(), entropy.detach(), [None if part is None else part.grad for part in parts]


def ours(hidden, weight, bias, targets, of_logps, of_entropy=None, **options):
    parts = [None if part is None else part.detach().requires_grad_() for part in (hidden, weight, bias)]
    found = token_log_probs(
        parts[0], parts[1], targets, bias=parts[2], figures=["entropy"] * (of_entropy is not None), **options
    )
    total = (found.log_probs * of_logps.to(found.log_probs.dtype)).sum()
    if of_entropy is not None:
        total = total + (found.entropy * of_entropy.to(total.dtype)).sum()
    total.backward()
    return found, [None if part is None else part.grad for part in parts]


@given(
    tokens=st.integers(0, 40),
    after=st.fixed_dictionaries(
        {
            "softcap": st.sampled_from([None, 5.0]),
            "scale": st.sampled_from([1.0, 0.25]),
            "temperature": st.sampled_from([1.0, 0.7]),
        }
    ),
    has_bias=st.booleans(),
    has_entropy=st.booleans(),
    chunk_bytes=st.sampled_from([CHUNK, LARGE]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_option_in_every_company(tokens, after, has_bias, has_entropy, chunk_bytes, seed):
    hidden, weight, bias, targets = example(tokens, seed=seed)
    of_logps, of_entropy = torch.randn(2, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    parts = (hidden, weight, bias if has_bias else None, targets, of_logps, of_entropy if has_entropy else None)
    logps, entropy, gradients = by_autograd(*parts, **after)
    found, own = ours(*parts, **after, chunk_bytes=chunk_bytes)
    assert torch.allclose(found.log_probs, logps, rtol=1e-12, atol=1e-12)
    assert (found.entropy is not None) == has_entropy
    if has_entropy:
        assert torch.allclose(found.entropy, entropy, rtol=1e-12, atol=1e-12)
    close(own, gradients, 1e-12)


def test_by_hand():
    hidden, weight = (
        torch.tensor([[100.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, math.log(2)]]),
    )
    found = token_log_probs(hidden, weight, torch.tensor([0, 2]), figures=["entropy"])
    # logits (300, -300, 0): the target is sure; (0, 0, log 2): probabilities 1/4, 1/4, 1/2
    assert found.log_probs.tolist() == pytest.approx([0.0, -math.log(2)], abs=1e-6)
    assert found.entropy.tolist() == pytest.approx([0.0, 1.5 * math.log(2)], abs=1e-6)


@pytest.mark.parametrize("chunk_bytes", [CHUNK, LARGE])
@pytest.mark.parametrize("wants_entropy", [False, True])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1)])
def test_only_what_is_trained_gets_a_gradient(trained, wants_entropy, chunk_bytes):
    """A head that is not trained has its gradients made at once, one whose tokens fit a chunk keeps its logits."""
    hidden, weight, bias, targets = example(30)
    of_logps = torch.linspace(-1, 2, 30, dtype=torch.float64)
    parts = [part.clone().requires_grad_(i in trained) for i, part in enumerate((hidden, weight, bias))]
    found = token_log_probs(
        parts[0], parts[1], targets, bias=parts[2], figures=["entropy"] * wants_entropy, chunk_bytes=chunk_bytes
    )
    (found.log_probs * of_logps).sum().backward()
    assert [part.grad is not None for part in parts] == [i in trained for i in range(3)]
    expected = by_autograd(hidden, weight, bias, targets, of_logps)[2]
    close([parts[i].grad for i in trained], [expected[i] for i in trained], 1e-12)


@pytest.mark.parametrize("chunk_bytes", [CHUNK, LARGE])
def test_a_graph_serves_as_many_backward_passes_as_asked(chunk_bytes):
    hidden, weight, bias, targets = example(30)
    hidden.requires_grad_()
    found = token_log_probs(hidden, weight.requires_grad_(), targets, bias=bias, chunk_bytes=chunk_bytes)
    for share in (1.0, -2.0):
        found.log_probs.backward(torch.full_like(found.log_probs, share), retain_graph=True)
    expected = by_autograd(hidden, weight, bias, targets, torch.full((30,), -1.0))[2]
    close([hidden.grad, weight.grad], expected[:2], 1e-12)


def test_only_the_entropy_is_used():
    hidden, weight, bias, targets = example(30)
    parts = [part.clone().requires_grad_() for part in (hidden, weight, bias)]
    token_log_probs(*parts[:2], targets, bias=parts[2], figures=["entropy"], chunk_bytes=CHUNK).entropy.sum().backward()
    expected = by_autograd(hidden, weight, bias, targets, torch.zeros(30), torch.ones(30))[2]
    close([part.grad for part in parts], expected, 1e-12)


def test_figures_without_gradient():
    hidden, weight, bias, targets = example(30)
    targets[:7] = torch.nn.functional.linear(hidden, weight, bias)[:7].argmax(dim=-1)
    options = {"bias": bias, "temperature": 0.7, "chunk_bytes": CHUNK}
    found = token_log_probs(hidden.requires_grad_(), weight, targets, figures=FIGURES, **options)
    logits = torch.nn.functional.linear(hidden, weight, bias).detach() / 0.7
    probs = torch.softmax(logits, dim=-1)
    assert torch.allclose(found.mean_logits, logits.mean(dim=-1), rtol=1e-12)
    assert torch.allclose(found.log_sum_sq_probs, probs.square().sum(dim=-1).log(), rtol=1e-12)
    assert found.is_top1.tolist() == (logits.argmax(dim=-1) == targets).tolist() and found.is_top1[:7].all()
    graded = (found.log_probs, found.entropy, found.log_sum_sq_probs, found.mean_logits, found.is_top1)
    assert [value.requires_grad for value in graded] == [True, True, False, False, False]


def test_an_unknown_figure_is_refused():
    with pytest.raises(ConfigError, match="figures is 'entropie'; expected one of entropy, .*did you mean 'entropy'"):
        token_log_probs(*example(3)[:2], torch.zeros(3, dtype=torch.int64), figures=["entropie"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_logits_of_the_model_and_sums_in_float32(dtype):
    hidden, weight, bias, targets = example(60, 32, 97, dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias).double()
    expected = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]
    of_logps = torch.linspace(-1, 2, 60)
    found, own = ours(hidden, weight, bias, targets, of_logps, torch.linspace(1, -1, 60))
    assert torch.allclose(found.log_probs.double(), expected, rtol=1e-6, atol=3e-6)
    assert found.log_probs.dtype == found.entropy.dtype == torch.float32
    assert [part.dtype for part in own] == [dtype] * 3
    expected = by_autograd(hidden, weight, bias, targets, of_logps, torch.linspace(1, -1, 60))[2]
    close(own, expected, 2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_under_autocast_weights_keep_float32_gradients():
    hidden, weight, bias, targets = example(60, 32, 97, torch.float32)
    of_logps = torch.linspace(-1, 2, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        found, own = ours(hidden, weight, bias, targets, of_logps)
    expected = torch.log_softmax(logits.double(), dim=-1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(found.log_probs.double(), expected, rtol=1e-6, atol=3e-6)
    assert [part.dtype for part in own] == [torch.float32] * 3
    close(own, by_autograd(hidden, weight, bias, targets, of_logps)[2], 2e-2)


@pytest.mark.parametrize("wants_entropy", [False, True])
def test_the_largest_tensor_is_a_chunk(wants_entropy):
    """Every tensor that any operation returns is counted: none has more elements than weight or chunk."""
    hidden, weight, _, targets = example(400, 4, 997, torch.float32)
    with LargestTensor() as largest:
        found = token_log_probs(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            figures=["entropy"] * wants_entropy,
            chunk_bytes=2**16,
        )
        (found.log_probs.sum() + (found.entropy.sum() if wants_entropy else 0)).backward()
    assert 2**14 < largest.bytes <= 2**16 < 400 * 997 * 4


@pytest.mark.parametrize("of_logits", [False, True])
@pytest.mark.parametrize("chunk_bytes", [CHUNK, LARGE])
def test_entries_that_a_model_rules_out_have_no_part_in_an_entropy(of_logits, chunk_bytes):
    """Logits of -inf: the figures and gradients are those of a head without these entries."""
    hidden, weight, _, _ = example(30)
    kept = len(weight) // 2
    targets, bias = torch.arange(30) % kept, torch.zeros(len(weight), dtype=torch.float64)
    bias[kept:] = -math.inf
    of_logps, of_entropy = torch.linspace(-1, 2, 30), 5 * torch.linspace(1, -1, 30)
    logps, entropy, gradients = by_autograd(hidden, weight[:kept], None, targets, of_logps, of_entropy)
    parts = [part.clone().requires_grad_() for part in (hidden, weight)]
    if of_logits:
        found = scores_of_logits(torch.nn.functional.linear(*parts, bias), targets, figures=FIGURES)
    else:
        found = token_log_probs(*parts, targets, bias=bias, figures=FIGURES, chunk_bytes=chunk_bytes)
    ((found.log_probs * of_logps).sum() + (found.entropy * of_entropy).sum()).backward()
    assert torch.allclose(found.log_probs, logps) and torch.allclose(found.entropy, entropy)
    assert found.log_sum_sq_probs.isfinite().all() and (found.mean_logits == -math.inf).all()
    close([parts[0].grad, parts[1].grad[:kept]], gradients[:2], 1e-12)
    assert not parts[1].grad[kept:].any()


@pytest.mark.parametrize("way", [token_log_probs, None])
def test_no_tokens_have_figures_of_the_usual_dtypes(way):
    hidden, weight, _, targets = example(3, dtype=torch.float32)
    some, none = (
        token_log_probs(hidden[:n], weight, targets[:n], figures=FIGURES)
        if way
        else scores_of_logits(hidden[:n] @ weight.t(), targets[:n], figures=FIGURES)
        for n in (3, 0)
    )
    assert [value.dtype for value in none] == [value.dtype for value in some]
    assert none.is_top1.dtype == torch.bool and all(value.shape == (0,) for value in none)
