"""The choice of an implementation, its refusals, and those that are not ours."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from hf_objectives.errors import ConfigError, DataError
from hf_objectives.losses.linear_cross_entropy import (
    IMPLEMENTATIONS,
    check_targets,
    fused_linear_cross_entropy,
)
from tests.support.heads import by_autograd, close, example, ours


def test_torch_compile_calls_it():
    hidden, weight, bias, targets = example(30, dtype=torch.float32)

    @torch.compile(backend="eager")
    def loss(hidden, weight):
        return fused_linear_cross_entropy(hidden * 2, weight, targets, bias=bias).loss * 0.5

    parts = [hidden.requires_grad_(), weight.requires_grad_()]
    found = loss(*parts)
    found.backward()
    expected, _, gradients = by_autograd(hidden * 2, weight, bias, targets)
    assert found.item() == pytest.approx(0.5 * expected, rel=1e-6)
    close([hidden.grad, weight.grad], [gradients[0], 0.5 * gradients[1]], 1e-5)


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"weights": True}], ids=str)
def test_torchs_own(options):
    hidden, weight, bias, targets = example(50, dtype=torch.float32)
    if "weights" in options:
        options = {"weights": torch.rand(50)}
    loss, nats, gradients = by_autograd(hidden, weight, bias, targets, **options)
    result, found = ours(hidden, weight, bias, targets, implementation="torch", **options)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(result.token_nll.double(), nats, rtol=1e-5, atol=1e-5)
    close(found, gradients, 1e-5)


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("Torch", {}, "is 'Torch'; expected one of chunked, torch, liger, cut_cross_entropy; did you mean 'torch'"),
        ("torch", {"z_loss": 1e-4}, "has no label smoothing, z-loss or soft-capping in chunks; expected one of chunked"),
        ("liger", {}, "'liger' is not installed (pip install liger-kernel); expected one of chunked, torch"),
        ("cut_cross_entropy", {}, "is not installed (pip install cut-cross-entropy); expected one of chunked, torch"),
    ],
)  # fmt: skip
def test_an_implementation_that_cannot_names_those_that_can(name, options, found, monkeypatch):
    monkeypatch.setattr("hf_objectives.losses.linear_cross_entropy.find_spec", lambda module: None)
    hidden, weight, _, targets = example(5, dtype=torch.float32)
    with pytest.raises(ConfigError) as error:
        fused_linear_cross_entropy(hidden, weight, targets, implementation=name, **options)
    assert found in str(error.value)


@pytest.mark.parametrize("name", ["liger", "cut_cross_entropy"])
def test_kernels_for_cuda_are_refused_on_a_cpu(name, monkeypatch):
    monkeypatch.setattr("hf_objectives.losses.linear_cross_entropy.find_spec", lambda module: object())
    hidden, weight, _, targets = example(5, dtype=torch.float32)
    with pytest.raises(ConfigError, match=f"'{name}' does not run on cpu; expected one of chunked, torch"):
        fused_linear_cross_entropy(hidden, weight, targets, implementation=name)


def test_kernels_are_called_as_they_document(monkeypatch):
    """Their packages need a GPU: stand-ins with their signatures show that scale, weights and z-loss come out right."""

    def liger(input, weight, target, bias=None, reduction="mean", softcap=None, accum_dtype=None):
        assert reduction == "none" and accum_dtype == torch.float32
        logits = torch.nn.functional.linear(input, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    def cut(e, c, targets, bias=None, softcap=None, reduction="mean", return_lse=False, impl="cce"):
        assert return_lse and impl == "cce_exact"
        nats = liger(e, c, targets, bias, reduction, softcap, torch.float32)
        return nats, torch.nn.functional.linear(e, c, bias).logsumexp(-1)

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = liger
    package = ModuleType("cut_cross_entropy")
    package.linear_cross_entropy = cut
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    for name, own in (("liger", {"softcap": 5.0}), ("cut_cross_entropy", {"z": 0.01})):
        one = IMPLEMENTATIONS[name]
        monkeypatch.setitem(IMPLEMENTATIONS, name, one._replace(lacks=lambda device, options: None))
        hidden, weight, bias, targets = example(20)
        options = {"weights": torch.rand(20, dtype=torch.float64), "scale": 0.5, **own}
        loss, _, gradients = by_autograd(hidden, weight, bias, targets, **options)
        options["z_loss"] = options.pop("z", 0.0)
        result, found = ours(hidden, weight, bias, targets, implementation=name, **options)
        assert result.loss.item() == pytest.approx(loss, rel=1e-6)
        close(found, gradients, 1e-6)


def test_a_label_outside_the_head_is_named():
    with pytest.raises(
        DataError, match="^row 1: token 2 is to predict id 97; expected 0 to 96, the entries of the head"
    ):
        check_targets(torch.tensor([[5, -100, 96], [0, 1, 97]]), 97)
    hidden, weight, _, _ = example(3)
    with pytest.raises(DataError, match="token 1 is to predict id -5"):
        fused_linear_cross_entropy(hidden, weight, torch.tensor([3, -5, 99]))


def test_two_dtypes_are_refused_outside_autocast():
    hidden, weight, _, targets = example(3, dtype=torch.float32)
    with pytest.raises(ConfigError, match="hidden states are torch.bfloat16, the head's weight torch.float32"):
        fused_linear_cross_entropy(hidden.bfloat16(), weight, targets)


def test_a_target_that_is_no_entry_makes_the_loss_nan():
    """Where a device is not waited for, the guard against losses that are not finite finds it."""
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    found = fused_linear_cross_entropy(hidden, weight, torch.tensor([2, 7, -5]), trusted=True)
    alone = torch.nn.functional.cross_entropy(hidden[:1] @ weight.T, torch.tensor([2]))
    assert found.token_nll[0].item() == pytest.approx(alone.item(), rel=1e-6)
    assert found.token_nll[1:].isnan().all() and found.loss.isnan()
