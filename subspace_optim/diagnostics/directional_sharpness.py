"""The curvature along a direction: by a product, or by losses alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
    if direction.shape != (operator.size,):
        shape = tuple(direction.shape)
        raise ArgumentError("the shape of direction", shape, f"({operator.size},)")
    return rayleigh_quotient(direction, operator.matvec(direction))


def rayleigh_quotient(direction: Tensor, product: Tensor) -> Tensor:
    """Returns ``d'Hd / d'd`` of a direction and its product, in float64."""
    d = direction.double()
    return torch.dot(d, product.double()) / torch.dot(d, d)


class Line(NamedTuple):
    """A loss along a line, near its beginning.

    Attributes:
        slope: its derivative.
        curvature: its second derivative; NaN where it is lost in rounding.
        reach: a good distance for differences on a line like this: a quarter of the way to where
            the quadratic is as high again as at its beginning.
    """

    slope: float
    curvature: float
    reach: float


_CLEAR = 8.0
"""How many times its rounding a second difference has to be."""
_FARTHER = 8.0
"""By what factor the reach changes at most, from one line to the next."""


def differences(rise: Callable[[float], float], reach: float, noise: float) -> Line:
    r"""Returns slope and curvature of a loss along a line by central differences.

    .. math:: \frac{L(h) - L(-h)}{2h}, \qquad \frac{L(h) + L(-h) - 2 L(0)}{h^2}

    Each is off by a share of the order of ``(h / c)²`` where the loss differs from a quadratic at
    the distance c: at a quarter of the way to where it is as high again, by a few per cent at most.

    Args:
        rise: ``c -> L(c) − L(0)``.
        reach: h.
        noise: rounding of a loss.
    """
    ahead, behind = rise(reach), rise(-reach)
    bend = ahead + behind
    slope, curvature = (ahead - behind) / (2 * reach), bend / reach**2
    if not math.isfinite(bend):
        return Line(math.nan, math.nan, reach / _FARTHER)
    if abs(bend) <= _CLEAR * noise:
        return Line(slope, math.nan, reach * _FARTHER)
    crossing = abs(2 * slope / curvature)
    nearest, farthest = reach / _FARTHER, reach * _FARTHER
    return Line(slope, curvature, min(max(crossing / 4, nearest), farthest))
