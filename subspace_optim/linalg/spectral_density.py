r"""The whole spectrum of a symmetric matrix in a few products: its density, and its trace.

For a random unit vector ``q`` with ``E qqᵀ = I/P``, the mean of ``qᵀ f(H) q`` is that of ``f`` over
the eigenvalues, ``tr f(H)/P``. Lanczos from ``q`` makes a tridiagonal ``T`` whose eigenvalues
``θ_j``, weighted by the squares of the first entries of its eigenvectors, are a Gauss quadrature of
it: ``qᵀ f(H) q ≈ Σ_j w_j f(θ_j)``, exact for polynomials up to degree 2m − 1 (Golub & Meurant 1994,
*Matrices, moments and quadrature*; Ubaru, Chen & Saad 2017, *Fast estimation of tr(f(A)) via
stochastic Lanczos quadrature*).

The recurrence needs the last two vectors only, and rounding soon costs all others their
orthogonality. To the quadrature that does no harm: the ``T`` that is computed is what exact Lanczos
would give for a larger matrix, all of whose eigenvalues lie within rounding of those of ``H``, and
from a vector with the same weight near each of them (Greenbaum 1989, *Behavior of slightly
perturbed Lanczos and conjugate-gradient recurrences*; Knizhnerman 1996). An eigenvalue that
appears several times shares its weight among its copies. Only eigenvectors cannot be had so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, NonFiniteError, check_integer, check_number
from subspace_optim.linalg.products import not_finite, own_precision

_ROUNDING = 4.0
"""A coupling of less than this many epsilons of the matrix is no more than rounding."""
_VISIBLE = 1e-3
"""The smallest default width, relative to max|λ|: about a point of a picture."""
_ROWS = 16
"""Rows that are multiplied at a time: what bounds the memory beside a sketch."""


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from random vectors.

    Attributes:
        value: the estimate, unbiased.
        standard_error: its standard deviation, as estimated from how much the random vectors
            scatter; 0 where none were needed. Rounding of the products is not in it.
        products: products with the matrix that it took.
    """

    value: float
    standard_error: float
    products: int


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""The density of the eigenvalues of a P×P matrix, as n random probes of m nodes see it.

    .. math:: \frac{1}{P} \sum_{i=1}^P f(\lambda_i) \approx
              \frac{1}{n} \sum_{i=1}^n \sum_{j=1}^m w_{ij} f(\theta_{ij})

    The probes are independent, so that each mean over them has a standard error: their standard
    deviation over √n. It covers what is random, and not what a quadrature of m nodes cannot see:
    polynomials up to degree 2m − 1 are exact, a function with features finer than the nodes lie is
    not. Where one eigenvalue makes up most of a mean, as ``λ_1`` may, the probes scatter like a χ²
    of one degree: most means are then too small, and so are their standard errors (measured with
    n = 12: 80 % within two of them, where it is 93 % of normal samples). For a trace,
    ``hutch_plus_plus`` is better.

    Attributes:
        nodes: ``(n, m)``, ascending, float64 on the host.
        weights: ``(n, m)``, at least 0 and of sum 1 in each row, float64 on the host.
        size: P.
        products: products with the matrix that it took.

    Raises:
        ArgumentError: the shapes do not belong together, or are of fewer than two probes.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def __post_init__(self) -> None:
        shape = tuple(self.nodes.shape)
        if len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
            raise ArgumentError("the shape of nodes", shape, "(n, m), n of at least 2")
        if tuple(self.weights.shape) != shape:
            raise ArgumentError("the shape of weights", tuple(self.weights.shape), f"{shape}")

    @property
    def width(self) -> float:
        """The default width of ``density``: half the distance between nodes where the weight is.

        Of the distances the median by weight is taken, so that the bulk decides, and outliers do
        not. Half of it is the finest detail that shows no separate node; for eigenvalues all over
        an interval it is about 0.7/m of that. It is never less than 10⁻³ max|λ|, which is what a
        picture shows, and which holds where most eigenvalues are equal; 1 for a zero matrix.
        """
        ends = torch.cat([self.nodes[:, :1], self.nodes, self.nodes[:, -1:]], dim=1)
        spacing, order = ((ends[:, 2:] - ends[:, :-2]) / 2).flatten().sort()
        below = self.weights.flatten()[order].cumsum(0)
        median = float(spacing[int((below < below[-1] / 2).sum())])
        return max(median / 2, _VISIBLE * float(self.nodes.abs().max())) or 1.0

    def density(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        r"""Returns the density, smoothed by a Gaussian, and its standard error.

        .. math:: \phi(x) = \frac{1}{n} \sum_{ij} w_{ij}
            \frac{1}{\sqrt{2\pi}\,\sigma} e^{-(x - \theta_{ij})^2 / (2\sigma^2)}

        It integrates to 1; times P it counts eigenvalues.

        Args:
            grid: ``(g,)``, where.
            width: σ (default: ``width``). A smaller one shows single nodes.

        Returns:
            Mean and standard error, each ``(g,)`` in float64.
        """
        if width is None:
            width = self.width
        check_number("width", width, exclusive=True)
        x = _on_host(grid)[:, None]

        def smoothed(nodes: Tensor, weights: Tensor) -> Tensor:
            z = (x - nodes) / width
            return torch.exp(-z.square() / 2) @ weights / (math.sqrt(2 * math.pi) * width)

        return self._over_probes(smoothed)

    def cumulative(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Returns the share of eigenvalues of at most ``x``, and its standard error.

        .. math:: F(x) = \frac{1}{n} \sum_{ij} w_{ij} [\theta_{ij} \le x]

        Rounding leaves the nodes of an eigenvalue on both of its sides, so ask beside it: for the
        share of negative eigenvalues at a small negative ``x``.

        Args:
            x: ``(g,)``.

        Returns:
            Mean and standard error, each ``(g,)`` in float64.
        """
        points = _on_host(x)[:, None]
        return self._over_probes(lambda nodes, weights: (nodes <= points).double() @ weights)

    def moment(self, p: int) -> Estimate:
        r"""Returns the mean of ``λ^p`` over the eigenvalues; times P it is the trace of ``H^p``.

        .. math:: \frac{1}{P} \operatorname{tr} H^p \approx
                  \frac{1}{n} \sum_{ij} w_{ij} \theta_{ij}^p

        Args:
            p: from 0 to 2m − 1, up to where the quadrature is exact.

        Returns:
            The estimate.
        """
        m = self.nodes.shape[1]
        remedy = f"Quadrature is exact up to there: for higher moments take more than {m} steps."
        check_integer("p", p, minimum=0, maximum=2 * m - 1, remedy=remedy)
        value, error = self._over_probes(lambda nodes, weights: nodes**p @ weights)
        return Estimate(float(value), float(error), self.products)

    @own_precision
    def _over_probes(self, quadrature: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the mean of a quadrature over the probes, and its standard error."""
        values = torch.stack([quadrature(*p) for p in zip(self.nodes, self.weights, strict=True)])
        return _mean_and_error(values)


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples))


