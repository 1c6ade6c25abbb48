"""Losses, against float64 arithmetic and torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from hf_objectives.errors import ConfigError
from hf_objectives.losses.next_token import next_token_loss, next_token_targets, shifted_columns, token_nll


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 97, generator=generator).mul(4).to(dtype), torch.randint(0, 97, (50,), generator=generator)


def test_targets_by_hand():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, 9]])
    assert next_token_targets(labels).tolist() == [[6, -100, 7, -100], [-100, 8, 9, -100]]


def test_shifted_columns_by_hand():
    batch = {
        "labels": torch.tensor([[5, 6, -100, 7]]),
        "loss_weights": torch.tensor([[0.5, 2.0, 3.0, 4.0]]),
        "source_ids": torch.tensor([[0, 0, 1, 1]]),
        "input_ids": torch.tensor([[5, 6, 8, 7]]),
    }
    columns = shifted_columns(batch)
    assert {name: column.tolist() for name, column in columns.items()} == {
        "shift_labels": [[6, -100, 7, -100]], "shift_weights": [[2.0, 3.0, 4.0, 1.0]], "shift_sources": [[0, 1, 1, -1]],
    }  # fmt: skip
    parts = {name: column[:, 2:] for name, column in columns.items()}
    cut = {**batch, **parts, "input_ids": batch["input_ids"][:, 2:]}
    assert {name: column.tolist() for name, column in shifted_columns(cut).items()} == {
        "shift_labels": [[7, -100]], "shift_weights": [[4.0, 1.0]], "shift_sources": [[1, -1]],
    }  # fmt: skip


@pytest.mark.parametrize("pieces", [((0, 1), (2, 3)), ((0, 3), (1, 2))], ids=["halves", "both ends"])
def test_sums_and_gradients_of_parts_are_those_of_whole_rows(pieces):
    """Hidden states and targets of two rows, cut in two by halves and as context parallelism does."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 16, 8, generator=generator).requires_grad_()
    head = torch.randn(8, 31, generator=generator).requires_grad_()
    labels = torch.randint(0, 31, (2, 16), generator=generator).masked_fill(
        torch.rand(2, 16, generator=generator) < 0.3, -100
    )
    whole = torch.nn.functional.cross_entropy(
        (hidden[:, :-1] @ head).transpose(1, 2), labels[:, 1:], reduction="sum", label_smoothing=0.1
    )
    whole.backward()
    expected = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    shift_labels, total, count = shifted_columns({"labels": labels})["shift_labels"], 0.0, 0.0
    for part in pieces:
        states, targets = (
            torch.cat([value.chunk(4, dim=1)[piece] for piece in part], dim=1) for value in (hidden, shift_labels)
        )
        targets = shifted_columns({"shift_labels": targets, "labels": targets})["shift_labels"]
        positions = targets != -100
        result = next_token_loss(states[positions] @ head, targets[positions], label_smoothing=0.1)
        result.loss.backward()
        total, count = total + result.loss.item(), count + result.weight.item()
    assert total == pytest.approx(whole.item(), rel=1e-6) and count == int((labels[:, 1:] != -100).sum())
    for found, value in zip((hidden.grad, head.grad), expected, strict=True):
        assert torch.allclose(found, value, rtol=1e-6, atol=1e-6)


def test_nll_by_hand():
    # softmax of (0, ln 3) is (1/4, 3/4)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    assert token_nll(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(4), math.log(4 / 3)])


def test_nll_is_float64s_to_seven_digits():
    logits, targets = example()
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum").item()
    assert token_nll(logits, targets).double().sum().item() == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_cross_entropys(smoothing):
    logits, targets = example()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    result = next_token_loss(ours, targets, label_smoothing=smoothing)
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="sum", label_smoothing=smoothing)
    result.loss.backward()
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    assert result.nll.item() == pytest.approx(plain, rel=1e-6) and result.weight.item() == 50
    assert not result.nll.requires_grad


def test_z_loss_by_hand():
    logits, targets = torch.tensor([[0.0, 0.0]]), torch.tensor([0])
    assert next_token_loss(logits, targets, z_loss=0.5).loss.item() == pytest.approx(
        math.log(2) + 0.5 * math.log(2) ** 2
    )


def test_weights_by_hand():
    logits, targets = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    result = next_token_loss(logits, targets, weights=torch.tensor([1.0, 0.5, 0.0]))
    assert result.loss.item() == pytest.approx(1.5 * math.log(4)) and result.weight.item() == 1.5
    assert result.nll.item() == pytest.approx(3 * math.log(4))


def test_half_precision_is_computed_in_float32():
    logits, targets = example(torch.bfloat16)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
    assert next_token_loss(logits, targets).loss.item() == pytest.approx(expected, rel=1e-6)


def test_no_targets():
    result = next_token_loss(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long))
    result.loss.backward()
    assert result.loss.item() == 0 and result.weight.item() == 0


IDS = {"input_ids": torch.ones(1, 3)}


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (IDS, "no labels .it has input_ids.; expected a data_collator that gives labels"),
        ((1, 2), "no labels .it has tuple."),
        ({**IDS, "labels": torch.ones(1, 2)}, r"labels of shape \[1, 2\] for input_ids of shape \[1, 3\]"),
        ({**IDS, "shift_labels": torch.ones(1, 2)}, r"labels of shape \[1, 2\] for input_ids of shape \[1, 3\]"),
    ],
)
def test_a_batch_without_a_label_of_each_token(batch, words):
    with pytest.raises(ConfigError, match=words):
        shifted_columns(batch)
