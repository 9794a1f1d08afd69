"""``thresholds()``: the sharpness above which the optimizer is unstable."""

from __future__ import annotations

import math
from dataclasses import dataclass

from subspace_optim.diagnostics.measures.base import Measure, Row, Training
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.stability import thresholds as thresholds_of


def thresholds() -> Measure:
    r"""Records the thresholds of stability of the optimizer's options, with which the step begins.

    ================== ======================================================================
    ``threshold``      sharpness above which gradient descent with SGD's options diverges
                       (``stability_threshold``): 2/η for plain steps
    ``sam_edge``       the same of SAM, at this gradient
    ``adam_threshold`` the same of Adam, for ``preconditioned_sharpness``
    ================== ======================================================================

    What does not apply is NaN. It costs nothing, but for SAM a gradient.

    Returns:
        The measure.
    """
    return Thresholds()


@dataclass
class Thresholds(Measure):
    """See ``thresholds``."""

    columns = ("threshold", "sam_edge", "adam_threshold")

    def attach(self, training: Training) -> None:
        """Looks which optimizers have a threshold.

        A step that goes on after the one inside, as Lookahead's, has another one; SAM's is told by
        its radius.
        """
        self._optimizers = [
            each.optimizer
            for each in training.followed
            if len(each.members) == 1 or "rho" in each.optimizer.param_groups[0]
        ]
        self._of_gradient = training.operator is not None and any(
            "rho" in group for each in self._optimizers for group in each.param_groups
        )

    def before(self, step: Step) -> Row:
        """Returns them. Now: a scheduler may change the rate before all optimizers have stepped."""
        norm = step.gradient_norm if self._of_gradient else math.nan
        return thresholds_of(self._optimizers, norm)
