"""Argument checks with one message style, and the errors and warnings of the package.

Every message names the argument, its value, what is allowed and the way out, and is raised before
anything has been changed.
"""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from typing import Any

import numpy as np
import torch


class ArgumentError(ValueError):
    """An argument that cannot be used: its name, its value, what is allowed, and the way out."""

    def __init__(self, argument: str, value: object, allowed: str, remedy: str = "") -> None:
        super().__init__(argument, value, allowed, remedy)

    def __str__(self) -> str:
        argument, value, allowed, remedy = self.args
        message = f"{argument} is {value!r}, but must be {allowed}."
        return f"{message} {remedy}" if remedy else message


class DataChangedError(ValueError):
    """A pass over the data that differs from the pass before: the curvature is not one matrix."""


class NonFiniteError(RuntimeError):
    """A loss, gradient or curvature product that is NaN or infinite."""


class SecondDerivativeError(RuntimeError):
    """A model part without a second derivative: a fused kernel, a function made for one pass."""


class NotOneFunctionError(RuntimeError):
    """A loss that is not one function of parameters and data, or not the mean it is taken for."""


class InconsistentDerivativeError(RuntimeError):
    """A gradient or a product that is not the derivative of the user's loss."""


class ConvergenceWarning(UserWarning):
    """An eigensolve that stopped before it reached the accuracy that was asked for."""


class StaleBasisWarning(UserWarning):
    """A refresh that failed: the last eigenbasis stays in use."""


class EngineWarning(UserWarning):
    """Second derivatives that are taken in another way than the one that was asked for."""


class NoGapWarning(UserWarning):
    """A subspace that is not defined: ``λ_k`` and ``λ_{k+1}`` cannot be told apart."""


class RanksWarning(UserWarning):
    """Ranks that train together and are measured each by itself."""


class LogWarning(UserWarning):
    """A row of a monitor that could not be measured, or that a file or a logger did not take."""


class OtherGradientWarning(UserWarning):
    """An optimizer that gets another gradient than that of the loss that is measured."""


class UnseenStepsWarning(UserWarning):
    """Parameters that move without the steps of the optimizer that is watched."""


class AttachedTwiceWarning(UserWarning):
    """A projection or a monitor that takes the place of one that was attached before."""


def check_integer(
    argument: str, value: Any, *, minimum: int, maximum: int | None = None, remedy: str = ""
) -> int:
    """Returns ``value`` as an int within ``[minimum, maximum]``.

    Raises:
        ArgumentError: it is no integer (booleans are none), or out of range.
    """
    allowed = f"an integer of at least {minimum}"
    if maximum is not None:
        allowed = f"an integer from {minimum} to {maximum}"
    if isinstance(value, bool):
        raise ArgumentError(argument, value, allowed, remedy)
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentError(argument, value, allowed, remedy) from None
    if number < minimum or (maximum is not None and number > maximum):
        raise ArgumentError(argument, number, allowed, remedy)
    return number


def check_number(
    argument: str,
    value: Any,
    *,
    minimum: float | None = 0.0,
    maximum: float = math.inf,
    exclusive: bool = False,
    infinite: bool = False,
    tensor: bool = False,
    remedy: str = "",
) -> float:
    """Returns ``value`` as a float within ``[minimum, maximum]``; NaN is never allowed.

    Args:
        argument: its name, for the message.
        value: a number; a tensor of one element too where ``tensor`` is set.
        minimum: the smallest value that is allowed (``None``: any).
        maximum: the largest value that is allowed.
        exclusive: the minimum itself is not allowed.
        infinite: infinities are allowed.
        tensor: allows a tensor of one element, as torch's optimizers do for ``lr``.
        remedy: the way out, added to the message.

    Raises:
        ArgumentError: it is none of these.
    """
    allowed = "a number" if infinite else "a finite number"
    if minimum is not None:
        allowed += f" {'above' if exclusive else 'of at least'} {minimum:g}"
    if maximum < math.inf:
        allowed += f" and at most {maximum:g}"
    number = math.nan
    with suppress(OverflowError):  # an integer of hundreds of digits
        if isinstance(value, torch.Tensor):
            if tensor and value.numel() == 1 and not value.is_complex():
                number = float(value)
        elif isinstance(value, int | float | np.integer | np.floating):
            number = math.nan if isinstance(value, bool) else float(value)
    low = minimum is not None and (number < minimum or (exclusive and number == minimum))
    if low or not number <= maximum or (math.isinf(number) and not infinite):
        raise ArgumentError(argument, value, allowed, remedy)
    return number


def check_flag(argument: str, value: Any, *, optional: bool = False) -> None:
    """Checks that ``value`` is True or False, or ``None`` where it is ``optional``.

    Raises:
        ArgumentError: it is none of these.
    """
    if not isinstance(value, bool) and not (optional and value is None):
        allowed = "True, False or None" if optional else "True or False"
        raise ArgumentError(argument, value, allowed)
