r"""What a basis still holds of a matrix that has changed: probes of it, and its refinement.

While the parameters move, the rows of ``V`` stop being eigenvectors: ``r_i = (I − P) H v_i`` grows.
To first order the true eigenvectors are ``v_i + (λ_i − H)⁻¹ r_i``, so that with the gaps
``g_i = λ_i − λ_{k+1}``

.. math:: \sin\angle(V, U) \;\le\; A = \Big(\sum_i \|r_i\|^2 / g_i^2\Big)^{1/2}

(Davis & Kahan 1970). ``A``, the *staleness* of the basis, takes one product for each row. A *probe*
estimates it from one or a few, and another product looks at the *guard*, the pair that comes
next: it notices a direction that enters from the bulk, which no ``r_i`` shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspace_optim._inner_product import InnerProduct
from subspace_optim._validation import NonFiniteError
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.products import not_finite, own_precision
from subspace_optim.linalg.rows import column_blocks, gram, largest_sine, orthonormalise_, square

FAILURE_PROBABILITY = 0.04
"""How likely the bound of a probe is to be too small."""
SCATTER = 0.25
"""Standard deviation of the square of a probe, relative to its mean, that is good enough."""


_SEEN = 0.01
"""The least part of ``Q`` that a pair has, of the largest, where its eigenvalue is looked at."""


@dataclass(frozen=True)
class Probe:
    """What a few products tell of a basis.

    Attributes:
        staleness: an estimate of ``A``. Its square has the mean ``A²``.
        bound: at least ``(Σ ‖r_i‖²/g_i²)^½`` along every direction of the subspace, and so the
            largest sine to first order, but with ``FAILURE_PROBABILITY``.
        guard: the guard after one step of power iteration, with its Rayleigh quotient.
        shrunk: the gaps ``g_i`` at present over those that are known, in the mean that the probe
            weighs them in: eigenvalues fall or rise, though no vector turns. Staleness and bound
            are with the present ones; 0 or less means that the subspace has lost its gap.
        effective_rank: an estimate of ``r = (tr M)²/tr(M²)``, ``M_ij = ⟨r_i, r_j⟩/(g_i g_j)``;
            ``None`` from a single vector. The largest sine is at most ``A r^(−1/4)``.
        least: the smallest of the eigenvalues at present that the probe shows; where it would be
            below the ``level``, as one more product has it.
    """

    staleness: float
    bound: float
    guard: EigenBasis
    shrunk: float = 1.0
    effective_rank: float | None = None
    least: float = math.inf


@dataclass(frozen=True)
class Refinement:
    """A basis after one step of subspace iteration.

    Attributes:
        basis: the new basis. Its eigenvalues are Rayleigh-Ritz values and what the correction adds
            to them; its residuals are bounds, to first order.
        guard: the pair that comes next.
        before: the staleness ``A`` of the basis that it started from.
        after: a bound on the staleness of the new one, to first order.
        sine: of the largest angle between the two.
        effective_rank: of the rows ``r_i/g_i``: k where they are equally long and orthogonal, 1
            where they are one direction alone. Probes scatter the more, the lower it is.
    """

    basis: EigenBasis
    guard: EigenBasis
    before: float
    after: float
    sine: float
    effective_rank: float


def total_staleness(basis: EigenBasis, guard: EigenBasis) -> float:
    """Returns ``A = (Σ ‖r_i‖²/g_i²)^½`` of pairs with known residuals; infinite without a gap."""
    residuals, values = (t.double().cpu().numpy() for t in (basis.residuals, basis.eigenvalues))
    if not guard.k:
        return 0.0
    return _staleness(residuals, values - _top_of_bulk(values, *_pair(guard)))


def staleness_of_rounding(basis: EigenBasis, guard: EigenBasis, *, mean: float) -> float:
    """Returns what ``A`` is of vectors that rounding alone has turned; infinite without a gap.

    What it turns them by is random, so that ``H − λ_i`` multiplies it by ``mean − λ_i``: with small
    gaps ``A`` is many times the sine.

    Args:
        basis: pairs that are held in fewer bits.
        guard: the pair that comes next; of no rows if k = P.
        mean: the mean of all eigenvalues.
    """
    if not guard.k:
        return 0.0
    values = basis.eigenvalues.double().cpu().numpy()
    return _staleness(
        basis.rounding * (values - mean), values - _top_of_bulk(values, *_pair(guard))
    )


def _staleness(residuals: NDArray[np.float64], gaps: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(residuals / gaps)) if gaps.min() > 0 else math.inf


def _effective_rank(gram: NDArray[np.float64], k: int) -> float | None:
    """Returns ``r = (tr M)²/tr(M²)``, or an estimate from ``Q M Qᵀ`` of m random rows.

    With ``D``, what of ``Q M Qᵀ`` is no multiple of the identity,
    ``E‖D‖² = (m−1)(m+2)/((k−1)(k+2)) · (tr M² − (tr M)²/k)``, and ``k/r − 1`` is
    ``k tr(M²)/(tr M)² − 1``.
    """
    m, trace = len(gram), float(np.trace(gram))
    if m == 1 < k:
        return None
    if k == 1 or not trace > 0:
        return float(k)
    uneven = float(np.square(gram - trace / m * np.eye(m)).sum())
    excess = k * (k - 1) * (k + 2) / ((m - 1) * (m + 2)) * uneven / (k / m * trace) ** 2
    return k / (1 + excess)


def _pair(guard: EigenBasis) -> tuple[float, float]:
    value, residual = torch.cat([guard.eigenvalues, guard.residuals]).tolist()
    return value, residual


def _top_of_bulk(values: NDArray[np.float64], value: float, residual: float) -> float:
    """Returns ``λ_{k+1}`` from the guard, on the safe side by its residual, if that is small.

    A Rayleigh quotient is below the eigenvalue; half of the gap is left in any case.
    """
    return min(value + residual, (value + float(values[-1])) / 2)


def least_overlap(k: int, m: int, probability: float) -> float:
    r"""Returns the squared overlap that a random subspace has with any direction, or more.

    The squared length of a unit vector of ``R^k`` projected onto m random dimensions is
    ``Beta(m/2, (k−m)/2)``. It is below the result with no more than the given probability:

    .. math:: P(x < t) \le C\, t^{m/2} / \sqrt{1 - t}, \qquad
              C = \Gamma(k/2) \,/\, \big(\Gamma(m/2 + 1)\, \Gamma((k - m)/2)\big)
    """
    if m == k:
        return 1.0
    logarithm = math.lgamma(k / 2) - math.lgamma(m / 2 + 1) - math.lgamma((k - m) / 2)
    least: float = (probability / math.exp(logarithm)) ** (2 / m)
    return least * (1 - least)


def vectors_needed(k: int, effective_rank: float | None) -> int:
    """Returns how many vectors keep the square of a probe within 25 % of its mean, mostly.

    Its variance, relative to the square of its mean, is ``2(k/r − 1)/(m(k+2)) · (k−m)/(k−1)``.

    Args:
        k: dimension of the subspace.
        effective_rank: r; half of k where it is not known.
    """
    excess = 1.0 if effective_rank is None else k / effective_rank - 1
    for m in range(1, k):
        if 2 * excess / (m * (k + 2)) * (k - m) / (k - 1) <= SCATTER**2:
            return m
    return k


@own_precision
def probe(
    matmat: Callable[[Tensor], Tensor],
    basis: EigenBasis,
    guard: EigenBasis,
    *,
    lowest: float,
    mean: float,
    seed: int,
    vectors: int = 1,
    guarded: bool = True,
    level: float = -math.inf,
) -> Probe:
    r"""Estimates the staleness of a basis from few products, and moves its guard with another.

    With m random orthonormal rows ``Q`` of ``R^k`` and ``G = diag(g_i)``,

    .. math:: \mathbb{E}\, \tfrac{k}{m} \|(I - P) H V^\top G^{-1} Q^\top\|_F^2
                  = \sum_i \|r_i\|^2 / g_i^2

    The rows ``r_i/g_i`` of real networks are often nearly orthogonal and of like size, so that one
    vector is enough; m = k is exact. (Random signs would scatter less, but could miss a
    direction entirely.)

    Args:
        matmat: the rows ``(j, P)`` to their products ``(j, P)``, here for ``j = m + 1``.
        basis: k eigenpairs, of an earlier matrix.
        guard: the pair that comes next; of no rows if k = P.
        lowest: the smallest eigenvalue.
        mean: the mean of all eigenvalues.
        seed: of Q.
        vectors: m, from 1 to k.
        guarded: look at the guard too; without, there are m products.
        level: an eigenvalue that seems to have fallen below it is looked at: one product more.

    Returns:
        The estimate, a bound, and the guard.

    Raises:
        NonFiniteError: a product is not finite.
    """
    if guard.k == 0:  # k = P: the subspace is all of the space
        return Probe(0.0, 0.0, guard)
    k, values = basis.k, basis.eigenvalues.double().cpu().numpy()
    below = _top_of_bulk(values, *_pair(guard))
    gaps = values - below
    if gaps.min() <= 0:
        return Probe(math.inf, 1.0, guard, 0.0)
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randn(k, vectors, generator=generator, device="cpu").double()
    Q = torch.linalg.qr(draws).Q.T
    rotation = Q / torch.from_numpy(gaps)
    rows = basis.combine(rotation.to(basis.device, basis.dtype))
    products = matmat(torch.cat([rows, guard.vectors]) if guarded else rows)
    inside = basis.coefficients(products)
    basis.add_to(products, inside, alpha=-1)
    quotients = torch.linalg.vecdot(rotation, inside[:vectors].double().cpu())
    # Those of the vectors, and with the guard's product what is left of its own.
    squares, along = basis.inner.sums(
        gram(products[:vectors], products[:vectors]), gram(guard.vectors, products[-1:])
    )
    overlaps = squares.cpu().numpy()
    found = math.sqrt(np.trace(overlaps))
    if not math.isfinite(found):
        raise NonFiniteError(not_finite())
    if guarded:
        shift = _shift(values, mean, lowest, float(guard.eigenvalues), basis.size)
        guard = _power_step(guard.vectors[0], products[-1], along[0, 0], shift, basis.inner)
    weights = rotation.square()  # Σ_i weights (λ_i − μ) is what the quotients tell anew
    below = max(below, float(guard.eigenvalues))
    known = float((weights @ torch.from_numpy(gaps)).sum())
    shrunk = float(quotients.sum() - weights.sum() * below) / known
    which, least = _least(Q, rotation, inside[:vectors].double().cpu())
    if least < level:  # or the pairs have turned among each other
        row = basis.combine(torch.eye(k)[which : which + 1].to(basis.device, basis.dtype))
        least = float(basis.coefficients(matmat(row))[0, which])
    if shrunk <= 0:
        return Probe(math.inf, 1.0, guard, shrunk, least=least)
    found /= min(1.0, shrunk)
    bound = found / math.sqrt(least_overlap(k, vectors, FAILURE_PROBABILITY))
    staleness = math.sqrt(k / vectors) * found
    rank = _effective_rank(overlaps, k)
    return Probe(staleness, min(1.0, bound), guard, shrunk, rank, least)


def _least(Q: Tensor, rotation: Tensor, products: Tensor) -> tuple[int, float]:
    """Returns which eigenvalue seems to be the smallest, and what it seems to be.

    A pair has its eigenvalue's share of the product with a combination of pairs, where these are
    still eigenvectors.

    Args:
        Q: ``(m, k)``, of which a pair must have a part.
        rotation: ``(m, k)``, the combinations.
        products: ``(m, k)``, their products with the matrix, in the basis.
    """
    parts = Q.square().sum(0)
    values = (rotation * products).sum(0) / rotation.square().sum(0)
    values = torch.where(parts >= _SEEN * parts.max(), values, math.inf)
    which = int(values.argmin())
    return which, float(values[which])


def _power_step(
    vector: Tensor, product: Tensor, quotient: Tensor, shift: float, inner: InnerProduct
) -> EigenBasis:
    """Returns the pair of ``(H − ρ) v``, with the Rayleigh quotient and the residual of ``v``.

    Raises:
        NonFiniteError: the product is not finite.
    """
    value = quotient.to(vector)
    moved = product.sub(vector, alpha=shift)
    squares = inner.sums(square(product - value * vector), square(moved))
    residual, size = torch.stack(squares).sqrt().to(vector)
    if not torch.isfinite(torch.stack([value, residual])).all():
        raise NonFiniteError(not_finite())
    row = torch.where(size > 0, moved / size, vector)
    return EigenBasis(value[None], row[None], residual[None], inner)


@own_precision
def refine(
    matmat: Callable[[Tensor], Tensor],
    basis: EigenBasis,
    guard: EigenBasis,
    *,
    lowest: float,
    mean: float,
) -> Refinement:
    r"""Refines a basis by one step of subspace iteration: k + 1 products.

    The Rayleigh-Ritz pairs ``(θ_i, x_i)`` in the span of basis and guard, with residuals ``r_i``,
    are corrected to first order by a product that has been taken already:

    .. math:: u_i \propto x_i + \frac{r_i}{\theta_i - \rho}
                  = \frac{(H - \rho) x_i}{\theta_i - \rho}

    What of ``r_i`` lies along an eigenvector of the bulk, with eigenvalue μ, should have been
    divided by ``θ_i − μ``: the factor ``(μ − ρ)/(θ_i − ρ)`` of it remains. Most of the bulk is
    near its mean, so ρ is that: on real networks the angle falls to a tenth, where
    ``(λ_{k+1} − ρ)/(λ_k − ρ)``, the bound of subspace iteration, promises a half.

    Args:
        matmat: the rows ``(j, P)`` to their products ``(j, P)``, here for j = k + 1.
        basis: k eigenpairs, of an earlier matrix.
        guard: the pair that comes next: a direction that has entered from the bulk changes place
            with one that has left. Of no rows if k = P.
        lowest: the smallest eigenvalue, for the bound.
        mean: the mean of all eigenvalues.

    Returns:
        The new basis and guard, and the staleness before and after.

    Raises:
        NonFiniteError: a product is not finite.
    """
    k, rows, inner = basis.k, torch.cat([basis.vectors, guard.vectors]), basis.inner
    products = matmat(rows)
    projected = gram(rows, products, inner).cpu().numpy()
    if not np.isfinite(projected).all():
        raise NonFiniteError(not_finite())
    values, ritz = np.linalg.eigh((projected + projected.T) / 2)
    values, ritz = values[::-1].copy(), ritz[:, ::-1].copy()
    below = float(values[k]) if len(values) > k else -math.inf
    shift = _shift(values[:k], mean, lowest, below, basis.size)
    distances = values - shift
    # No correction where it would be a division by nothing: a guard at the mean of the bulk.
    inverse = np.where(distances > 1e-2 * distances[0], 1 / np.maximum(distances, _TINY), 0.0)
    overlaps = _correct_(rows, products, ritz, values, inverse, inner)
    residuals = np.sqrt(np.diagonal(overlaps))
    del products
    orthonormalise_(rows, inner)

    spread = max(abs(below - shift), abs(min(lowest, below) - shift)) if math.isfinite(below) else 0
    remaining = np.minimum(1.0, spread * inverse) * residuals
    growth = residuals**2 * inverse
    corrected = values + growth / (1 + growth * inverse)
    order = np.argsort(-corrected[:k], kind="stable")
    vectors, last = rows[:k], rows[k:].clone()
    if (np.diff(order) < 0).any():
        vectors = vectors[torch.from_numpy(order).to(rows.device)]
    found, reached = (torch.from_numpy(a).to(rows) for a in (corrected, remaining))
    gaps = values[:k] - (_top_of_bulk(values[:k], below, residuals[k]) if guard.k else -math.inf)
    return Refinement(
        EigenBasis(found[order], vectors, reached[order], inner),
        EigenBasis(found[k:], last, reached[k:], inner),
        _staleness(residuals[:k], gaps),
        _staleness(remaining[:k], gaps),
        largest_sine(basis.vectors, vectors, inner),
        _effective_rank(overlaps[:k, :k] / np.outer(gaps, gaps), k) or float(k),
    )


_TINY = np.finfo(np.float64).tiny


def _shift(top: NDArray[np.float64], mean: float, lowest: float, below: float, size: int) -> float:
    """Returns ρ: the mean of the bulk, or less where the bulk reaches far down.

    From ``(λ_k + λ_P)/2`` on, ``H − ρ`` would be larger on ``u_P`` than on ``u_k``.
    """
    others = size - len(top)
    if not others:
        return float(top[-1]) - 1.0  # no bulk: nothing depends on it
    bulk = (mean * size - float(top.sum())) / others
    return min(bulk, below, (float(top[-1]) + min(lowest, below)) / 2)


def _correct_(
    rows: Tensor,
    products: Tensor,
    ritz: NDArray[np.float64],
    values: NDArray[np.float64],
    inverse: NDArray[np.float64],
    inner: InnerProduct,
) -> NDArray[np.float64]:
    """Replaces the rows by the corrected Ritz vectors, in place, and returns ``⟨r_i, r_j⟩``."""
    rotation, theta, factors = (
        torch.from_numpy(np.ascontiguousarray(a)).to(rows)
        for a in (ritz.T, values[:, None], inverse[:, None])
    )
    overlaps = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in column_blocks(rows.shape[1]):
        vectors = rotation @ rows[:, columns]
        residuals = (rotation @ products[:, columns]).addcmul_(theta, vectors, value=-1)
        overlaps += residuals @ residuals.T
        rows[:, columns] = vectors.addcmul_(factors, residuals)
    result: NDArray[np.float64] = inner.sum(overlaps).cpu().numpy()
    return result