def _on_host(x: Tensor) -> Tensor:
    if x.dim() != 1:
        raise ArgumentError("the shape of the points", tuple(x.shape), "(g,)")
    return x.detach().to("cpu", torch.float64)


# --- stochastic Lanczos quadrature ---------------------------------------------------------------


@own_precision
def lanczos_quadrature(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    probes: int = 10,
    steps: int = 80,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SpectralDensity:
    """Returns the spectral density of the symmetric matrix behind ``matvec``.

    Each probe starts from a random direction, uniform on the sphere, and takes ``steps`` products.
    Where a Krylov space is complete before, the nodes are eigenvalues, and the places that are left
    hold copies of the last one with weight 0.

    Memory: four vectors, the product among them, whatever ``steps``. The host is visited once a
    probe, never in a product.

    A count that is not allowed raises ``ArgumentError``, before any product.

    Args:
        matvec: ``(P,)`` to the product ``(P,)``. It may keep nothing of its argument.
        size: P.
        probes: n, at least 2. The standard errors shrink like 1/√n.
        steps: m, products of a probe. What can be resolved shrinks like 1/m.
        seed: of the random vectors.
        dtype: of the vectors.
        device: of the vectors.

    Returns:
        Nodes and weights.

    Raises:
        NonFiniteError: a product was NaN or infinite.
    """
    check_integer("size", size, minimum=1)
    remedy = "It takes two to tell by how much they differ: without, there is no standard error."
    check_integer("probes", probes, minimum=2, remedy=remedy)
    check_integer("steps", steps, minimum=1)
    generator = torch.Generator(device=device).manual_seed(seed)
    nodes, weights = torch.empty(2, probes, steps, dtype=torch.float64)
    for i in range(probes):
        start = torch.randn(size, generator=generator, dtype=dtype, device=device)
        start.div_(torch.linalg.vector_norm(start))
        diagonal, beside = _tridiagonal(matvec, start, steps)
        if not (diagonal.isfinite().all() and beside.isfinite().all()):
            raise NonFiniteError(not_finite((i + 1) * steps))
        nodes[i], weights[i] = _quadrature(diagonal, beside, torch.finfo(dtype).eps)
    return SpectralDensity(nodes, weights, size, probes * steps)


def _tridiagonal(
    matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Returns the diagonal of ``T`` and what is beside it, ``(m,)`` each, on the host.

    In the order that keeps neighbours orthogonal (Paige 1972). Sums are taken in float64: squares
    of float32 overflow from 1e19 on, and vanish below 1e-22.
    """
    previous, current = torch.zeros_like(start), start.clone()
    norm = torch.zeros((), dtype=torch.float64, device=start.device)
    rows = []
    for _ in range(steps):
        remainder = previous.mul_(-norm).add_(matvec(current))
        height = (current * remainder).sum(dtype=torch.float64)
        remainder.addcmul_(current, height.to(current.dtype), value=-1)
        norm = torch.linalg.vector_norm(remainder, dtype=torch.float64)
        rows.append(torch.stack([height, norm]))
        # Nothing that remains stays nothing: the space is complete, and what follows is cut off.
        previous, current = current, remainder.div_(torch.where(norm > 0, norm, 1.0))
    diagonal, beside = torch.stack(rows, dim=1).cpu()
    return diagonal, beside


def _quadrature(diagonal: Tensor, beside: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns the m nodes of ``T``, ascending, and their weights.

    ``T`` ends where a coupling is no more than rounding: what was found after it started from
    rounding too, and has no weight.
    """
    steps = len(diagonal)
    scale = torch.maximum(diagonal.abs(), beside).cummax(dim=0).values
    complete = (beside <= _ROUNDING * epsilon * scale).nonzero()
    m = int(complete[0]) + 1 if len(complete) else steps
    couplings = beside[: m - 1].diag(1)
    nodes, vectors = torch.linalg.eigh(diagonal[:m].diag() + couplings + couplings.T)
    padding = steps - m
    weights = torch.cat([vectors[0].square(), vectors.new_zeros(padding)])
    return torch.cat([nodes, nodes[-1:].expand(padding)]), weights


# --- the trace -----------------------------------------------------------------------------------


@own_precision
def hutch_plus_plus(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    products: int = 60,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    r"""Returns an estimate of the trace of the symmetric matrix behind ``matmat``.

    .. math::
        \operatorname{tr} H = \operatorname{tr} Q^\top H Q + \operatorname{tr} \bar H, \qquad
        \bar H = (I - QQ^\top) H (I - QQ^\top), \quad Q = \operatorname{orth}(H S)

    A third of the products sketches the range of ``H`` with random signs ``S``, a third takes the
    trace there as it is, and a third estimates what is left over by Hutchinson's ``zᵀH̄z`` with
    random signs ``z``. Only that part is random, once ``Q`` is there, and unbiased: the standard
    error is the standard deviation of its samples over the root of their number. Where a few
    eigenvalues are large, ``Q`` takes them, and the error falls like 1/products (for positive
    semidefinite matrices) instead of 1/√products.

    With as many products as rows, or more, the trace is summed up from the diagonal: exact, by P
    products, with a standard error of 0.

    Memory: about as many vectors as ``products``, a third of them for ``Q``. The host is visited
    once.

    Args:
        matmat: the rows ``(j, P)`` to their products ``(j, P)``, for j up to 16.
        size: P.
        products: how many to take at most; at least 4, for two samples beside a sketch.
        seed: of the random signs.
        dtype: of the vectors.
        device: of the vectors.

    Returns:
        The trace.

    Raises:
        NonFiniteError: a product was NaN or infinite.

    Reference:
        Meyer, Musco, Musco & Woodruff 2021, *Hutch++: optimal stochastic trace estimation*,
        algorithm 1. What of ``products`` is no multiple of three goes to the last part.
    """
    check_integer("size", size, minimum=1)
    remedy = "Two samples tell a standard error, and a sketch of one vector takes two products."
    check_integer("products", products, minimum=4, remedy=remedy)
    products = min(products, size)
    device = torch.device(device)
    if products == size:
        estimate = _summed(matmat, size, dtype, device)
    else:
        estimate = _sketched(matmat, size, products, seed, dtype, device)
    value, error = torch.stack(estimate).tolist()
    if not (math.isfinite(value) and math.isfinite(error)):
        raise NonFiniteError(not_finite(products))
    return Estimate(value, error, products)


def identity_rows(
    size: int, dtype: torch.dtype, device: torch.device | str, rows: int = _ROWS
) -> Iterator[tuple[int, Tensor]]:
    """Yields the rows of the identity in blocks, each with the index of its first row."""
    for start in range(0, size, rows):
        block = torch.zeros(min(rows, size - start), size, dtype=dtype, device=device)
        block.diagonal(start).fill_(1)
        yield start, block


def _summed(
    matmat: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the trace by as many products as there are rows, and an error of 0."""
    blocks = identity_rows(size, dtype, device)
    trace = torch.cat([matmat(rows).diagonal(start) for start, rows in blocks]).sum(
        dtype=torch.float64
    )
    return trace, torch.zeros_like(trace)


def _sketched(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns trace and standard error by fewer products than there are rows."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def signs(rows: int) -> Tensor:
        bits = torch.randint(2, (rows, size), generator=generator, device=device, dtype=torch.int8)
        return bits.to(dtype).mul_(2).sub_(1)

    def forms(rows: Tensor) -> Tensor:
        return (rows * matmat(rows)).sum(dim=1, dtype=torch.float64)

    sketch = products // 3
    range_ = torch.cat([matmat(signs(j)) for j in _blocks(sketch)])
    largest = range_.abs().max()  # so that no square overflows, or vanishes
    range_.div_(torch.where(largest > 0, largest, 1.0))
    Q = torch.linalg.qr(range_.T).Q.T.contiguous()
    del range_
    inside = torch.cat([forms(rows) for rows in Q.split(_ROWS)]).sum()
    samples = []
    for j in _blocks(products - 2 * sketch):
        z = signs(j)
        samples.append(forms(z.addmm_(z @ Q.T, Q, alpha=-1)))
    outside, error = _mean_and_error(torch.cat(samples))
    return inside + outside, error


def _blocks(count: int) -> list[int]:
    return [min(_ROWS, count - start) for start in range(0, count, _ROWS)]
