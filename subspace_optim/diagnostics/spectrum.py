"""The spectrum of a curvature matrix: all of it, its density, its edges, and what stands out.

The first functions take a ``CurvatureOperator``. They take all products at one parameter state, and
free what the operator keeps for products when they are done. The others take numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspace_optim._validation import (
    ArgumentError,
    ConvergenceWarning,
    NonFiniteError,
    check_integer,
    check_number,
)
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.lanczos import EigenSolution, top_eigenpairs
from subspace_optim.linalg.spectral_density import (
    Estimate,
    SpectralDensity,
    hutch_plus_plus,
    identity_rows,
    lanczos_quadrature,
)

_ROUNDING = 1e-6
"""Below this, relative to the largest, an eigenvalue from float32 products may be rounding."""
_SPARE = 16
"""Pairs that the lower edge is solved for beyond those that are returned."""
_LARGE = 0.1
"""Eigenvalues above this, relative to the largest, decide how far a scree plot is looked at."""

# --- of an operator ------------------------------------------------------------------------------


@contextmanager
def _multiplying(operator: CurvatureOperator) -> Iterator[None]:
    """Takes products at one parameter state, and frees what was kept for them."""
    try:
        with operator.frozen():
            yield
    finally:
        operator.release()


def exact_spectrum(operator: CurvatureOperator, *, max_size: int = 8192) -> Tensor:
    """Returns all eigenvalues, from the matrix written out: ``λ_1 ≥ … ≥ λ_P``.

    It takes P products, O(P³) arithmetic, and three float64 matrices of P×P on the host. Products
    in float32 leave an error of about ``1e-7 max|λ|`` in each.

    Args:
        operator: of a small model.
        max_size: the largest P for which that is done.

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
    with _multiplying(operator):
        for start, rows in identity_rows(size, operator.dtype, operator.device):
            matrix[start : start + len(rows)] = operator.matmat(rows)
    if not matrix.isfinite().all():
        message = (
            "A product with the matrix is not finite. Lower the learning rate, or look for NaN in "
            "the parameters and the data."
        )
        raise NonFiniteError(message)
    eigenvalues: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return eigenvalues.flip(0)


