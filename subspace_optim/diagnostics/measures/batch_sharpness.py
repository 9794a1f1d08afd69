"""``batch_sharpness()``: the sharpness that minibatch training sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from subspace_optim._validation import check_integer, check_number
from subspace_optim.diagnostics.batch_sharpness import (
    batch_sharpness as sharpness_of_batches,
)
from subspace_optim.diagnostics.batch_sharpness import (
    batch_sharpness_thresholds,
    check_minibatches,
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
    ``small_batch_threshold`` ``2 (1 − μ)/η − w``, where it settles for small batches with momentum
    ``large_batch_threshold`` ``2 (1 + μ)/η − w``, the same for large ones; both alike without
                              momentum
    ========================= ================================================================

    It is ``diagnostics.batch_sharpness``; each row draws anew. The thresholds are those of SGD
    with weight decay w, without dampening and Nesterov's momentum, and NaN for other optimizers,
    SAM among them.

    It costs a gradient with its graph and a product of each batch, 8 batches at least.

    Args:
        batch_size: of the training (default: the batches of the operator's data).
        relative_error: of the standard error to the mean; enough when it is reached.
        max_batches: at most, in a row.

    Returns:
        The measure.

    An argument that is out of range, and data that have no such batches, raise ``ArgumentError``
    where it is attached; a ``CurrentBatch``, whose data are not there yet, in the row.

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
        check_minibatches(operator, self.batch_size)

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
        found_of = {_options(group) for group in step.training.moving_groups()}
        options = found_of.pop() if len(found_of) == 1 else None
        if options is not None and options[0] < 1 and step.lr > 0:
            small, large = batch_sharpness_thresholds(
                step.lr, momentum=options[0], weight_decay=options[1]
            )
            row |= {"small_batch_threshold": small, "large_batch_threshold": large}
        return row


def _options(group: dict[str, Any]) -> tuple[float, float] | None:
    """Returns μ and w of a group of plain SGD; ``None`` of another optimizer, or other options."""
    others = ("nesterov", "dampening", "maximize")
    if any(group.get(name) for name in others) or "rho" in group or "nesterov" not in group:
        return None
    return float(group["momentum"]), float(group["weight_decay"])
