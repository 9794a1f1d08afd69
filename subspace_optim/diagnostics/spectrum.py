"""The spectrum of an operator: all of it, its density, its trace and its edges.

All products are taken at one parameter state, and what the operator keeps for products is freed at
the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from subspace_optim._inner_product import InnerProduct
from subspace_optim._progress import Progress, ProgressOption, shown
from subspace_optim._validation import (
    ArgumentError,
    ConvergenceWarning,
    NonFiniteError,
    check_integer,
)
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import top_eigenpairs
from subspace_optim.linalg.spectral_density import SpectralDensity, lanczos_quadrature
from subspace_optim.linalg.trace import Estimate, hutch_plus_plus, identity_rows

_SPARE = 16
"""Pairs that the lower edge is solved for beyond those that are returned."""


@contextmanager
def multiplying(operator: CurvatureOperator, progress: ProgressOption = False) -> Iterator[None]:
    """Takes products at one parameter state, shows how far it is, and frees what was kept."""
    try:
        with shown(progress, operator.ranks.rank), operator.frozen():
            yield
    finally:
        operator.release()


def solve(
    operator: CurvatureOperator,
    matmat: Callable[[Tensor], Tensor],
    k: int,
    *,
    tol: float,
    seed: int,
    size: int | None = None,
    inner: InnerProduct | None = None,
) -> EigenBasis:
    """Returns the top k eigenpairs of a matrix whose products are made of those of an operator.

    Args:
        operator: whose products they are made of.
        matmat: the products with rows.
        k: pairs.
        tol: relative residual.
        seed: of the random vectors.
        size: of the matrix (default: that of the operator).
        inner: of the vectors that it multiplies (default: that of the operator).
    """
    return top_eigenpairs(
        matmat,
        operator.size if size is None else size,
        k,
        tol=tol,
        seed=seed,
        dtype=operator.dtype,
        device=operator.device,
        accuracy=operator.accuracy,
        inner=operator.inner if inner is None else inner,
    ).basis


def exact_spectrum(
    operator: CurvatureOperator, *, max_size: int = 8192, progress: ProgressOption = False
) -> Tensor:
    """Returns all eigenvalues, from the matrix written out: ``λ_1 ≥ … ≥ λ_P``.

    It takes P products, O(P³) arithmetic, and three float64 matrices of P×P on the host. Products
    in float32 leave an error of about ``1e-7 max|λ|`` in each.

    Args:
        operator: of a small model.
        max_size: the largest P for which that is done.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The eigenvalues, ``(P,)``, descending, in float64 on the host.

    Raises:
        ArgumentError: P is above ``max_size``.
        NonFiniteError: a product was NaN or infinite.
    """
    size = operator.size
    check_integer("max_size", max_size, minimum=1)
    if size > max_size:
        gigabytes = 3 * 8 * size**2 / 1e9
        raise ArgumentError(
            "the size of the operator",
            size,
            f"at most max_size={max_size}",
            f"The dense matrix would take {gigabytes:.3g} GB and {size} products: raise max_size "
            "if there is room, or use spectral_density, trace and spectrum_edges.",
        )
    matrix = torch.empty(size, size, dtype=torch.float64)
    with multiplying(operator, progress), Progress("all eigenvalues", "products", size) as solving:
        inner, taken = operator.inner, 0
        own = slice(inner.before(size), inner.before(size) + inner.here(size))
        for _, rows in identity_rows(size, operator.dtype, operator.device, inner):
            block = torch.zeros(len(rows), size, dtype=operator.dtype, device=operator.device)
            block[:, own] = operator.matmat(rows)
            matrix[taken : taken + len(rows)] = inner.sum(block)
            taken += len(rows)
            solving.tick(taken)
    if not matrix.isfinite().all():
        message = (
            "A product with the matrix is not finite. Lower the learning rate, or look for NaN in "
            "the parameters and the data."
        )
        raise NonFiniteError(message)
    eigenvalues: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return eigenvalues.flip(0)


def spectral_density(
    operator: CurvatureOperator,
    *,
    probes: int = 10,
    steps: int = 80,
    seed: int = 0,
    progress: ProgressOption = False,
) -> SpectralDensity:
    r"""Returns the density of all eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \phi(x) = \frac{1}{P} \sum_{i=1}^P \delta(x - \lambda_i)

    as ``probes`` random directions see it, each by ``steps`` products, with error bars:
    ``.density(grid)``, ``.cumulative(x)``, and ``.moment(p)``.

    Args:
        operator: of a model of any size; four vectors of P are held beside it.
        probes: random directions, at least 2. The error bars shrink like the root of it.
        steps: products for each. The detail that can be seen shrinks like 1/steps.
        seed: of the random directions.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The density.

    Reference:
        Ghorbani, Krishnan & Xiao 2019, *An investigation into neural net optimization via Hessian
        eigenvalue density*, for loss Hessians; the exact spectra are those of `sagun_2017`.
    """
    with multiplying(operator, progress):
        return lanczos_quadrature(
            operator.matvec,
            operator.size,
            probes=probes,
            steps=steps,
            seed=seed,
            dtype=operator.dtype,
            device=operator.device,
            inner=operator.inner,
        )


def trace(
    operator: CurvatureOperator,
    *,
    products: int = 60,
    seed: int = 0,
    progress: ProgressOption = False,
) -> Estimate:
    """Returns ``tr H = Σ λ_i``, by Hutch++, with its standard error.

    Args:
        operator: of a model of any size; about ``products`` vectors of P are held beside it.
        products: how many to take, at least 4; P of them give the exact trace.
        seed: of the random vectors.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The trace.

    Reference:
        Meyer, Musco, Musco & Woodruff 2021, *Hutch++: optimal stochastic trace estimation*.
    """
    with multiplying(operator, progress):
        return hutch_plus_plus(
            operator.matmat,
            operator.size,
            products,
            seed=seed,
            dtype=operator.dtype,
            device=operator.device,
            inner=operator.inner,
        )


def spectrum_edges(
    operator: CurvatureOperator,
    k: int,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    progress: ProgressOption = False,
) -> tuple[EigenBasis, EigenBasis]:
    r"""Returns both edges of the spectrum: the k largest and the k smallest eigenpairs.

    .. math:: \lambda_1 \ge \dots \ge \lambda_k \quad\text{and}\quad
              \lambda_{P-k+1} \ge \dots \ge \lambda_P

    Both are descending, as in every ``EigenBasis``, with their signs: the smallest of all
    eigenvalues is the last of the second basis. The smallest are the largest of −H.

    ``tol`` is relative to ``max|λ|`` at both edges. Where the negative eigenvalues are tiny beside
    the largest, as they are late in training, look at ``residuals``, and ask for a smaller ``tol``.

    The upper edge of a loss Hessian is a few outliers, its lower edge mostly the crowded end of the
    bulk, where room for a few more pairs is what makes Lanczos converge. There 16 more are
    solved for than are returned, and held meanwhile in memory: about ``2(k + 16) + 6`` vectors.

    Args:
        operator: of a model of any size.
        k: pairs at each edge, from 1 to P.
        tol: ``‖Hu − λu‖ ≤ tol · max|λ|`` for each pair.
        seed: of the random start vectors.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The largest, then the smallest.

    Warns:
        ConvergenceWarning: ``tol`` was not reached; the message tells the residual that was.

    Reference:
        `sagun_2017`, Figures 4-8: the right and the left edge.
    """
    with multiplying(operator, progress):
        largest = solve(operator, operator.matmat, k, tol=tol, seed=seed)
        smallest = lower_edge(operator, k, tol=tol, seed=seed)
    scale = max(largest.largest, smallest.largest)
    reached = float(smallest.residuals.max()) / scale if scale else 0.0
    if reached > tol:
        message = f"The lower edge: the relative residual is {reached:.1e}, and tol={tol:g}."
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return largest, smallest


def lower_edge(operator: CurvatureOperator, k: int, *, tol: float, seed: int) -> EigenBasis:
    """Returns the k smallest eigenpairs, descending, without a warning where they are not exact."""
    with warnings.catch_warnings():  # of pairs that are not returned
        warnings.simplefilter("ignore", ConvergenceWarning)
        pairs = min(k + _SPARE, operator.size)
        mirrored = solve(operator, lambda v: -operator.matmat(v), pairs, tol=tol, seed=seed)
    mirrored = mirrored.first(k)
    return EigenBasis(
        -mirrored.eigenvalues.flip(0),
        mirrored.vectors.flip(0),
        mirrored.residuals.flip(0),
        mirrored.inner,
    )
