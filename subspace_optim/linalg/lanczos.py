r"""Thick-restart Lanczos: the top eigenpairs of a symmetric matrix that is known by its products.

The Krylov space of ``H`` and a random vector is built row by row, and restarted with the best of
its Ritz vectors (``krylov``). Here stands when their pairs are the top ones.

The Krylov space of b vectors holds b directions of a repeated eigenvalue, and blends eigenvalues
that it cannot yet tell apart, with residuals that look converged. So the solve starts from two
vectors: no eigenvalue that stands alone or in a pair can be missed. Where two that were found are
too close to be told apart, there may be a third: then the pairs are accepted only when a fresh
random vector, taken through enough products to find a missing one, found none. (The second vector
costs three products where a search after every solve would cost eight.)

A small residual says that an eigenvalue is near, and not that it is one of the top: in a bulk that
is narrow beside the accuracy every vector has one. So pairs are accepted only when a larger
eigenvalue would have shown (``start_vectors``).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ConvergenceWarning, check_integer
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.krylov import Krylov
from subspace_optim.linalg.products import own_precision

_CROWDED = 10.0
"""Eigenvalues that differ by less than this many residuals may hide another between them."""
_ALIKE = 0.5
"""... or, whatever their residuals, by less than epsilon to this power, relative to all of them.

