r"""The sharpness that minibatch training sees: of each batch, along the gradient of that batch.

SGD does not take λ_1 of the full loss to 2/η, but stays below. What it takes there is the mean
curvature of the batches along their own gradients: the *edge of stochastic stability*.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from subspace_optim._progress import Progress, ProgressOption, shown
from subspace_optim._validation import (
    ArgumentError,
    NonFiniteError,
    check_integer,
    check_number,
)
from subspace_optim.curvature.operator import CurvatureOperator, Minibatches
from subspace_optim.linalg.rows import norm
from subspace_optim.linalg.trace import Estimate

_LEAST = 8
"""Batches from which on a standard error is believed: of fewer it may be small by chance."""


class BatchThresholds(NamedTuple):
    """Where batch sharpness settles.

    Attributes:
        small_batches: ``2 (1 − μ)/η − w``, where the noise of the batches rules.
        large_batches: ``2 (1 + μ)/η − w``, that of the full gradient.
    """

    small_batches: float
    large_batches: float


def batch_sharpness(
    operator: CurvatureOperator,
    *,
    batch_size: int | None = None,
    relative_error: float = 0.1,
    max_batches: int = 64,
    seed: int = 0,
    progress: ProgressOption = False,
) -> Estimate:
    r"""Returns the mean curvature of minibatches along their own gradients.

    .. math:: \mathbb{E}_B \left[ \frac{g_B^\top H_B\, g_B}{\|g_B\|^2} \right], \qquad
              g_B = \nabla L_B(\theta), \quad H_B = \nabla^2 L_B(\theta)

    To be held against ``batch_sharpness_thresholds``: 2/η for SGD. It depends on the size of the
    batches, so that they should be those of the training. For a batch of all data it is the
    curvature along the gradient, at most λ_1; for smaller ones it is above that, mostly.

    Batches are drawn in a random order until the standard error is small enough, and 8 at least.
    The standard error is ``s/√m`` of m quotients that scatter by s. Where the batches are the J
    of the data it is that of a finite population, ``s √((1 − m/J)/m)`` (Cochran 1977), and 0 for
    all of them. Rows that are drawn are only one of many ways to divide the data; a full pass of
    them leaves an error, for which ``s/√m`` is an upper bound on the average. A batch whose
    gradient is 0 has no such curvature, and does not count.

    Each batch costs one gradient with its graph, and one product, of that batch. Memory: the graph
    of one batch, freed before the next, and two vectors of P. Under ``process_group`` a batch is
    one of each rank, together. An argument out of range, an operator without minibatches, and data
    of one batch without a ``batch_size`` raise ``ArgumentError``, a product that is not finite
    ``NonFiniteError``.

    Args:
        operator: the Hessian, of a mean loss over data.
        batch_size: examples of a batch (on each rank), drawn without replacement from all of the
            data in its tensors (default: the batches are those of the data, of which there have
            to be two or more).
        relative_error: of the standard error to the mean; enough when it is reached.
        max_batches: at most, at least 2.
        seed: of the order and of the draws.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The mean, its standard error, and in ``products`` how many batches were taken. NaN where
        every gradient is 0; the error of a single batch that is not all of the data is NaN.

    Reference:
        Andreyev & Beneventano 2024, *Edge of stochastic stability: revisiting the edge of stability
        for SGD* (arXiv 2412.20553): *batch sharpness*, the mean of the quotients.
    """
    check_number("relative_error", relative_error)
    check_integer("max_batches", max_batches, minimum=2)
    with operator.frozen():
        batches = minibatches_of(operator, batch_size, seed)
    quotients: list[float] = []
    taken = 0
    value = error = math.nan
    most = min(max_batches, batches.count or max_batches)
    with (
        shown(progress, operator.ranks.rank),
        Progress("batch sharpness", "batches at most", most) as taking,
    ):
        for view in batches.views:
            taken += 1
            quotient = gradient_sharpness(view)
            if not math.isnan(quotient):
                quotients.append(quotient)
                value, error = _mean_and_error(quotients, taken, batches.count)
            taking.tick(taken)
            enough = len(quotients) >= _LEAST and error <= relative_error * abs(value)
            if enough or taken == max_batches:
                view.release()
                break
    return Estimate(value, error, taken)


def batch_sharpness_thresholds(
    lr: float, *, momentum: float = 0.0, weight_decay: float = 0.0
) -> BatchThresholds:
    r"""Returns the values at which batch sharpness settles.

    .. math:: \frac{2 (1 - \mu)}{\eta} - w \quad\text{(small batches)}, \qquad
              \frac{2 (1 + \mu)}{\eta} - w \quad\text{(large batches)}

    both 2/η without momentum and decay. Where a batch is small its noise is as large as its
    gradient, and momentum amplifies noise; where it is large the dynamics are those of the full
    gradient, which momentum stabilises (``stability_threshold``). Between the two the plateau lies
    between.

    Args:
        lr: η of ``torch.optim.SGD``.
        momentum: μ, below 1, as there: the buffer is ``μ b + g``, without dampening and not
            Nesterov's.
        weight_decay: w, as there: it is part of the gradient, and adds w to the Hessian.

    Returns:
        Both thresholds; infinite for a rate of 0.

    Raises:
        ArgumentError: an argument is out of range.

    Reference:
        Andreyev, Ananthkumar, Walden, Poggio & Beneventano 2026, *Momentum further constrains
        sharpness at the edge of stochastic stability* (arXiv 2604.14108).
    """
    check_number("lr", lr)
    check_number("momentum", momentum)
    check_number("weight_decay", weight_decay)
    if momentum >= 1:
        raise ArgumentError("momentum", momentum, "below 1")
    if lr == 0:
        return BatchThresholds(math.inf, math.inf)
    small, large = (2 * (1 + sign * momentum) / lr - weight_decay for sign in (-1, 1))
    return BatchThresholds(small, large)


def gradient_sharpness(operator: CurvatureOperator) -> float:
    r"""Returns the curvature along the gradient, :math:`g^\top H g / \|g\|^2`; NaN where g is 0.

    It costs one gradient with its graph, and one product.

    Raises:
        NonFiniteError: the gradient or the product is NaN or infinite.
    """
    with operator.frozen():
        operator.linearize()
        gradient = operator.gradient()
        length = norm(gradient, operator.inner)
        direction = (gradient.double() / torch.where(length > 0, length, 1.0)).to(gradient.dtype)
        product = operator.matvec(direction)
    curvature = operator.inner.sum(torch.dot(direction.double(), product.double()))
    curvature, length = torch.stack([curvature, length]).tolist()
    if not (math.isfinite(curvature) and math.isfinite(length)):
        message = (
            "The curvature along the gradient is not finite. Lower the learning rate, or look for "
            "NaN in the parameters and the data."
        )
        raise NonFiniteError(message)
    return curvature if length > 0 else math.nan


def minibatches_of(operator: CurvatureOperator, batch_size: int | None, seed: int) -> Minibatches:
    """Returns the minibatches of an operator.

    Raises:
        ArgumentError: it has none, or the data are one batch and no size is given.
    """
    check_integer("seed", seed, minimum=0)
    batches = operator.minibatches(batch_size, seed=seed)
    if batches is None:
        remedy = "HessianOperator, GaussNewtonOperator and FiniteDifferenceHessian have them."
        found, allowed = type(operator).__name__, "an operator of a mean loss over data"
        raise ArgumentError("operator", found, allowed, remedy)
    if batch_size is None and batches.count == 1:
        remedy = "The data are one batch. Give the size of those that the training steps on."
        raise ArgumentError("batch_size", None, "an integer of at least 1", remedy)
    return batches


def check_minibatches(operator: CurvatureOperator, batch_size: int | None) -> None:
    """Checks that an operator has such minibatches, as far as its data are there already.

    If not, that raises ``ArgumentError``.
    """
    if not operator.of_current_batch:
        minibatches_of(operator, batch_size, 0)
    elif batch_size is not None:
        check_integer("batch_size", batch_size, minimum=1)


def _mean_and_error(quotients: list[float], taken: int, count: int | None) -> tuple[float, float]:
    """Returns the mean, and its standard error among so many batches (``None``: without an end)."""
    values = torch.tensor(quotients, dtype=torch.float64)
    mean = float(values.mean())
    if taken == count:
        return mean, 0.0
    if len(values) < 2:
        return mean, math.nan
    left = 1.0 if count is None else 1 - taken / count
    return mean, float(values.std()) * math.sqrt(left / len(values))
