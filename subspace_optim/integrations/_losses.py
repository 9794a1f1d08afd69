"""``ModelLoss``: the loss that a model returns when it is called with its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.forwards import Call


class ModelLoss:
    """``batch_loss(model, batch)`` of models that return their own loss.

    A batch is a ``Call`` that was taken in training; the micro-batches of a step count alike. Or
    it is a mapping of keyword arguments, whose mean counts by its examples.
    """

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        """Returns the loss and its weight.

        Raises:
            ArgumentError: the batch is neither, or the model returns no loss.
        """
        if isinstance(batch, Call):
            return loss_of(batch(model)), 1
        if not isinstance(batch, Mapping):
            remedy = "Pass loss=, a function of the model and a batch."
            raise ArgumentError("a batch", type(batch).__name__, "a mapping", remedy)
        return loss_of(model(**batch)), size_of(batch)


def loss_of(output: Any) -> Tensor:
    """Returns the loss in what a model returned.

    Raises:
        ArgumentError: there is none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif hasattr(output, "loss"):
        found = output.loss
    elif isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.numel() != 1:
        remedy = "Call it with labels, or pass loss=, a function of the model and a batch."
        raise ArgumentError("what the model returns", "without a loss", "one with a loss", remedy)
    return found.reshape(())


def size_of(batch: Any) -> int:
    """Returns the number of examples of a batch: the length of the first tensor in it.

    Raises:
        ArgumentError: there is no tensor.
    """
    leaves = torch.utils._pytree.tree_leaves(batch)  # noqa: SLF001 (torch's own, without a public name)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    remedy = "Pass loss=, a function of the model and a batch that returns the loss and its weight."
    raise ArgumentError("a batch", "without a tensor", "one with its examples in rows", remedy)
