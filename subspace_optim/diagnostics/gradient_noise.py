"""The noise of minibatch gradients: how large it is along the sharp directions, and where it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_optim._progress import Progress, ProgressOption, shown
from subspace_optim._validation import ArgumentError, NonFiniteError, check_integer
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.batch_sharpness import minibatches_of
from subspace_optim.diagnostics.overlap import subspace_overlap
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import exact_gram, largest_entries, orthonormalise_


class GradientNoise(NamedTuple):
    """How the gradients of minibatches scatter.

    Attributes:
        noise: ``(k,)``, their variance along each eigenvector, in float64 on the CPU.
        total: their variance in all directions together, the trace of the covariance.
        covariance_overlap: of the top subspace of the covariance with that of the Hessian, from 0
            to 1; NaN where the gradients do not scatter.
        rank: the dimension of the covariance's subspace that was compared.
        batches: that were taken.
    """

    noise: Tensor
    total: float
    covariance_overlap: float
    rank: int
    batches: int


def gradient_noise(
    operator: CurvatureOperator,
    basis: EigenBasis,
    *,
    batch_size: int | None = None,
    max_batches: int = 32,
    seed: int = 0,
    progress: ProgressOption = False,
) -> GradientNoise:
    r"""Returns the variance of minibatch gradients along eigenvectors, and where they scatter most.

    .. math:: \mathrm{noise}_i = \frac{1}{m - 1} \sum_{b=1}^m
              \langle u_i,\, g_b - \bar g \rangle^2, \qquad
              C = \frac{1}{m - 1} \sum_{b=1}^m (g_b - \bar g)(g_b - \bar g)^\top

    so that ``noise_i = u_iᵀ C u_i``. It is *per batch*: what one step of SGD on such batches sees.
    For the batches of the data it is unbiased for the variance of all J of them, with ``J − 1``
    below the sum, as Cochran 1977 has it for a finite population. For batches of B examples that
    are drawn from N, in one pass and of a loss that is a mean over examples, it is unbiased for
    ``1/B`` of the variance of single examples (with ``N − 1``): B times as large it is the noise
    *per example*. The gradient of a batch is off that of all data by ``1 − B/N`` of it.

    ``covariance_overlap`` is ``subspace_overlap`` of the top k eigenvectors of C and the basis.
    m batches give C a rank of ``m − 1`` at most, and where that is r < k all r are compared: the
    overlap is then at most ``√(r/k)``. With few batches the top of C is found by chance in part:
    only what is far above the chance level ``√(r k)/P`` means something.

    Each batch costs one gradient. The covariance is never written out, only the m×m inner products
    of the gradients, in float64. Memory: m + r vectors of P. Under ``process_group`` a batch is one
    of each rank, together. What ``batch_sharpness`` refuses raises ``ArgumentError`` here too, and
    a gradient that is NaN or infinite ``NonFiniteError``.

    Args:
        operator: the Hessian, of a mean loss over data.
        basis: its top eigenpairs.
        batch_size: as of ``batch_sharpness``; the noise falls with it as 1/B.
        max_batches: m, at most, at least 2.
        seed: of the order and of the draws.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The variances and the overlap.

    Raises:
        ArgumentError: the basis has another size, or there are not two batches.

    Reference:
        Jastrzębski, Szymczak, Fort, Arpit, Tabor, Cho & Geras 2020, *The break-even point on
        optimization trajectories of deep neural networks*, for the covariance of minibatch
        gradients beside the Hessian.
    """
    check_integer("max_batches", max_batches, minimum=2)
    if basis.size != operator.size:
        allowed = f"{operator.size}, as of the operator"
        raise ArgumentError("the size of the basis", basis.size, allowed)
    with operator.frozen():
        batches = minibatches_of(operator, batch_size, seed)
    if batches.count == 1:
        found, remedy = "1", "Give a smaller batch_size."
        raise ArgumentError("the number of batches", found, "at least 2", remedy)
    count = max_batches if batches.count is None else min(max_batches, batches.count)
    rows = torch.empty(
        count, operator.parameters.size_here, dtype=operator.dtype, device=operator.device
    )
    with (
        shown(progress, operator.ranks.rank),
        Progress("gradient noise", "batches", count) as reading,
    ):
        # No batch is made past the last row.
        for number, (row, view) in enumerate(zip(rows, batches.views, strict=False), 1):
            row.copy_(view.gradient())
            reading.tick(number)
    return _noise(rows, basis)


def _noise(rows: Tensor, basis: EigenBasis) -> GradientNoise:
    """Returns what gradients tell, ``(m, P)``, which are changed.

    Raises:
        NonFiniteError: one is NaN or infinite.
    """
    m, inner = len(rows), basis.inner
    rows.sub_(rows.mean(dim=0))
    # By the largest first: the squares of tiny and of huge numbers are zeros, and infinities.
    largest = float(largest_entries(rows, inner).max())
    if not math.isfinite(largest):
        raise NonFiniteError(
            "The gradient of a minibatch is not finite. Lower the learning rate, or look for NaN "
            "in the parameters and the data."
        )
    scale = largest or 1.0
    rows.div_(scale)
    noise = basis.coefficients(rows).double().square().sum(dim=0).cpu() * (scale**2 / (m - 1))
    values, combinations = torch.linalg.eigh(exact_gram(rows, inner))
    values, combinations = values.flip(0), combinations.flip(1)
    total = float(values.clamp(min=0).sum()) * scale**2 / (m - 1)
    cut = m * torch.finfo(rows.dtype).eps * float(values[0])
    rank = min(basis.k, int((values > max(cut, 0.0)).sum()))
    if rank == 0:
        return GradientNoise(noise, total, math.nan, 0, m)
    weights = combinations[:, :rank] / values[:rank].sqrt()
    top = weights.T.to(rows.dtype) @ rows
    for _ in range(2):
        orthonormalise_(top, inner)
    return GradientNoise(noise, total, float(subspace_overlap(top, basis)), rank, m)
