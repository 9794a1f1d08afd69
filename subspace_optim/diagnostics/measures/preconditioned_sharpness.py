"""``preconditioned_sharpness()``: the sharpness that Adam sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Adam, AdamW

from subspace_optim._validation import ArgumentError
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.stability import check_adam, has_moments
from subspace_optim.diagnostics.stability import preconditioned_sharpness as sharpness_of


def preconditioned_sharpness() -> Measure:
    r"""Records λ_1 of the preconditioned Hessian of Adam and AdamW, at :math:`\theta_t`.

    ============================ ===========================================================
    ``preconditioned_sharpness`` ``λ_1(D^{-1/2} H D^{-1/2})``, with the moments that are there
                                 before the step; to hold against ``adam_threshold``
    ============================ ===========================================================

    It costs a solve for one eigenvalue over all data at each row. Before the first step of Adam
    there are no moments, and it is NaN.

    Returns:
        The measure.

    Another optimizer, and one that maximizes, raises ``ArgumentError`` where it is attached.

    Reference:
        Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*.
    """
    return PreconditionedSharpness()


@dataclass
class PreconditionedSharpness(Measure):
    """See ``preconditioned_sharpness``."""

    columns = ("preconditioned_sharpness",)

    def attach(self, training: Training) -> None:
        """Checks the optimizers.

        Raises:
            ArgumentError: one of them is another.
        """
        operator_for("preconditioned_sharpness", training)
        others = [o for o in training.optimizers if not isinstance(o, Adam | AdamW)]
        if others:
            found = f"preconditioned_sharpness() of {type(others[0]).__name__}"
            remedy = "The thresholds of other optimizers are for the sharpness itself."
            raise ArgumentError("measures", found, "that of Adam or AdamW", remedy)
        check_adam(training.optimizers)
        self._options = training.solver_options()

    def before(self, step: Step) -> Row:
        """Solves for it."""
        optimizers = step.training.optimizers
        if not has_moments(step.operator, optimizers):  # before the first step
            return {}
        return {self.columns[0]: sharpness_of(step.operator, optimizers, **self._options)}
