"""A model and its loss of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.averages import Weight, averaged, examples
from subspace_optim.curvature.dtensors import whole
from subspace_optim.curvature.gathering import joint
from subspace_optim.curvature.sharding import Layout

BatchLossFunction = Callable[[Any, Any], tuple[Tensor, Any]]
"""``batch_loss(model, batch) -> (mean loss, weight)``: ``Supervised``, or the user's own."""


@dataclass
class Supervised:
    """``batch_loss(model, (x, y)) = loss_fn(model(x), y)``, and what it is a mean over.

    Args:
        loss_fn: ``loss_fn(output, target)``. Where ``averaged`` cannot tell what it is a mean
            over, it is taken for a mean over examples.

    Attributes:
        summed: whether the latest loss was a sum and no mean; its weight is then 1.
        unit: what its weight counts, in words.
    """

    loss_fn: Callable[[Any, Any], Tensor]
    summed: bool = field(default=False, init=False)
    unit: str = field(default="examples", init=False)

    def __call__(self, model: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Weight]:
        """Returns the loss of a batch and its weight."""
        x, y, count = self.split(batch)
        return self.of_output(model(x), y, count)

    def split(self, batch: Any) -> tuple[Any, Any, int]:
        """Returns the inputs and targets of a batch, and its number of examples.

        Raises:
            ArgumentError: the batch is no pair.
        """
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentError(
                "a batch of data",
                type(batch).__name__,
                "a pair (x, y)",
                "For batches of another form use HessianOperator.from_loss.",
            )
        x, y = batch
        return x, y, examples(x, y)

    def of_output(self, output: Any, y: Any, count: int) -> tuple[Tensor, Weight]:
        """Returns the loss of the model's output, and its weight: ``count`` if it does not tell."""
        average = averaged(self.loss_fn, output, y)
        self.summed, self.unit = average.summed, average.unit
        return average.loss, count if average.weight is None else average.weight


@dataclass
class BatchLoss:
    """The mean loss of one batch, as a function of the parameters that the model holds.

    Attributes:
        model: the model.
        function: the loss of (model, batch).
        batch: the data.
        seed: of what draws at random while it is evaluated.
        layout: of a model that is sharded: the ranks' batches are then one, and its loss and weight
            are those of all of them together.
        idle: whether the batch stands in for one that this rank does not have, and counts nothing.
    """

    model: nn.Module
    function: BatchLossFunction
    batch: Any
    seed: int
    layout: Layout | None = None
    idle: bool = False

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Returns the loss and its weight, both scalars."""
        return self.scalars(self.function(self.model, self.batch))

    def scalars(self, result: Any) -> tuple[Tensor, Tensor]:
        """Returns what the function has returned as two scalars, of the batches of all ranks."""
        if self.layout is None:
            return as_scalars(result)
        if isinstance(result, tuple) and len(result) == 2:
            result = whole(result[0]), result[1]
        loss, weight = as_scalars(result)
        return joint(self.layout, loss, torch.zeros_like(weight) if self.idle else weight)


def as_scalars(result: Any) -> tuple[Tensor, Tensor]:
    """Returns a mean loss and its weight as two scalar tensors.

    Raises:
        ArgumentError: the loss is not a real scalar, or there is no weight with it.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise ArgumentError("what batch_loss returns", type(result).__name__, "(mean loss, weight)")
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


def check_batch_loss(batch_loss: BatchLossFunction) -> None:
    """Checks that a loss can be called.

    Raises:
        ArgumentError: it cannot.
    """
    if isinstance(batch_loss, Supervised):
        if not callable(batch_loss.loss_fn):
            allowed = "callable as loss_fn(output, target)"
            raise ArgumentError("loss_fn", batch_loss.loss_fn, allowed)
    elif not callable(batch_loss):
        raise ArgumentError("batch_loss", batch_loss, "callable as batch_loss(model, batch)")


class Places:
    """Where parameters are registered: each module, and the name that it has them under.

    They are found by identity. So a layer that is registered twice, or a parameter that several
    modules share, is replaced once in each place, and put back to what was there.

    Args:
        modules: each once.
        parameters: what stands there now.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
        index = {id(p): i for i, p in enumerate(parameters)}
        self._places = [
            (module._parameters, name, index[id(p)])  # noqa: SLF001 (setattr() would check, and register)
            for module in modules
            for name, p in module._parameters.items()  # noqa: SLF001
            if p is not None and id(p) in index
        ]

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Puts ``values`` in the places of the parameters, and the same parameters back."""
        before = [owner[name] for owner, name, _ in self._places]
        try:
            for owner, name, i in self._places:
                owner[name] = values[i]  # type: ignore[assignment]
            yield
        finally:
            for (owner, name, _), parameter in zip(self._places, before, strict=True):
                owner[name] = parameter


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
