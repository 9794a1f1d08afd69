"""The training losses of the papers, as functions of (output, labels), and the accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["LOSSES", "accuracy", "cross_entropy", "mse"]


def mse(output: Tensor, labels: Tensor) -> Tensor:
    """Half the squared error against one-hot targets, summed over classes, mean over examples.

    ``mean_n 1/2 sum_c (output[n, c] - [c == labels[n]])^2``

    This is not ``torch.nn.MSELoss()``, which has no half and also divides by the number of
    classes C: that loss is ``2 / C`` times this one. Its gradient and its Hessian are smaller by
    the same factor, so that a learning rate, a sharpness and the threshold ``2 / lr`` of the
    papers would mean something else.

    Args:
        output: One row of class scores an example, shape (N, C).
        labels: Class numbers, int64, shape (N,).

    Returns:
        The loss, a scalar tensor of the output's dtype.
    """
    # Not functional.one_hot: it reads the largest label on the host, a synchronisation a call.
    targets = torch.zeros_like(output).scatter(-1, labels.unsqueeze(-1), 1.0)
    return 0.5 * (output - targets).square().sum(dim=-1).mean()


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood of the labels under softmax(output), mean over examples.

    Args:
        output: One row of class scores (logits) an example, shape (N, C).
        labels: Class numbers, int64, shape (N,).

    Returns:
        The loss, a scalar tensor of the output's dtype.
    """
    return functional.cross_entropy(output, labels)


def accuracy(output: Tensor, labels: Tensor) -> float:
    """The share of the examples whose largest score is at their label.

    Args:
        output: One row of class scores an example, shape (N, C).
        labels: Class numbers, int64, shape (N,).

    Returns:
        A number in [0, 1].
    """
    return (output.argmax(dim=-1) == labels).double().mean().item()


LOSSES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"mse": mse, "ce": cross_entropy}
