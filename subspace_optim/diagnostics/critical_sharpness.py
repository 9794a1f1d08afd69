"""How much longer a step may be before the loss rises: found by forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, NonFiniteError, check_integer, check_number
from subspace_optim.curvature.operator import CurvatureOperator

_WIDTH = 1 / 16
_FORWARDS = 8
_FASTEST = 8.0
"""By what factor a bracket may be sought at first: what is extrapolated is not trusted further."""


class CriticalMultiple(NamedTuple):
    """How long a step may be.

    Attributes:
        multiple: of the step, at which the loss is as before it; beyond it the loss has risen. NaN
            where none was found; 0 where the step goes uphill from the beginning.
        lower: a multiple at which the loss has not risen; 0 where none was found.
        upper: the smallest that was tried at which it has; infinite where none was.
        forwards: how many losses were asked for.
    """

    multiple: float
    lower: float
    upper: float
    forwards: int


def critical_sharpness(
    operator: CurvatureOperator,
    update: Tensor,
    lr: float,
    *,
    width: float = _WIDTH,
    forwards: int = _FORWARDS,
) -> float:
    r"""Returns the critical sharpness of an update.

    .. math:: \lambda_c = \frac{2}{\eta_c}, \qquad
              \eta_c = \eta \, \min \{ c > 0 : L(\theta + c\, u) > L(\theta) \}

    with the update u of rate η: the smallest rate at which the step would raise the loss. On a
    quadratic, for ``u = −η g``, it is the curvature :math:`g^\top H g / \|g\|^2` along the
    gradient, and so at most λ_1. Training at rate η is stable as long as ``λ_c < 2/η``: this asks
    nothing of the optimizer, which may be any. The loss of another operator than that of training
    gives the *relative* critical sharpness of one loss along the other's direction.

    The crossing is sought from c = 1, by doubling and bisection, where the line through the mean
    slopes ``(L(θ + c u) − L(θ)) / c`` does not point to it: that is exact on quadratics. What is
    found is a crossing from below to above; the loss may have crossed and come back before. It is
    told within ``width``, but for losses that the passes do not suffice for, such as those that
    explode beyond the crossing: there ``forwards`` ends the search before, with less.

    It costs a forward pass at θ and up to ``forwards`` others; mostly 4 or 5.

    Args:
        operator: of the loss.
        update: u, ``(P,)``.
        lr: η.
        width: of the bracket, relative to the crossing, at which the search ends.
        forwards: after so many passes it ends too.

    Returns:
        λ_c; infinite for a step that goes uphill from the beginning; NaN where no crossing was
        found.

    Raises:
        ArgumentError: an argument is out of range, or of another shape.

    Reference:
        Kalra et al. 2026, *A scalable measure of loss landscape curvature for analyzing the
        training dynamics of LLMs*, arXiv 2601.16979.
    """
    check_number("lr", lr, exclusive=True)
    expected = (operator.parameters.size_here,)
    if update.shape != expected:
        raise ArgumentError("the shape of update", tuple(update.shape), f"{expected}")
    space = operator.parameters
    theta = space.flatten(space.tensors)

    start = operator.loss()
    found = critical_multiple(
        lambda c: loss_at(operator, theta.add(update, alpha=c)) - start,
        noise=rounding_of(start, operator.dtype),
        width=width,
        forwards=forwards,
    )
    return sharpness_of(found.multiple, lr)


def loss_at(operator: CurvatureOperator, theta: Tensor) -> float:
    """Returns the loss at other parameters, ``(P,)``; infinite where it overflows."""
    with operator.at(theta):
        try:
            return operator.loss()
        except NonFiniteError:
            return math.inf


def rounding_of(loss: float, dtype: torch.dtype) -> float:
    """Returns a bound of the rounding of a loss, absolute.

    A small loss can be a difference of numbers of order one, as the cross-entropy of examples that
    are fitted.
    """
    return 4 * torch.finfo(dtype).eps * max(1.0, abs(loss))


def sharpness_of(multiple: float, lr: float) -> float:
    """Returns ``2 / (c η)``."""
    rate = multiple * lr
    return math.inf if rate == 0 else 2 / rate


def critical_multiple(
    rise: Callable[[float], float],
    *,
    slope: float | None = None,
    known: Mapping[float, float] = MappingProxyType({}),
    noise: float = 0.0,
    guess: float = 1.0,
    width: float = _WIDTH,
    forwards: int = _FORWARDS,
) -> CriticalMultiple:
    """Returns the multiple of a step at which the loss is as high again as before it.

    Args:
        rise: ``c -> L(θ + c u) − L(θ)``.
        slope: its derivative at 0, if that is known.
        known: rises that are known already, by the multiple.
        noise: rises that are smaller are nothing but rounding.
        guess: where the search begins.
        width: relative, of the bracket at the end.
        forwards: how often ``rise`` may be called.

    Returns:
        The multiple, with its bracket.

    An argument that is out of range raises ``ArgumentError``.
    """
    check_number("width", width, exclusive=True)
    check_number("guess", guess, exclusive=True)
    check_integer("forwards", forwards, minimum=1)
    if slope is not None and slope >= 0:
        return CriticalMultiple(0.0 if slope > 0 else math.nan, 0.0, math.inf, 0)
    rises = dict(known)
    slopes = {} if slope is None else {0.0: slope}  # mean slopes, by the multiple
    slopes |= {c: rise / c for c, rise in known.items() if math.isfinite(rise)}
    lower, upper = _bracket(rises)
    root = _crossing(slopes, lower, upper)
    # Where what is known points near the guess, it is more exact than that.
    agreed = root is not None and guess / 2 < root < 2 * guess
    trial = _next(slopes, lower, upper, width, 0) if agreed or guess in rises else guess
    for tried in range(1, forwards + 1):
        found = rise(trial)
        rises[trial] = math.inf if math.isnan(found) else found
        if math.isfinite(found):
            slopes[trial] = found / trial
        lower, upper = _bracket(rises)
        if upper <= lower * (1 + width):
            break
        trial = _next(slopes, lower, upper, width, tried)
    multiple = _multiple(rises, slopes, lower, upper, noise)
    return CriticalMultiple(multiple, lower, upper, len(rises) - len(known))


def _multiple(
    rises: Mapping[float, float],
    slopes: Mapping[float, float],
    lower: float,
    upper: float,
    noise: float,
) -> float:
    """Returns the crossing in a bracket; 0 where all of it is uphill; NaN where nobody can tell."""
    if upper == math.inf:
        return math.nan
    if lower == 0:
        near, far = [*sorted(slopes), 0.0, 0.0][:2]
        if near == 0 or far == 0 or rises[near] <= noise:
            return math.nan
        rate = (slopes[far] - slopes[near]) / (far - near)
        return 0.0 if slopes[near] > rate * near else math.nan  # the slope at 0 is above 0
    root = _crossing(slopes, lower, upper)
    crossing = root if root is not None and lower <= root <= upper else math.sqrt(lower * upper)
    # The loss dips before it is as high again: below its rounding, or there is nothing to see.
    dip = max(-min(rises.values()), -slopes.get(0.0, 0.0) * crossing / 4)
    return crossing if dip > noise else math.nan


def _bracket(rises: Mapping[float, float]) -> tuple[float, float]:
    """Returns the smallest multiple with a rise, infinite for none, and the largest below it."""
    upper = min((c for c, rise in rises.items() if rise > 0), default=math.inf)
    return max((c for c, rise in rises.items() if c < upper and rise <= 0), default=0.0), upper


def _next(
    slopes: Mapping[float, float], lower: float, upper: float, width: float, tried: int
) -> float:
    """Returns where to look next: where the slopes point, or else double, half or the middle."""
    if lower and upper < math.inf and tried % 3 == 0:  # it narrows, whatever the slopes say
        return math.sqrt(lower * upper)
    root = _crossing(slopes, lower, upper)
    fastest = _FASTEST if tried < 3 else _FASTEST**2  # as far as that has not been enough
    # To either side of the crossing, so that two looks make a bracket that is narrow enough.
    ahead, behind = math.pow(1 + width, 0.45), math.pow(1 + width, -0.45)
    if upper == math.inf:
        if root is None or not root > lower:
            return 2 * lower
        return min(max(root * ahead, lower * (1 + width)), fastest * lower)
    if lower == 0:
        if root is None or not 0 < root < upper:
            return upper / 2
        return max(min(root * behind, upper / (1 + width)), upper / fastest)
    if root is None:
        return math.sqrt(lower * upper)
    if root * ahead < upper and upper - root > root - lower:
        return max(root * ahead, lower * math.pow(1 + width, 0.5))
    margin = math.pow(1 + width, 0.2)
    return min(max(root * behind, lower * margin), upper / margin)


def _crossing(slopes: Mapping[float, float], lower: float, upper: float) -> float | None:
    """Returns where the mean slope, taken to be linear between two multiples, is 0.

    The mean slope of a quadratic is linear. Of those that are known the nearest to the bracket
    count.
    """
    near = sorted(slopes, key=lambda c: min(abs(c - lower), abs(c - upper)))
    near = [c for c in (lower, upper) if c in slopes] + [c for c in near if c not in (lower, upper)]
    if len(near) < 2:
        return None
    a, b = near[:2]
    rate = (slopes[b] - slopes[a]) / (b - a)
    return b - slopes[b] / rate if rate > 0 else None
