"""``directional_sharpness()``: the curvature along the update and along the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from subspace_optim.diagnostics.directional_sharpness import rayleigh_quotient
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step


def directional_sharpness(*, gradient: bool = True) -> Measure:
    r"""Records the curvature along the update u and the gradient g, and what it predicts.

    ====================== ==================================================================
    ``update_sharpness``   :math:`u^\top H u / \|u\|^2`, :math:`u = \theta_{t+1} - \theta_t`
    ``gradient_sharpness`` :math:`g^\top H g / \|g\|^2`, :math:`g = \nabla L(\theta_t)`
    ``predicted_change``   :math:`g^\top u + u^\top H u / 2`, the loss change of the quadratic
    ``actual_change``      :math:`L(\theta_{t+1}) - L(\theta_t)`
    ====================== ==================================================================

    all of it of the operator's loss, with H and g at :math:`\theta_t`. Gradient descent lowers the
    loss of the quadratic as long as the curvature along the gradient is below 2/η. Where both
    changes are alike, the quadratic lasts as far as the step goes. Of a direction of length 0 the
    curvature is NaN.

    It costs a gradient with its graph, a product for each of the two directions, and a forward
    pass.

    Args:
        gradient: whether ``gradient_sharpness`` is recorded, which is a product more.

    Returns:
        The measure.
    """
    return DirectionalSharpness(gradient)


@dataclass
class DirectionalSharpness(Measure):
    """See ``directional_sharpness``."""

    gradient: bool

    def __post_init__(self) -> None:
        of_gradient = ("gradient_sharpness",) if self.gradient else ()
        self.columns = ("update_sharpness", *of_gradient, "predicted_change", "actual_change")

    def attach(self, training: Training) -> None:
        """Checks that there is a loss."""
        operator_for("directional_sharpness", training)

    def after(self, step: Step) -> Row:
        """Measures along both directions on one graph, and then the loss where the step went."""
        update, row = step.update, {}
        with step.at_start() as operator:
            product = operator.matvec(update)  # first: the gradient comes with its graph
            gradient = step.gradient
            if self.gradient:
                row["gradient_sharpness"] = rayleigh_quotient(gradient, operator.matvec(gradient))
            change = step.loss_along(1.0) - step.loss
        predicted = torch.dot(gradient.double() + product.double() / 2, update.double())
        return row | {
            "update_sharpness": rayleigh_quotient(update, product),
            "predicted_change": predicted,
            "actual_change": change,
        }
