"""A model and its loss as one function of the parameters and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError

BatchLoss = Callable[[Any, Any], tuple[Tensor, Any]]
Result = TypeVar("Result")


@dataclass
class OfBatch:
    """Marks a function of (model, batch), where else a loss of (output, target) stands."""

    function: BatchLoss


class Holder(nn.Module):
    """Holds a model for ``functional_call``, which puts other parameters into it for a while.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, action: Callable[[], Result]) -> Result:
        """Returns ``action()``, done while other parameters are in the model."""
        return action()


class Objective(Holder):
    """A model, and its loss of a batch.

    Args:
        model: the model.
        batch_loss: ``batch_loss(model, batch) -> (mean loss, weight)``.
    """

    def __init__(self, model: nn.Module, batch_loss: BatchLoss) -> None:
        super().__init__(model)
        self.batch_loss = batch_loss

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Returns the mean loss of a batch and its weight, both scalars.

        Raises:
            ArgumentError: the loss is not a real scalar, or there is no weight with it.
        """
        result = self.batch_loss(self.model, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ArgumentError(
                "what batch_loss returns", type(result).__name__, "(mean loss, weight)"
            )
        loss, weight = result
        if not isinstance(loss, Tensor):
            raise ArgumentError("the loss", type(loss).__name__, "a scalar tensor")
        if loss.dim() != 0:
            remedy = "Take the mean over examples, e.g. with reduction='mean'."
            raise ArgumentError("the shape of the loss", tuple(loss.shape), "()", remedy)
        if not loss.is_floating_point():
            raise ArgumentError("the dtype of the loss", loss.dtype, "real floating point")
        weight = torch.as_tensor(weight, dtype=torch.float64, device=loss.device)
        return loss, weight.detach()


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model itself, without the wrappers that add nothing to the function.

    Those of ``torch.compile`` would take the second derivative away.
    """
    for attribute in ("module", "_orig_mod"):
        wrapper = nn.parallel.DistributedDataParallel if attribute == "module" else nn.Module
        inner = getattr(model, attribute, None)
        if isinstance(model, wrapper) and isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model
