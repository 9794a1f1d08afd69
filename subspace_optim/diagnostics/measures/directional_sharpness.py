"""``directional_sharpness()``: the curvature along the update and along the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics.directional_sharpness import differences, rayleigh_quotient
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.linalg.rows import norm


def directional_sharpness(
    *, gradient: bool = True, by: Literal["products", "losses"] = "products"
) -> Measure:
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

    By products it is exact, and costs a gradient with its graph, a product for each of the two
    directions, and a forward pass. By losses it takes central differences of the loss, which are
    off by some per cent where it is not a quadratic, and NaN where they are lost in rounding; that
    costs a gradient, if ``gradient_sharpness`` is asked for, and 2 forward passes for each
    direction, one of which is mostly that of ``actual_change``. How far these reach is learned
    from row to row.

    Args:
        gradient: whether ``gradient_sharpness`` is recorded.
        by: ``"products"`` or ``"losses"``.

    Returns:
        The measure.

    Raises:
        ArgumentError: ``by`` is neither.
    """
    if by not in ("products", "losses"):
        raise ArgumentError("by", by, "'products' or 'losses'")
    return DirectionalSharpness(gradient, by)


@dataclass
class DirectionalSharpness(Measure):
    """See ``directional_sharpness``."""

    gradient: bool
    by: str

    def __post_init__(self) -> None:
        of_gradient = ("gradient_sharpness",) if self.gradient else ()
        self.columns = ("update_sharpness", *of_gradient, "predicted_change", "actual_change")

    def attach(self, training: Training) -> None:
        """Checks that there is a loss."""
        operator_for("directional_sharpness", training)
        self._reach = 1.0  # of differences along the update, in updates ...
        self._reach_of_gradient: float | None = None  # ... and along the gradient, in lengths

    def after(self, step: Step) -> Row:
        """Measures along both directions, and where the step went."""
        with step.at_start():
            measured = self._by_products(step) if self.by == "products" else self._by_losses(step)
            return measured | {"actual_change": step.loss_along(1.0) - step.loss}

    def _by_products(self, step: Step) -> dict[str, Any]:
        update, row = step.update, {}
        product = step.operator.matvec(update)  # first: the gradient comes with its graph
        gradient = step.gradient
        if self.gradient:
            along = step.operator.matvec(gradient)
            row["gradient_sharpness"] = rayleigh_quotient(gradient, along)
        predicted = torch.dot(gradient.double() + product.double() / 2, update.double())
        return row | {
            "update_sharpness": rayleigh_quotient(update, product),
            "predicted_change": predicted,
        }

    def _by_losses(self, step: Step) -> dict[str, Any]:
        row: dict[str, Any] = {}
        length = float(norm(step.update))
        if self.gradient:
            slope = float(norm(step.gradient))
            direction, reach = step.gradient / slope, self._reach_of_gradient or length
            start = step.loss
            if slope > 0 and reach > 0:
                line = differences(
                    lambda c: step.loss_at(direction, c) - start, reach, step.rounding
                )
                self._reach_of_gradient = line.reach
                row["gradient_sharpness"] = line.curvature
        if length > 0:
            start = step.loss
            reach = 1.0 if 0.7 <= self._reach <= 2 else self._reach  # the loss there is asked for
            line = differences(lambda c: step.loss_along(c) - start, reach, step.rounding)
            self._reach = line.reach
            row["update_sharpness"] = line.curvature / length**2
            known = step.slope
            row["predicted_change"] = (line.slope if known is None else known) + line.curvature / 2
        return row

    def state_dict(self) -> dict[str, Any]:
        """Returns how far differences reach."""
        return {"reach": self._reach, "reach_of_gradient": self._reach_of_gradient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it."""
        self._reach, self._reach_of_gradient = state["reach"], state["reach_of_gradient"]
