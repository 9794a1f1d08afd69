"""What holds of all arithmetic with a matrix: it is done in its own precision, and it is finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def own_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has a function compute in the dtype of its tensors, also inside of ``torch.autocast``."""

    @wraps(function)
    def outside_autocast(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        enabled = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not enabled:  # to ask takes a microsecond, to enter a context twenty
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in enabled:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return outside_autocast


def not_finite(products: int | None = None) -> str:
    """Returns the message of the error for a product that is NaN or infinite.

    Args:
        products: how many had been taken when it was seen.
    """
    within = "" if products is None else f" (within {products} products)"
    return (
        f"A product with the matrix is not finite{within}. If loss and gradient are finite, it is "
        "the second derivative that is not, as that of a norm or a square root at 0: add an "
        "epsilon inside of it, or use FiniteDifferenceHessian. If they are not finite, lower the "
        "learning rate, or look for NaN in the parameters and the data."
    )
