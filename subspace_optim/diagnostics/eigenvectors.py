"""What single eigenvectors tell: how low the curvature goes, how few parameters, how much moved."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._progress import ProgressOption
from subspace_optim._validation import ArgumentError, check_integer, check_number
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.spectrum import lower_edge, multiplying
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.rows import column_blocks, largest_entries


def lowest_eigenvalue(
    operator: CurvatureOperator,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    progress: ProgressOption = False,
) -> float:
    r"""Returns the smallest eigenvalue of the Hessian, by algebraic value.

    .. math:: \lambda_P = \min_{\|v\| = 1} v^\top H v

    Where it stays below 0 during training there is a direction of negative curvature that is never
    left: the loss is at no minimum, not even in the subspace of the fast directions. In deep
    networks it is negative nearly always, and small beside λ_1 late in training.

    It costs a solve of −H, mostly longer than that of λ_1: the lower end of the spectrum is the
    crowded end of the bulk, as ``spectrum_edges`` tells. Memory: about 40 vectors. A ``tol`` or
    ``seed`` out of range raises ``ArgumentError``.

    Args:
        operator: the Hessian.
        tol: ``‖Hu − λu‖ ≤ tol · |λ|``, as far as the dtype allows: a λ_P that is small beside λ_1
            has an absolute error of about 5e-6 λ_1 in float32.
        seed: of the random start vectors.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The eigenvalue.

    Reference:
        `sagun_2017`, Figures 4-8: the left edge; Ghorbani, Krishnan & Xiao 2019, *An
        investigation into neural net optimization via Hessian eigenvalue density*.
    """
    check_number("tol", tol)
    check_integer("seed", seed, minimum=0)
    with multiplying(operator, progress):
        return float(lower_edge(operator, 1, tol=tol, seed=seed).eigenvalues[0])


def localization(vectors: Tensor | EigenBasis, *, inner: InnerProduct = WHOLE) -> Tensor:
    r"""Returns how concentrated each vector is on few coordinates: its inverse participation ratio.

    .. math:: \sum_i v_i^4 \Big/ \Big( \sum_i v_i^2 \Big)^2

    1 for a vector with a single coordinate, 1/n for n equal ones, and 1/P at least. What a random
    direction has is ``chance_localization``. It tells something of an eigenvector only where its
    eigenvalue stands alone: in a cluster every rotation of its eigenvectors is as good, and a
    solver returns a blend of them, which is less localized.

    Args:
        vectors: one a row, ``(k, P)``, of any length; or a basis. They have to be floating point.
        inner: completes sums over coordinates, of a model that is sharded: ``operator.inner``. A
            basis has its own.

    Returns:
        ``(k,)``, in float64, on the device of the vectors; NaN for a vector of zeros.

    Raises:
        ArgumentError: they are not of shape ``(k, P)``.
    """
    rows = vectors.vectors if isinstance(vectors, EigenBasis) else vectors
    inner = vectors.inner if isinstance(vectors, EigenBasis) else inner
    if rows.dim() != 2 or not rows.is_floating_point():
        found = f"of shape {tuple(rows.shape)} and {rows.dtype}"
        raise ArgumentError("vectors", found, "of shape (k, P), one a row, in floating point")
    # By the largest entry first: the fourth powers of tiny and of huge numbers are zeros, or
    # infinities. And some columns at a time, since float64 copies of all would be twice as large.
    largest = largest_entries(rows, inner).double()[:, None]
    squares, fourths = torch.zeros(2, len(rows), dtype=torch.float64, device=rows.device)
    for columns in column_blocks(rows.shape[1]):
        piece = (rows[:, columns].double() / largest).square()
        squares += piece.sum(dim=1)
        fourths += piece.square().sum(dim=1)
    squares, fourths = inner.sums(squares, fourths)
    return fourths / squares.square()


def chance_localization(size: int) -> float:
    r"""Returns the mean ``localization`` of a random direction, :math:`3 / (P + 2)`.

    A ``size`` below 1 raises ``ArgumentError``.

    Args:
        size: P.
    """
    return 3 / (check_integer("size", size, minimum=1) + 2)


def displacement(
    now: Tensor | EigenBasis, before: Tensor | EigenBasis, *, inner: InnerProduct = WHOLE
) -> Tensor:
    r"""Returns how far each eigenvector has turned since an earlier step.

    .. math:: 1 - |\langle v_i(t), v_i(t') \rangle|

    0 where it is the same line, whatever the signs that the solver has chosen, and 1 where it is
    orthogonal. Two random directions are at ``chance_displacement``, near 1. Vectors are compared
    by their rank: where two eigenvalues cross, or come so near that the solver blends their
    eigenvectors, it is near 1 although the subspace stands still. ``subspace_overlap`` of both
    bases tells that apart.

    Args:
        now: eigenvectors, ``(k, P)``, unit rows; or a basis.
        before: those of the earlier step, as many.
        inner: as of ``localization``.

    Returns:
        ``(k,)``, in float64, each from 0 to 1, on the device of ``now``.

    Raises:
        ArgumentError: the shapes differ, or are no ``(k, P)``.
    """
    bases = [b for b in (now, before) if isinstance(b, EigenBasis)]
    inner = bases[0].inner if bases else inner
    first, second = (b.vectors if isinstance(b, EigenBasis) else b for b in (now, before))
    if first.dim() != 2 or first.shape != second.shape:
        found = f"of shape {tuple(second.shape)}"
        allowed = f"of that of now, {tuple(first.shape)}, one vector a row"
        remedy = "Compare the first of both: basis.first(k)."
        raise ArgumentError("before", found, allowed, remedy)
    cosines = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    for columns in column_blocks(first.shape[1]):
        pieces = (first[:, columns].double(), second[:, columns].to(first.device).double())
        cosines += (pieces[0] * pieces[1]).sum(dim=1)
    return (1 - inner.sum(cosines).abs()).clamp(min=0.0)


def chance_displacement(size: int) -> float:
    r"""Returns the mean ``displacement`` of two random directions.

    .. math:: 1 - \frac{\Gamma(P/2)}{\sqrt{\pi}\, \Gamma((P + 1)/2)}
              \;\approx\; 1 - \sqrt{\frac{2}{\pi P}}

    A ``size`` below 1 raises ``ArgumentError``.

    Args:
        size: P.
    """
    P = check_integer("size", size, minimum=1)
    return 1 - math.exp(math.lgamma(P / 2) - math.lgamma((P + 1) / 2)) / math.sqrt(math.pi)
