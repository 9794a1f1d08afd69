"""The losses against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import vmap

from benchmarks.losses import LOSSES, accuracy, cross_entropy, mse

OUTPUT = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 0])


def test_mse_by_hand() -> None:
    """Residuals (1, 1, -1) and (-0.5, 0, 3): half of 3 and half of 9.25, then their mean."""
    assert mse(OUTPUT, LABELS).item() == pytest.approx((1.5 + 4.625) / 2, rel=1e-15)


def test_cross_entropy_by_hand() -> None:
    """Log sum exp less the score of the label, mean over two examples."""
    first = math.log(math.exp(1) + math.exp(2) + math.exp(-1)) - 2
    second = math.log(math.exp(0.5) + 1 + math.exp(3)) - 0.5
    assert cross_entropy(OUTPUT, LABELS).item() == pytest.approx((first + second) / 2, rel=1e-14)


@pytest.mark.parametrize("name", ["mse", "ce"])
def test_mean_over_examples(name: str) -> None:
    """A loss of all is the mean of the losses of each, also when `vmap` takes them one by one."""
    loss = LOSSES[name]
    each = vmap(lambda output, label: loss(output[None], label[None]))(OUTPUT, LABELS)
    assert each.shape == (2,)
    assert each[0] != each[1]
    torch.testing.assert_close(each.mean(), loss(OUTPUT, LABELS))


def test_names() -> None:
    """The names that a command line takes are these two losses."""
    assert list(LOSSES.items()) == [("mse", mse), ("ce", cross_entropy)]


@pytest.mark.parametrize("label", [3, -1])
def test_mse_refuses_a_class_that_is_not_there(label: int) -> None:
    """A label outside the classes is an error, not a row of zeros."""
    with pytest.raises((RuntimeError, IndexError)):
        mse(OUTPUT, torch.tensor([label, 0]))


def test_accuracy_by_hand() -> None:
    """Largest scores are at 1 and 2: one of the two labels is right, then both, then none."""
    assert accuracy(OUTPUT, LABELS) == 0.5
    assert accuracy(OUTPUT, torch.tensor([1, 2])) == 1.0
    assert accuracy(OUTPUT, torch.tensor([0, 1])) == 0.0