def spectral_density(
    operator: CurvatureOperator, *, probes: int = 10, steps: int = 80, seed: int = 0
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

    Returns:
        The density.

    Reference:
        Ghorbani, Krishnan & Xiao 2019, *An investigation into neural net optimization via Hessian
        eigenvalue density*, for loss Hessians; the exact spectra are those of `sagun_2017`.
    """
    with _multiplying(operator):
        return lanczos_quadrature(
            operator.matvec,
            operator.size,
            probes=probes,
            steps=steps,
            seed=seed,
            dtype=operator.dtype,
            device=operator.device,
        )


def trace(operator: CurvatureOperator, *, products: int = 60, seed: int = 0) -> Estimate:
    """Returns ``tr H = Σ λ_i``, by Hutch++, with its standard error.

    Args:
        operator: of a model of any size; about ``products`` vectors of P are held beside it.
        products: how many to take, at least 4; P of them give the exact trace.
        seed: of the random vectors.

    Returns:
        The trace.

    Reference:
        Meyer, Musco, Musco & Woodruff 2021, *Hutch++: optimal stochastic trace estimation*.
    """
    with _multiplying(operator):
        return hutch_plus_plus(
            operator.matmat,
            operator.size,
            products,
            seed=seed,
            dtype=operator.dtype,
            device=operator.device,
        )


def spectrum_edges(
    operator: CurvatureOperator, k: int, *, tol: float = 1e-3, seed: int = 0
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

    Returns:
        The largest, then the smallest.

    Warns:
        ConvergenceWarning: ``tol`` was not reached; the message tells the residual that was.

    Reference:
        `sagun_2017`, Figures 4-8: the right and the left edge.
    """

    def solve(sign: int, pairs: int) -> EigenSolution:
        return top_eigenpairs(
            lambda rows: sign * operator.matmat(rows),
            operator.size,
            pairs,
            tol=tol,
            seed=seed,
            dtype=operator.dtype,
            device=operator.device,
            accuracy=operator.accuracy,
        )

    with _multiplying(operator):
        largest = solve(1, k).basis
        with warnings.catch_warnings():  # of pairs that are not returned
            warnings.simplefilter("ignore", ConvergenceWarning)
            mirrored = solve(-1, min(k + _SPARE, operator.size)).basis.first(k)
    smallest = EigenBasis(
        -mirrored.eigenvalues.flip(0), mirrored.vectors.flip(0), mirrored.residuals.flip(0)
    )
    scale = max(largest.largest, smallest.largest)
    reached = float(smallest.residuals.max()) / scale if scale else 0.0
    if reached > tol:
        message = f"The lower edge: the relative residual is {reached:.1e}, and tol={tol:g}."
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
    return largest, smallest


# --- outliers ------------------------------------------------------------------------------------


def trivial_eigenvalues(num_parameters: int, num_examples: int, num_outputs: int) -> int:
    r"""Returns how many eigenvalues of a Gauss-Newton matrix are zero at least.

    .. math:: \max(0,\; P - N C)

    ``G = Jᵀ A J / N`` with the Jacobian ``J`` of all N·C outputs: its rank is at most that of
    ``J``, N·C. (For softmax cross-entropy ``A`` has N zero eigenvalues of its own: the logits of an
    example may all be shifted; P − N(C − 1) are then zero.)

    Args:
        num_parameters: P.
        num_examples: N.
        num_outputs: C, numbers that the model puts out for an example.

    Returns:
        The number.

    Reference:
        `sagun_2017`, section 2.1, for one output.
    """
    check_integer("num_parameters", num_parameters, minimum=1)
    check_integer("num_examples", num_examples, minimum=1)
    check_integer("num_outputs", num_outputs, minimum=1)
    return max(0, num_parameters - num_examples * num_outputs)


@dataclass(frozen=True)
class OutlierCount:
    """How many eigenvalues stand out of the bulk.

    Attributes:
        count: that many.
        cutoff: they are those above it; ``λ_1`` where none is.
    """

    count: int
    cutoff: float


def count_outliers(
    eigenvalues: Tensor,
    method: Literal["gap", "ratio", "elbow"] = "gap",
    *,
    floor: float = _ROUNDING,
) -> OutlierCount:
    r"""Returns how many of the largest eigenvalues stand out, and where the bulk begins.

    With ``μ_i = max(λ_i, floor · max|λ|)``, descending, the count is

    .. math::
        \text{gap:} \;\; \arg\max_i \; \mu_i - \mu_{i+1}, \qquad
        \text{ratio:} \;\; \arg\max_i \; \mu_i / \mu_{i+1}, \qquad
        \text{elbow:} \;\; \arg\max_i \; c_{i+1} - \mu_{i+1}

    where ``c`` is the chord from the first to the last point of the scree plot: the elbow is the
    point that is farthest below it, and the first of the bulk. The plot ends at the 2n + 1st point,
    n of which are above ``μ_1 / 10``, so that it makes no difference how much of the bulk follows.
    As many eigenvalues of the bulk as there are outliers should be given.

    Negative eigenvalues and those below the floor all have the same ``μ``: they are bulk, and
    nothing sets them apart. The first of equal maxima counts. Without any (no eigenvalue is
    positive, all are equal up to ``floor``, there is only one, or no point is below the chord) the
    count is 0.

    Which method counts what one looks for depends on the spectrum: the gap is most often after
    ``λ_1`` where the outliers differ, and the ratio is large between numbers that are next to
    nothing, where a floor of 1e-2 keeps it out.

    Args:
        eigenvalues: ``(n,)``, at least one, in any order: the whole spectrum, or its top.
        method: ``"gap"``, ``"ratio"`` or ``"elbow"``.
        floor: relative to the largest ``|λ|`` (default: what may be rounding of float32 products).

    Returns:
        Count and cutoff: the middle between the last outlier and the first of the bulk, for the
        ratio their geometric mean.

    Raises:
        ArgumentError: there are no eigenvalues, one is not finite, or the method is another.

    Reference:
        `sagun_2017`, appendix A and Table 1. Its heuristic elbow is not defined there.
    """
    if eigenvalues.dim() != 1 or not len(eigenvalues):
        raise ArgumentError("the shape of eigenvalues", tuple(eigenvalues.shape), "(n,), n above 0")
    if not eigenvalues.isfinite().all():
        raise ArgumentError("eigenvalues", eigenvalues.tolist(), "finite")
    check_number("floor", floor, exclusive=True)
    values = eigenvalues.detach().to("cpu", torch.float64).sort(descending=True).values
    scale = float(values.abs().max()) or 1.0
    heights = (values / scale).clamp(min=floor)
    if method == "elbow":
        heights = heights[: 2 * int((heights > _LARGE * heights[0]).sum()) + 1]
    above, below = heights[:-1], heights[1:]
    middle = (above + below) / 2
    if method == "gap":
        excess = above - below
    elif method == "ratio":
        excess, middle = above / below - 1, torch.sqrt(above * below)
    elif method == "elbow":
        along = torch.linspace(0, 1, len(heights), dtype=torch.float64)
        excess = torch.lerp(heights[0], heights[-1], along[1:]) - below
    else:
        raise ArgumentError("method", method, "'gap', 'ratio' or 'elbow'")
    if not len(excess) or excess.max() <= floor:
        return OutlierCount(0, float(values[0]))
    last = int(excess.argmax())
    return OutlierCount(last + 1, scale * float(middle[last]))


# --- random matrices -----------------------------------------------------------------------------


def marchenko_pastur_edges(ratio: float, variance: float = 1.0) -> tuple[float, float]:
    r"""Returns where the bulk of a sample covariance matrix begins and ends.

    .. math:: \lambda_\pm = \sigma^2 (1 \pm \sqrt{\gamma})^2

    Args:
        ratio: γ, dimensions over samples (P/N, where gradients of N examples are the samples).
        variance: σ² of each entry.

    Returns:
        ``(λ_−, λ_+)``.

    Reference:
        Marchenko & Pastur 1967; `sagun_2017`, appendix B.
    """
    _check_law(ratio, variance)
    root = math.sqrt(ratio)
    return variance * (1 - root) ** 2, variance * (1 + root) ** 2


def marchenko_pastur_density(x: Tensor, ratio: float, variance: float = 1.0) -> Tensor:
    r"""Returns the limiting density of the eigenvalues of a sample covariance matrix.

    .. math::
        f(x) = \frac{\sqrt{(\lambda_+ - x)(x - \lambda_-)}}{2 \pi \sigma^2 \gamma x}
        \quad\text{for}\quad \lambda_- < x < \lambda_+, \quad\text{else}\; 0

    of ``XXᵀ/N`` with independent entries of ``X: (P, N)`` of mean 0 and variance σ², as P and N
    grow at the fixed ratio γ = P/N. It integrates to 1 less the atom at zero,
    ``marchenko_pastur_atom(ratio)``. (At γ = 1 it grows like ``x^{-1/2}`` towards 0.)

    Args:
        x: where, of any shape.
        ratio: γ, dimensions over samples.
        variance: σ² of each entry.

    Returns:
        The density, float64, of the shape of ``x``.

    Reference:
        Marchenko & Pastur 1967; `sagun_2017`, appendix B.
    """
    lower, upper = marchenko_pastur_edges(ratio, variance)
    x = x.double()
    inside = (x > lower) & (x < upper)
    x = torch.where(inside, x, (lower + upper) / 2)
    roots = torch.sqrt(upper - x) * torch.sqrt(x - lower)
    return torch.where(inside, roots / (2 * math.pi * variance * ratio * x), 0.0)


def marchenko_pastur_atom(ratio: float) -> float:
    r"""Returns the share of eigenvalues that are zero, since there are fewer samples.

    .. math:: \max(0,\; 1 - 1/\gamma)

    Args:
        ratio: γ, dimensions over samples.

    Returns:
        From 0 to below 1; for P parameters and N samples, P times it is P − N.

    Reference:
        `sagun_2017`, appendix B.
    """
    _check_law(ratio, 1.0)
    return max(0.0, 1 - 1 / ratio)


def outlier_threshold(ratio: float, variance: float = 1.0) -> float:
    r"""Returns how large an eigenvalue of the population must be to leave the bulk of the sample.

    .. math:: \sigma^2 (1 + \sqrt{\gamma})

    Below it the sample shows nothing: its largest eigenvalue is that of pure noise.

    Args:
        ratio: γ, dimensions over samples.
        variance: σ², the other eigenvalues of the population.

    Returns:
        The threshold.

    Reference:
        Baik, Ben Arous & Péché 2005; Baik & Silverstein 2006 for real entries; `sagun_2017`,
        appendix B.
    """
    _check_law(ratio, variance)
    return variance * (1 + math.sqrt(ratio))


def spiked_eigenvalue(spike: float, ratio: float, variance: float = 1.0) -> float:
    r"""Returns the largest eigenvalue of the sample, for one such eigenvalue of the population.

    .. math:: \ell \left(1 + \frac{\gamma \sigma^2}{\ell - \sigma^2}\right)
              \quad\text{for}\quad \ell > \sigma^2 (1 + \sqrt{\gamma}), \quad\text{else}\; \lambda_+

    Args:
        spike: ℓ, the eigenvalue of the population.
        ratio: γ, dimensions over samples.
        variance: σ², the other eigenvalues of the population.

    Returns:
        Its limit as P and N grow.

    Reference:
        Baik & Silverstein 2006, Theorem 1.1; `sagun_2017`, appendix B.
    """
    check_number("spike", spike)
    if spike <= outlier_threshold(ratio, variance):
        return marchenko_pastur_edges(ratio, variance)[1]
    return spike * (1 + ratio * variance / (spike - variance))


def _check_law(ratio: float, variance: float) -> None:
    check_number("ratio", ratio, exclusive=True)
    check_number("variance", variance, exclusive=True)
