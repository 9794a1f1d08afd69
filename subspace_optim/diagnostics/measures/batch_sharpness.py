"""``batch_sharpness()``: the sharpness that minibatch training sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

from subspace_optim._validation import check_integer, check_number
from subspace_optim.diagnostics.batch_sharpness import (
    batch_sharpness as sharpness_of_batches,
)
from subspace_optim.diagnostics.batch_sharpness import (
    batch_sharpness_thresholds,
    minibatches_of,
)
from subspace_optim.diagnostics.measures.base import Measure, Row, Training, operator_for
from subspace_optim.diagnostics.measures.step import Step


def batch_sharpness(
    *, batch_size: int | None = None, relative_error: float = 0.1, max_batches: int = 64
) -> Measure:
    r"""Records the mean curvature of minibatches along their own gradients.

    ========================= ================================================================
    ``batch_sharpness``       :math:`\mathbb{E}_B[g_B^\top H_B g_B / \|g_B\|^2]` at ``θ_t``
    ``batch_sharpness_error`` its standard error
    ``small_batch_threshold`` ``2 (1 − μ)/η``, where it settles for small batches with momentum
    ``large_batch_threshold`` ``2 (1 + μ)/η``, the same for large ones; both 2/η without momentum
    ========================= ================================================================

    It is ``diagnostics.batch_sharpness``; each row draws anew. The thresholds are those of SGD
    without dampening and Nesterov's momentum, and NaN for other optimizers.

    It costs a gradient with its graph and a product of each batch, 8 batches at least.

    Args:
        batch_size: of the training (default: the batches of the operator's data).
        relative_error: of the standard error to the mean; enough when it is reached.
        max_batches: at most, in a row.

    Returns:
        The measure.

    An argument that is out of range, and data that have no such batches, raise ``ArgumentError``
    where it is attached.

    Reference:
        Andreyev & Beneventano 2024, arXiv 2412.20553; with momentum Andreyev et al. 2026,
        arXiv 2604.14108.
    """
    return BatchSharpness(batch_size, relative_error, max_batches)


@dataclass
class BatchSharpness(Measure):
    """See ``batch_sharpness``."""

    batch_size: int | None
    relative_error: float
    max_batches: int

    columns = (
        "batch_sharpness",
        "batch_sharpness_error",
        "small_batch_threshold",
        "large_batch_threshold",
    )

    def attach(self, training: Training) -> None:
        """Checks that the data have such batches."""
        operator = operator_for("batch_sharpness", training)
        check_number("relative_error", self.relative_error)
        check_integer("max_batches", self.max_batches, minimum=2)
        minibatches_of(operator, self.batch_size, 0)

    def before(self, step: Step) -> Row:
        """Draws batches, until the error is small enough."""
        found = sharpness_of_batches(
            step.operator,
            batch_size=self.batch_size,
            relative_error=self.relative_error,
            max_batches=self.max_batches,
            seed=step.number,
        )
        row = {"batch_sharpness": found.value, "batch_sharpness_error": found.standard_error}
        momenta = {_momentum(g) for o in step.training.optimizers for g in o.param_groups}
        if len(momenta) == 1 and step.lr > 0 and (momentum := momenta.pop()) < 1:
            small, large = batch_sharpness_thresholds(step.lr, momentum=momentum)
            row |= {"small_batch_threshold": small, "large_batch_threshold": large}
        return row


def _momentum(group: dict[str, object]) -> float:
    """Returns μ of a group of SGD; NaN for another optimizer, or other options."""
    if group.get("nesterov", True) or group.get("dampening", 1) or group.get("maximize"):
        return math.nan
    return float(str(group.get("momentum", math.nan)))
