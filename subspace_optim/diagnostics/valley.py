"""The river under the hill: what the loss would be at the bottom of the valley's steep walls.

Training at a large rate goes back and forth between the walls of a valley, the few directions of
large curvature, while it moves along its floor, the river. Its loss is that of the river and that
of the height above it; when the rate falls the height goes, and the loss with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.eigenbasis import EigenBasis


class Valley(NamedTuple):
    """A point on the wall of a valley.

    Attributes:
        loss: ``L(θ)``.
        river_loss: the loss of the point below, on the floor.
        predicted_height: ``½ Σ g_i²/λ_i``, the height if the loss were quadratic there.
    """

    loss: float
    river_loss: float
    predicted_height: float

    @property
    def hill_height(self) -> float:
        """``L(θ)`` less the loss of the river; below 0 where the Newton step overshoots."""
        return self.loss - self.river_loss


def valley(operator: CurvatureOperator, basis: EigenBasis) -> Valley:
    r"""Returns the loss after a Newton step inside the dominant subspace: that of the river below.

    .. math:: L_{\mathrm{river}} = L\Big( \theta - \sum_{i:\, \lambda_i > 0}
              \frac{g_i}{\lambda_i}\, u_i \Big), \qquad g_i = \langle u_i, \nabla L(\theta) \rangle

    The step ends where the quadratic model has no slope along these eigenvectors, and leaves the
    others alone. Pairs whose eigenvalue is not above its residual do not count: nothing is known
    of its sign, and a step along it would go to a maximum, or anywhere. The ``predicted_height``
    tells how far the loss is from that model: it is the ``hill_height`` of a quadratic.

    It costs a gradient and a forward pass over the data, and three vectors of P; the model's
    parameters are not written to. In float32 both losses have an error of about 1e-7, relative,
    so that a height below that of the loss is noise; in bf16 the step is rounded as the parameters
    are.

    Args:
        operator: the Hessian; the basis has to be its own at the present parameters.
        basis: its top eigenpairs.

    Returns:
        Both losses and the predicted height.

    Raises:
        ArgumentError: the basis has another size.

    Reference:
        Wen, Li, Wang, Hall, Liang & Ma 2024, *Understanding warmup-stable-decay learning rates: a
        river valley loss landscape perspective* (arXiv 2410.05192), for river and hill; they have
        the river as a curve, we its point below θ by one step. `song_2024`: updates of the dominant
        subspace do not lower the loss in the long run.
    """
    space = operator.parameters
    if basis.size != operator.size:
        allowed = f"{operator.size}, as of the operator"
        raise ArgumentError("the size of the basis", basis.size, allowed)
    with operator.frozen():
        gradient, loss = operator.gradient(), operator.loss()
    slopes = basis.coefficients(gradient).double()
    eigenvalues = basis.eigenvalues.double()
    floor = torch.finfo(basis.dtype).eps * basis.largest
    known = eigenvalues > basis.residuals.double().clamp(min=floor)
    lengths = torch.where(known, slopes / eigenvalues.where(known, 1.0), 0.0)
    step = basis.combine(lengths.to(basis.dtype))
    theta = space.flatten([p.detach() for p in space.tensors]).sub_(step.to(operator.dtype))
    with operator.at(theta):
        river_loss = operator.loss()
    return Valley(loss, river_loss, float((lengths * slopes).sum() / 2))


def hill_share(before: Valley, after: Valley) -> float:
    r"""Returns the share of a decrease of the loss that came from the height above the river.

    .. math:: \frac{h_t - h_{t+1}}{L_t - L_{t+1}}, \qquad h = L - L_{\mathrm{river}}

    What is left to 1 is the share of the river's own descent. Both are shares of the change,
    whatever its sign: where the loss has risen, that of the rise. Below 0 or above 1, hill and
    river have moved in opposite ways: at the edge of stability the river falls while the height
    rises and falls. It means little where the loss has hardly changed.

    Args:
        before: at step t.
        after: at a later one.

    Returns:
        The share; NaN where the loss has not changed, or is not finite.

    Reference:
        As of ``valley``.
    """
    change = before.loss - after.loss
    if change == 0 or not math.isfinite(change):
        return math.nan
    return (before.hill_height - after.hill_height) / change
