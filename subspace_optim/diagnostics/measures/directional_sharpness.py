"""``directional_sharpness()``: the curvature along the update and along the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.parameters import LOW_PRECISION
from subspace_optim.diagnostics.directional_sharpness import Line, differences, rayleigh_quotient
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.linalg.rows import norm, square

_NEAREST, _FARTHEST = 2**-24, 2**12
"""How far differences reach at least and at most, in lengths of the update."""


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
    directions, and a forward pass. By losses it takes central differences of the loss, no longer
    than its rounding asks for, a length that is learned from row to row; that costs a gradient, if
    ``gradient_sharpness`` is asked for, 2 forward passes for each direction, 2 more where the
    length was wrong, as in the first row, and the one of ``actual_change``. Where rounding hides
    the curvature it is NaN. Measured against products in float64, in trainings by SGD, momentum,
    AdamW and LBFGS:

    - of a smooth loss (MLP with tanh, in float32 and float64) curvatures are off by 0.5 % in the
      median and by 2 % in nine rows of ten; most, where the curvature is near 0;
    - of a decoder in float32 (2.1 million parameters, warmed up) along the update by 0.2 % in the
      median, along the gradient by 0.4 %, and by 8 % in the first row, where the length is not
      known;
    - with ReLU in float64 the same;
    - with ReLU in float32 the kinks within the differences count: in the median they are off by
      15 % to 90 %, along the update with a wrong sign in up to a fifth of the rows, and
      ``predicted_change`` by up to 6 %. Take products there.

    Args:
        gradient: whether ``gradient_sharpness`` is recorded.
        by: ``"products"`` or ``"losses"``. Losses are refused where the measure is attached to an
            operator that is no Hessian, such as a ``GaussNewtonOperator``.

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
    by: str | None  # None: by losses, where these tell the curvature

    def __post_init__(self) -> None:
        of_gradient = ("gradient_sharpness",) if self.gradient else ()
        self.columns = ("update_sharpness", *of_gradient, "predicted_change", "actual_change")

    def attach(self, training: Training) -> None:
        """Checks that there is a loss, and that its differences are of the operator's matrix.

        Raises:
            ArgumentError: they are not, and are asked for.
        """
        operator = operator_for("directional_sharpness", training)
        if self.by == "losses" and not operator.is_hessian:
            found = f"directional_sharpness(by='losses') of a {type(operator).__name__}"
            remedy = "Use by='products'."
            raise ArgumentError("measures", found, "that of the Hessian of the loss", remedy)
        coarse = any(p.dtype in LOW_PRECISION for p in training.parameters.tensors)
        by_default = "losses" if operator.is_hessian and not coarse else "products"
        self._by = self.by or by_default
        self._reaches: dict[str, float] = {}  # of differences along each direction

    def after(self, step: Step) -> Row:
        """Measures along both directions, and where the step went."""
        with step.at_start():
            measured = self._by_products(step) if self._by == "products" else self._by_losses(step)
            return measured | {"actual_change": step.loss_along(1.0) - step.loss}

    def _by_products(self, step: Step) -> dict[str, Any]:
        update, inner, row = step.update, step.operator.inner, {}
        product = step.operator.matvec(update)  # first: the gradient comes with its graph
        gradient = step.gradient
        if self.gradient:
            along = step.operator.matvec(gradient)
            row["gradient_sharpness"] = rayleigh_quotient(gradient, along, inner)
        predicted = inner.sum(torch.dot(gradient.double() + product.double() / 2, update.double()))
        return row | {
            "update_sharpness": rayleigh_quotient(update, product, inner),
            "predicted_change": predicted,
        }

    def _by_losses(self, step: Step) -> dict[str, Any]:
        row: dict[str, Any] = {}
        longest = float(norm(step.update, step.operator.inner))
        if self.gradient:
            row["gradient_sharpness"] = self._along("gradient", step.gradient, step).curvature
        line = self._along("update", step.update, step)
        slope = line.slope * longest if step.slope is None else step.slope
        return row | {
            "update_sharpness": line.curvature,
            "predicted_change": slope + line.curvature * longest**2 / 2,
        }

    def _along(self, name: str, direction: Tensor, step: Step) -> Line:
        """Returns the loss along a direction by its length, and learns how far to reach there."""
        sums = step.operator.inner.sums(square(direction), square(step.update))
        length, unit = torch.stack(sums).sqrt().tolist()
        start = step.loss
        reach = self._reaches.get(name, unit)
        if unit > 0:  # a loss that is flat for long shall not take it anywhere
            reach = min(max(reach, _NEAREST * unit), _FARTHEST * unit)
        if length == 0 or reach == 0:
            return Line(math.nan, math.nan, reach)
        line = differences(
            lambda c: step.loss_at(direction, c / length) - start, reach, step.rounding
        )
        self._reaches[name] = line.reach
        return line

    def state_dict(self) -> dict[str, Any]:
        """Returns how far differences reach."""
        return {"reaches": dict(self._reaches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it."""
        self._reaches = dict(state["reaches"])
