"""What torch cannot differentiate twice, or gets wrong the second time: refused, or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from subspace_optim._validation import SecondDerivativeError


@contextmanager
def explained() -> Iterator[None]:
    """Adds the way out to torch's own error for an operation without a second derivative.

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
    """Looks for functions marked ``once_differentiable`` in the graph of the loss.

    Torch does not always raise for them: the node that would raise does not lie on the path from
    the gradient to the parameters, so the second backward pass goes around it, and their part of
    the Hessian is missing without an error.

    Raises:
        SecondDerivativeError: there is one.
    """
    for function in _functions(loss):
        if function is CheckpointFunction:
            raise SecondDerivativeError(_REENTRANT)
        backward = function.backward
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                cause = f"the backward pass of {function.__name__} is once_differentiable"
                raise SecondDerivativeError(_no_second_derivative(cause))
            backward = getattr(backward, "__wrapped__", None)


def has_functions(loss: Tensor) -> bool:
    """Whether the graph of the loss has autograd functions written in Python."""
    return any(True for _ in _functions(loss))


def refuse_reentrant_checkpoints(output: Tensor) -> None:
    """Looks for reentrant checkpoints, which pass gradients to ``.grad`` and nowhere else.

    Raises:
        SecondDerivativeError: there is one: the derivatives by its parameters would be missing.
    """
    if any(function is CheckpointFunction for function in _functions(output)):
        raise SecondDerivativeError(_REENTRANT)


_REENTRANT = (
    "A part of the model is checkpointed with use_reentrant=True, which gives no derivatives but "
    "in loss.backward(): those by its parameters would be missing. Use use_reentrant=False."
)
_ONCE: Any = once_differentiable(lambda ctx: ctx).__code__  # that of the wrapper it returns


def _functions(tensor: Tensor) -> Iterator[Any]:
    """Yields the autograd functions written in Python that are in the graph of ``tensor``."""
    pending: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            if hasattr(node, "_forward_cls"):
                yield node._forward_cls  # noqa: SLF001 (no public name)


def _no_second_derivative(cause: str) -> str:
    return (
        f"A part of the model has no second derivative: {cause}. FiniteDifferenceHessian takes "
        "the same arguments and needs gradients only."
    )


# --- functions whose second derivative torch lacks, or has wrong ---------------------------------


class _WrittenOut(TorchFunctionMode):
    """Calls the replacement of each function that has one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PARTS.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    gate = (input + 3).clamp(0, 6) / 6
    return input.copy_(gate) if inplace else gate


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    gate = _hardsigmoid(input)
    return input.mul_(gate) if inplace else input * gate


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ‖v‖``, the norm over all dimensions but one: torch's own is wrong in the second."""
    others = [d for d in range(v.dim()) if d != dim]
    if dim != -1 and v.dim() == 1:
        return v * (g / v.abs())
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1)
    return v * (g / norm)


@contextmanager
def written_out(*, forward: bool) -> Iterator[None]:
    """Replaces functions of torch with a wrong second derivative by compositions of others.

    By two means, since each misses calls that the other sees. The names in torch's modules are
    rebound: that reaches checkpointed parts, which run again in a backward pass, where function
    modes are off. The function mode reaches calls by names that were imported before.

    Args:
        forward: whether the model is called inside. If not, a mode would see nothing but our own
            calls, of which each takes some microseconds then.
    """
    places = [(F, "hardsigmoid"), (F, "hardswish"), (torch, "_weight_norm")]
    with ExitStack() as stack:
        for module, name in places:
            function = getattr(module, name)
            stack.callback(setattr, module, name, function)
            setattr(module, name, _PARTS.get(function, function))
        if forward:
            stack.enter_context(_WrittenOut())
        yield


_PARTS: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,  # noqa: SLF001 (called without F, too)
    F.hardswish: _hardswish,
    torch._C._nn.hardswish: _hardswish,  # noqa: SLF001
    torch._weight_norm: _weight_norm,  # noqa: SLF001
}
