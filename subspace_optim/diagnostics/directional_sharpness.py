"""The curvature along a direction: by a product, or by losses alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import CurvatureOperator


def directional_sharpness(operator: CurvatureOperator, direction: Tensor) -> Tensor:
    r"""Returns the curvature along a direction: :math:`d^\top H d / \|d\|^2`, a Rayleigh quotient.

    It lies between the lowest eigenvalue and the sharpness λ_1. It costs a product.

    Args:
        operator: H.
        direction: d, ``(P,)``, of any length.

    Returns:
        A float64 scalar tensor; NaN for a direction of length 0.

    Raises:
        ArgumentError: the shape of the direction is another.
    """
    expected = (operator.parameters.size_here,)
    if direction.shape != expected:
        shape = tuple(direction.shape)
        raise ArgumentError("the shape of direction", shape, f"{expected}")
    return rayleigh_quotient(direction, operator.matvec(direction), operator.inner)


def rayleigh_quotient(direction: Tensor, product: Tensor, inner: InnerProduct = WHOLE) -> Tensor:
    """Returns ``d'Hd / d'd`` of a direction and its product, in float64."""
    d = direction.double()
    along, square = inner.sums(torch.dot(d, product.double()), torch.dot(d, d))
    return along / square


class Line(NamedTuple):
    """A loss along a line, near its beginning.

    Attributes:
        slope: its derivative.
        curvature: its second derivative; NaN where it is lost in rounding.
        reach: a good distance for differences on a line like this.
    """

    slope: float
    curvature: float
    reach: float


_LOST = 8.0
"""Up to so many times its rounding a second difference tells nothing."""
_CLEAR = 64.0
"""How many times its rounding it is at a good distance."""
_LONGER = 8.0
"""By what factor the reach grows where a difference is lost, or shrinks where a loss overflows."""
_NEAR = 4.0
"""By what factor a reach may miss the good distance."""
_TRIES = 3
"""How often differences are taken, until the reach is good: once, where it has been learned."""


def differences(rise: Callable[[float], float], reach: float, noise: float) -> Line:
    r"""Returns slope and curvature of a loss along a line by central differences.

    .. math:: \frac{L(h) - L(-h)}{2h}, \qquad \frac{L(h) + L(-h) - 2 L(0)}{h^2}

    Rounding moves the curvature by ``noise / h²``, which asks for a large h; what the loss has
    beside a quadratic moves it too, by a share of the order of ``(h / c)²`` for a loss that is
    smooth over a length c, and by all kinks within h of one with ReLU: that asks for a small h. A
    good one is the smallest at which the second difference stands clear of rounding, but no more
    than a quarter of the way to where the quadratic is as high again as at its beginning.

    Args:
        rise: ``c -> L(c) − L(0)``.
        reach: h, as earlier lines tell it; where it misses by far, another one is taken.
        noise: rounding of a loss.
    """
    for _ in range(_TRIES):
        line = _differences(rise, reach, noise)
        if reach / _NEAR <= line.reach <= reach * _NEAR:
            break
        reach = line.reach
    return line


def _differences(rise: Callable[[float], float], h: float, noise: float) -> Line:
    ahead, behind = rise(h), rise(-h)
    bend = ahead + behind
    if not math.isfinite(bend):
        return Line(math.nan, math.nan, h / _LONGER)
    slope = (ahead - behind) / (2 * h)
    if abs(bend) <= _LOST * noise:
        return Line(slope, math.nan, h * _LONGER)
    curvature = bend / h**2
    clear = math.sqrt(_CLEAR * noise / abs(curvature))
    quarter = abs(slope / (2 * curvature))
    return Line(slope, curvature, min(clear, max(quarter, clear / 2)))  # of half it is not lost yet
