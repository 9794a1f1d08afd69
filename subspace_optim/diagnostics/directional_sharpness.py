"""The curvature along a direction."""

from __future__ import annotations

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
