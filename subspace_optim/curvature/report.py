"""What a proof needs of an operator, and what it has found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from subspace_optim.curvature.batches import Batches
from subspace_optim.curvature.evaluation import Derivatives, Point
from subspace_optim.curvature.objective import BatchLoss, BatchLossFunction, Supervised
from subspace_optim.curvature.operator import OperatorStats
from subspace_optim.curvature.parameters import ParameterSpace

Products = Literal["derivative", "symmetric", "differences"]
"""With the derivative of the gradient, with another symmetric matrix, or by finite differences."""


@dataclass
class Report:
    """What a proof has found; a number that was not looked at is NaN.

    Attributes:
        engine: how products are computed.
        loss_gap: of two evaluations of one batch, relative; 0 if the loss is one function.
        gradient_error: to the gradient at the user's own parameters, relative.
        product_error: of a product to the central difference of gradients, relative.
        asymmetry: ``|⟨u, Hv⟩ − ⟨v, Hu⟩|`` for ``u = Hv/‖Hv‖``, relative to the products.
        mean_error: of the gradient of two batches together to the weighted mean of theirs.
        failed: the message of each failure.
        gradients: how many gradients and products of a few examples the proof took.
    """

    engine: str
    loss_gap: float = math.nan
    gradient_error: float = math.nan
    product_error: float = math.nan
    asymmetry: float = math.nan
    mean_error: float = math.nan
    failed: list[str] = field(default_factory=list)
    gradients: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing has failed."""
        return not self.failed

    def __str__(self) -> str:
        rows = {
            "two evaluations of a batch differ by": self.loss_gap,
            "gradient, to that at the model's parameters": self.gradient_error,
            "product, to a difference of gradients": self.product_error,
            "asymmetry of two products": self.asymmetry,
            "two batches together, to the mean of both": self.mean_error,
        }
        width = max(map(len, rows))
        lines = [
            f"  {name:<{width}}  {'not looked at' if math.isnan(x) else format(x, '.1e')}"
            for name, x in rows.items()
        ]
        verdict = "passed" if self.passed else "failed: " + " ".join(self.failed)
        return "\n".join([f"engine {self.engine}, {self.gradients} gradients", *lines, verdict])


@dataclass
class Parts:
    """What a proof needs of an operator.

    Attributes:
        model: the model.
        batch_loss: its loss of a batch.
        space: the coordinates.
        stats: of the operator, where the costs are added.
        seed: of dropout masks and directions.
        batches: the data.
        linearize: differentiates the loss of a batch, as the operator does for its products.
        products: which matrix they are of.
    """

    model: nn.Module
    batch_loss: BatchLossFunction
    space: ParameterSpace
    stats: OperatorStats
    seed: int
    batches: Batches
    linearize: Callable[[BatchLoss, Point], Derivatives]
    products: Products

    @property
    def mean_over(self) -> str:
        """What the loss is a mean over, in words, as far as it has been seen."""
        weight, loss = self.stats.weight, self.batch_loss
        if not weight:
            return "not known yet"
        if not isinstance(loss, Supervised):
            return f"the weights of batch_loss, {weight:,.10g} in all"
        if loss.summed:
            return "nothing: it is a sum"
        return "examples" if weight == self.stats.examples else f"{weight:,.10g} {loss.unit}"
