"""``loss_and_gradient()``: how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from subspace_optim.diagnostics.measures.base import Measure, Row, Training
from subspace_optim.diagnostics.measures.step import Step


def loss_and_gradient(sample: int | Literal["auto"] | None = "auto") -> Measure:
    r"""Records the loss and the norm of its gradient at :math:`\theta_t`.

    ======================= ========================================================
    ``loss``                ``L(θ_t)``
    ``gradient_norm``       ``‖∇L(θ_t)‖``
    ``examples``            how many they are of; NaN where nobody knows
    ``loss_error``          standard error of the loss; 0 where it is of all data
    ``gradient_norm_error`` the same of ``gradient_norm``
    ======================= ========================================================

    It costs a gradient over all data, or the sample.

    Args:
        sample: as of ``dominant``.

    Returns:
        The measure.
    """
    return LossAndGradient(sample)


@dataclass
class LossAndGradient(Measure):
    """See ``loss_and_gradient``."""

    sample: int | Literal["auto"] | None

    columns = (
        "loss",
        "gradient_norm",
        "examples",
        "loss_error",
        "gradient_norm_error",
    )

    def attach(self, training: Training) -> None:
        """Checks the sample."""
        training.gradients(self.sample)

    def before(self, step: Step) -> Row:
        """Returns all of it, if there is an operator."""
        gradient = step.sampled(self.sample)
        return {} if gradient is None else gradient.known()
