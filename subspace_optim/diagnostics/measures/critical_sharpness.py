"""``critical_sharpness()``: how much larger the rate may be before a step raises the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.critical_sharpness import critical_multiple, sharpness_of
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step


def critical_sharpness(loss_of: CurvatureOperator | None = None) -> Measure:
    r"""Records the critical sharpness of the update, of any optimizer.

    ====================== ====================================================================
    ``critical_sharpness`` :math:`\lambda_c = 2/\eta_c`, with the smallest rate η_c at which the
                           step would have raised the loss; infinite for a step uphill
    ``critical_multiple``  η_c / η: how many times larger the rate might have been
    ``critical_threshold`` 2/η: above it the step has raised the loss
    ====================== ====================================================================

    It is ``diagnostics.critical_sharpness``, and is told within 1/16 where 8 passes are enough for
    that, as they are on quadratics; NaN where the loss does not rise within the reach of the
    search, and, but for the multiple, where parameters have several rates.

    It costs a forward pass at θ_t and up to 8 along the update, mostly 4 or 5. Beside
    ``directional_sharpness()``, placed before it, that pass and the slope are known, and 2 or 3 are
    left mostly. The search begins where the last row has ended.

    Parameters of low precision are as they would be after such a step: rounded to bf16 or fp16. A
    step that is shorter than what they can tell apart then has another multiple than its update
    would have in float32, and so has its training.

    Args:
        loss_of: the operator of another loss, or of other data, on the parameters that are trained:
            it is then the *relative* critical sharpness of that loss along this training's update
            (default: the source's).

    Returns:
        The measure.

    Reference:
        Kalra et al. 2026, *A scalable measure of loss landscape curvature for analyzing the
        training dynamics of LLMs*, arXiv 2601.16979.
    """
    return CriticalSharpness(loss_of)


@dataclass
class CriticalSharpness(Measure):
    """See ``critical_sharpness``."""

    loss_of: CurvatureOperator | None

    columns = ("critical_sharpness", "critical_multiple", "critical_threshold")

    def attach(self, training: Training) -> None:
        """Checks the losses.

        Raises:
            ArgumentError: they are of other parameters.
        """
        self._guess = 1.0
        if self.loss_of is None:
            operator_for("critical_sharpness", training)
            return
        ours, theirs = training.parameters.tensors, self.loss_of.parameters.tensors
        if list(map(id, ours)) != list(map(id, theirs)):
            remedy = "Give it the model that is trained, and the same params."
            raise ArgumentError("loss_of", "of other parameters", "of those trained", remedy)

    def after(self, step: Step) -> Row:
        """Searches along the update."""
        line = step if self.loss_of is None else step.seen_by(self.loss_of)
        with line.at_start():  # one look at the model for all losses
            start = line.loss
            found = critical_multiple(
                lambda c: line.loss_along(c) - start,
                slope=line.slope,
                known={c: loss - start for c, loss in line.losses.items() if c > 0},
                noise=line.rounding,
                guess=self._guess,
            )
        ends = (found.multiple, found.lower, found.upper)  # of what was looked at, next time on
        self._guess = next((c for c in ends if 0 < c < math.inf), self._guess)
        return {
            "critical_sharpness": sharpness_of(found.multiple, step.lr),
            "critical_multiple": found.multiple,
            "critical_threshold": 2 / step.lr,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns where the next search begins."""
        return {"guess": self._guess}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it."""
        self._guess = state["guess"]