The part of a Krylov space that tells such from each other is lost in rounding.
"""
_RESOLVED = 0.25
"""The residual of the next pair that tells where the bulk begins, relative to the gap above it."""
_MISS_PROBABILITY = 1e-2
"""How likely the final search is to overlook a direction, if there is one to be found."""
_LONGEST_SEARCH = 12
"""Products of the final search where what it may find hardly differs from what was found."""
_HARDLY = 10.0
"""... by this many times the accuracy that was asked for."""
_OVERLOOKED = 0.05
"""How likely an eigenvalue above ``θ_k`` by the accuracy that was asked for may be hidden."""
_BESIDE = 3.0
"""... or above it by this many times that, where ``θ_k`` stands alone."""


@dataclass(frozen=True)
class EigenSolution:
    """What an eigensolve returns.

    Attributes:
        basis: the top eigenpairs.
        products: products with the matrix that were used.
        ritz_steps: Rayleigh-Ritz steps, each with the solve's only synchronisation with the host.
        converged: every residual is as small as was asked for, and no pair is known to be missing.
        guard: the pair that comes next, ``(λ_{k+1}, u_{k+1})``, as the solve left it: an eigenvalue
            from below, with its residual. Of no rows if k = P.
        lowest: the smallest eigenvalue, as the solve knows it: from above.
        mean: an estimate of the mean of all eigenvalues, from the random start vectors.
        asymmetry: ``‖T − Tᵀ‖ / ‖HQᵀ‖`` of the products with the rows ``Q`` that the solve has taken
            anyway, ``T = Q H Qᵀ``, at its largest: rounding, if the matrix is symmetric. Otherwise
            it compares with ``‖H − Hᵀ‖ / ‖H‖``, and the pairs are those of no matrix. 0 for
            a single row.
    """

    basis: EigenBasis
    products: int
    ritz_steps: int
    converged: bool
    guard: EigenBasis
    lowest: float
    mean: float
    asymmetry: float


class _Lanczos(Krylov):
    """The rows of one eigensolve, and whether their Ritz pairs are the top eigenpairs."""

    def __init__(
        self,
        matmat: Callable[[Tensor], Tensor],
        size: int,
        k: int,
        *,
        tol: float,
        accuracy: float,
        max_products: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        inner: InnerProduct,
    ):
        super().__init__(
            matmat,
            size,
            k,
            max_products=max_products,
            seed=seed,
            dtype=dtype,
            device=device,
            inner=inner,
        )
        self.floor = max(50 * self.epsilon, accuracy)
        self.tol = max(tol, self.floor)

    def rayleigh_ritz(self) -> None:
        """Solves the small eigenproblem, and foresees how many products it will take in all.

        As if the residual had shrunk by the same factor with each product after the first k, and
        went on to. It is what a solve tells of itself: nothing follows from it.
        """
        super().rayleigh_ritz()
        self.foreseen = max(self.products + 1, self.foreseen)
        if len(self.values) < self.k or not self.measure:
            return
        self.relative_residual = reached = float(self.residuals.max() / self.measure)
        if 0 < reached < 1:
            steps = (self.products - self.k) / -math.log(reached)
            left = max(0.0, math.log(reached / self.tol)) * steps
            self.foreseen = self.products + 1 + math.ceil(left)
        self.foreseen = min(self.foreseen, self.max_products)

    @property
    def measure(self) -> float:
        """What ``tol`` is relative to: ``max|λ|`` of the wanted pairs; the floor, of all."""
        wanted = float(np.abs(self.values[: self.k]).max())
        return max(wanted, self.floor / self.tol * self.scale)

    @property
    def accuracy(self) -> float:
        """The residual that was asked for."""
        return self.tol * self.measure

    @property
    def residuals(self) -> NDArray[np.float64]:
        """``‖Hv − θv‖`` of the top k Ritz pairs; an upper bound where a direction was lost."""
        return self.residuals_of(self.k)

    def converged(self, max_angle: float | None) -> bool:
        """No residual is above ``accuracy``, no angle above ``max_angle``, and no pair hidden.

        Where the accuracy cannot tell ``λ_k`` from ``λ_{k+1}`` no angle is defined.
        """
        residuals, accuracy = self.residuals, self.accuracy
        if residuals.max() > accuracy or not self.shown:
            return False
        if max_angle is None or self.size == self.k:
            return True
        if len(self.values) == self.k:
            return False
        gaps = self.values[: self.k] - self.values[self.k]
        if gaps[-1] <= accuracy:
            return True
        resolved = self.residuals_of(self.k + 1)[-1] <= _RESOLVED * gaps[-1]
        return bool(resolved and np.linalg.norm(residuals / gaps) <= max_angle)

    @property
    def shown(self) -> bool:
        """A larger eigenvalue that is not among the top k would have shown.

        A residual tells that an eigenvalue is near, not which: where the bulk is narrow beside
        the accuracy, any blend of it has converged before the first outlier is to be seen.
        """
        if self.complete or self.scale == 0:
            return True
        last, step = float(self.values[self.k - 1]), self.accuracy
        if len(self.values) > self.k:
            # What stands alone by more than that has been lifted out of the bulk from as little as
            # what may be hidden, and tells of the same heights.
            step = max(step, min(last - float(self.values[self.k]), _BESIDE * step))
        hidden = self.starts.overlooked(self.small_problem(), last + step, self.accuracy)
        return hidden <= _OVERLOOKED

    def solve(self, max_angle: float | None) -> bool:
        """Takes products until the pairs are the top ones; returns whether they are."""
        cycle = max(2, self.k // 4)
        self.extend(self.k + cycle)
        while not (accurate := self.converged(max_angle)) or not self.complete:
            if accurate and not self.exhausted:
                if not len(self.crowded):
                    break
                grown, noticed = self.search(), self.accuracy
                accurate = self.converged(max_angle) and not self.exhausted
                if accurate and grown <= noticed:
                    break
            if self.exhausted:
                return self.complete
            self.extend(cycle)
        return accurate

    @property
    def crowded(self) -> NDArray[np.float64]:
        """Those of the top k Ritz values that are so close to the one above that a third may hide.

        Only a third that would be among the top k itself matters.
        """
        above = self.values[: max(1, self.k - 1)]
        width = max(_CROWDED * self.residuals.max(), self.epsilon**_ALIKE * self.scale)
        close: NDArray[np.float64] = above[1:][-np.diff(above) <= width]
        return close

    def search(self) -> float:
        """Looks for a direction that the rows have missed, from a fresh random vector.

        Returns:
            By how much the sum of the top k Ritz values grew (Ky Fan: it never falls).
        """
        top = float(self.values[: self.k].sum())
        steps = self._search_length()
        # A direction that rounding has begun to bring in hides in the pending rows: multiply them.
        # Behind an invariant subspace they were random rows, and what remains of their products is
        # the direction, to which a fresh row would be orthogonal: multiply that too.
        for _ in range(2):
            self.extend(len(self.pending))
        self.make_room(2)
        if self.count < self.size:
            self.add_random_row()
        if self.max_rows == self.size:  # a few pending rows can be most of what is left: all go on
            for _ in range(steps):
                self.extend(len(self.pending))
            return float(self.values[: self.k].sum()) - top
        for _ in range(self.possible(steps)):
            if self.count == self.max_rows < self.size:
                self.rayleigh_ritz()
                self.make_room(2)
            self.multiply(self.pending[-1:])
        self.rayleigh_ritz()
        return float(self.values[: self.k].sum()) - top

    def _search_length(self) -> int:
        """How many products the search needs.

        The rows hold all that was found, so that a direction which is missing stands beside the
        rest of the spectrum: below ``θ_{k+1}``, and above what was found of the negative end. It
        is at least as high as the lowest value that may hide one. A Chebyshev polynomial that is
        bounded by 1 on the rest grows like ``exp(degree · acosh x)/2`` there. It must lift the
        missing eigenvector above the rest from the overlap of about ``1/√P`` that a random vector
        has with it; an overlap that is ``_MISS_PROBABILITY`` times as large is less likely than
        that.
        """
        if len(self.values) <= self.k or self.scale == 0:
            return _LONGEST_SEARCH
        hidden, below = self.crowded[-1], self.values[self.k]
        # A fresh row is orthogonal to what was found of a negative end, as long as that is held.
        found = self.beyond & (self.residuals_of(len(self.values)) <= self.accuracy)
        lowest = self.values[~found][-1]
        spread = max(below - lowest, self.epsilon * self.scale)
        height = max(hidden - below, self.epsilon * self.scale)
        growth = math.acosh(1 + 2 * height / spread)
        degree = math.log(2 * math.sqrt(self.size) / _MISS_PROBABILITY) / growth
        length = max(2, math.ceil(degree) + 1)
        return length if height > _HARDLY * self.accuracy else min(length, _LONGEST_SEARCH)


@own_precision
def top_eigenpairs(
    matmat: Callable[[Tensor], Tensor],
    size: int,
    k: int,
    *,
    tol: float = 1e-3,
    max_angle: float | None = None,
    max_products: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    accuracy: float = 0.0,
    inner: InnerProduct = WHOLE,
) -> EigenSolution:
    r"""Returns the k largest (algebraic) eigenpairs of the symmetric matrix behind ``matmat``.

    Each pair satisfies

    .. math:: \|Hv - \lambda v\| \le \max\big(\text{tol} \cdot \max_{i \le k} |\lambda_i|, \;
              \text{floor} \cdot \max|\lambda|\big)

    where the first maximum is over the pairs that are returned, and the second over the spectrum of
    ``H``: it matters where the wanted eigenvalues are tiny beside the lowest. And they are the top:
    a solve ends when an eigenvalue that exceeds the last of them by the right-hand side would have
    shown but with a probability of 5 % at most, over the random start vectors; by several times
    that, of next to nothing. Repeated eigenvalues come with their
    multiplicity, and negative, indefinite, zero and rank-deficient matrices are no exceptions.

    Memory: at most ``2k + 6`` vectors (all P where P is at most 256 or 4k + 12), and five beside
    them while a product is taken or expanded. All of it stays on ``device``; the k×k problems alone
    visit the host.

    A third or later copy of an eigenvalue is searched for until overlooking it is less likely
    than 1 %, where there is a gap below ``λ_k``. Without one, what may be overlooked differs from
    the pair that was found in its place by no more than a few ``tol``.

    A ``k`` that is not from 1 to P raises ``ArgumentError``, a product that is NaN or infinite
    ``NonFiniteError``.

    Args:
        matmat: the rows ``(j, P)`` to their products ``(j, P)``, for j up to 2. It may keep
            nothing of its argument.
        size: P.
        k: how many pairs, from 1 to P.
        tol: the relative residual. Below the floor (50 times the epsilon of the dtype, or
            ``accuracy``) the floor holds, with a warning.
        max_angle: if given, the solve also goes on until ``√Σ(‖r_i‖ / (λ_i − λ_{k+1}))²``, which
            bounds the sine of the largest angle to the true subspace, is no more than this, and
            ``λ_{k+1}`` is known to a quarter of the gap above it; unless that gap is below the
            accuracy that ``tol`` asks for.
        max_products: where to stop at the latest (default ``200 + 20 k``).
        seed: of the random vectors.
        dtype: of the vectors.
        device: of the vectors.
        accuracy: relative error of the products, where it is more than the dtype's.
        inner: completes sums over coordinates, where the vectors that ``matmat`` takes and returns
            hold those that lie here.

    Returns:
        The pairs, what they cost, and whether they converged.

    Warns:
        ConvergenceWarning: ``tol`` was not reached; the message tells the residual that was.
    """
    check_integer("k", k, minimum=1, maximum=size, remedy=f"The matrix has {size} rows.")
    if max_products is None:
        max_products = 200 + 20 * k
    solver = _Lanczos(
        matmat,
        size,
        k,
        tol=tol,
        accuracy=accuracy,
        max_products=max_products,
        seed=seed,
        dtype=dtype,
        device=torch.device(device),
        inner=inner,
    )
    with solver.progress:
        accurate = solver.solve(max_angle)
    converged = accurate and tol >= solver.floor
    if not converged:
        reached = float(solver.residuals.max() / solver.measure) if solver.measure else 0.0
        reason = (
            f"tol={tol:g} is below the floor {solver.floor:.1e} of {dtype} products"
            if accurate
            else f"max_products={max_products} was reached before tol={tol:g}"
        )
        message = f"Eigensolve: {reason}; the relative residual is {reached:.1e}."
        warnings.warn(message, ConvergenceWarning, stacklevel=3)  # past the wrapper
    lowest = float(solver.values[-1])
    basis, guard = solver.pairs()
    return EigenSolution(
        basis,
        solver.products,
        solver.ritz_steps,
        converged,
        guard,
        lowest,
        solver.mean,
        solver.asymmetry,
    )
