"""The derivatives of one batch's loss: its gradient, and the engines of its Hessian's products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.func import grad
from torch.utils.checkpoint import CheckpointFunction

from subspace_optim._validation import SecondDerivativeError

Slopes = Sequence[Tensor | None]
# Parameters -> mean loss of a batch, and its weight.
LossAt = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


def _unknown(v: list[Tensor]) -> Slopes:
    """The product of a loss that has not been differentiated twice."""
    raise NotImplementedError


@dataclass
class Linearisation:
    """The loss of one batch near fixed parameters, as far as it has been differentiated.

    Attributes:
        loss: the mean loss.
        weight: what it is a mean over.
        slopes: its gradient, a tensor or ``None`` (zeros) for each parameter.
        product: the linear map ``v -> Hv``, in tensors of the parameters' shapes.
    """

    loss: Tensor
    weight: Tensor
    slopes: Slopes = ()
    product: Callable[[list[Tensor]], Slopes] = _unknown


def first_order(loss_at: LossAt, leaves: Sequence[Tensor]) -> Linearisation:
    """Returns loss and gradient."""
    loss, weight = loss_at(leaves)
    refuse_reentrant_checkpoints(loss)
    return Linearisation(loss.detach(), weight, _gradient(loss, leaves))


def double_backward(loss_at: LossAt, leaves: Sequence[Tensor]) -> Linearisation:
    """Returns loss, gradient, and products by a second backward pass through the first one."""
    with explained():
        loss, weight = loss_at(leaves)
        refuse_functions_of_one_pass(loss)
        slopes = _gradient(loss, leaves, create_graph=True)
    return _twice(loss, weight, slopes, leaves)


def func(loss_at: LossAt, leaves: Sequence[Tensor]) -> Linearisation:
    """Returns the same, with the gradient as a transformed function of ``torch.func``."""

    def valued(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, weight = loss_at(leaves)
        return loss, (loss, weight)

    with explained():
        slopes, (loss, weight) = grad(valued, has_aux=True)(tuple(leaves))
        refuse_functions_of_one_pass(loss)
    return _twice(loss, weight, slopes, leaves)


ENGINES = {"double_backward": double_backward, "func": func}


def _gradient(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> Slopes:
    if not loss.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)


def _twice(loss: Tensor, weight: Tensor, slopes: Slopes, leaves: Sequence[Tensor]) -> Linearisation:
    """Completes a gradient that carries a graph by the products with its Jacobian.

    H is symmetric: the transposed product of the gradient's Jacobian is the product. The map
    holds the ends of the graph, not the gradient: a kept graph has no P-sized tensor of its own.
    """
    curved = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]
    ends = [get_gradient_edge(s) for s in slopes if s is not None and s.requires_grad]
    dtypes = [s.dtype for s in slopes if s is not None and s.requires_grad]

    def product(v: list[Tensor]) -> Slopes:
        if not ends:
            return (None,) * len(leaves)
        directions = [v[i].to(dtype) for i, dtype in zip(curved, dtypes, strict=True)]
        with explained():
            return torch.autograd.grad(
                ends, leaves, directions, retain_graph=True, allow_unused=True
            )

    held = [None if s is None else s.detach() for s in slopes]
    return Linearisation(loss.detach(), weight, held, product)


@contextmanager
def explained() -> Iterator[None]:
    """Tells of the way out where torch tells that it has no second derivative.

    Raises:
        SecondDerivativeError: an operation of the model has none.
        RuntimeError: as it was, for any other reason.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "derivative for" in str(error) and "not implemented" in str(error):
            raise SecondDerivativeError(_no_second_derivative(str(error))) from error
        raise


def refuse_functions_of_one_pass(loss: Tensor) -> None:
    """Looks for functions marked ``once_differentiable`` among those that made the loss.

    Torch's own error for them is lost: it lies beside the path from gradient to parameters, so
    the second pass goes around it and leaves their part of the Hessian out without a word.

    Raises:
        SecondDerivativeError: there is one.
    """
    for node in _nodes(loss):
        function: Any = getattr(node, "_forward_cls", None)
        if function is CheckpointFunction:
            raise SecondDerivativeError(_REENTRANT)
        backward = getattr(function, "backward", None)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                cause = f"the backward pass of {function.__name__} is once_differentiable"
                raise SecondDerivativeError(_no_second_derivative(cause))
            backward = getattr(backward, "__wrapped__", None)


def refuse_reentrant_checkpoints(output: Tensor) -> None:
    """Looks for checkpointed parts whose backward pass leads to no parameter but by ``.grad``.

    Raises:
        SecondDerivativeError: there is one: derivatives by its parameters would be missing.
    """
    if any(getattr(node, "_forward_cls", None) is CheckpointFunction for node in _nodes(output)):
        raise SecondDerivativeError(_REENTRANT)


_REENTRANT = (
    "A part of the model is checkpointed with use_reentrant=True, which gives no derivatives but "
    "in loss.backward(): those by its parameters would be missing. Use use_reentrant=False."
)
_ONCE: Any = once_differentiable(lambda ctx: ctx).__code__  # that of the wrapper it returns


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """Yields the nodes of the graph that made ``tensor``, each once."""
    pending: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            yield node


def _no_second_derivative(cause: str) -> str:
    return (
        f"A part of the model has no second derivative: {cause}. FiniteDifferenceHessian takes "
        "the same arguments and needs gradients only."
    )
