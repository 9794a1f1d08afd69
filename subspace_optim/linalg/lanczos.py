r"""Thick-restart Lanczos: the top eigenpairs of a symmetric matrix that is known by its products.

The Krylov space of ``H`` and a random vector is built row by row. With orthonormal rows ``Q`` and
``T = Q H Qᵀ``, an eigenpair ``(θ, y)`` of the small ``T`` gives the Ritz pair ``(θ, Qᵀy)`` of
``H``, and all that ``H Qᵀy − θ Qᵀy`` can hold lies outside the span of ``Q``. When the rows fill
the memory that they are allowed, the best Ritz vectors replace them and the next direction is kept
(Wu & Simon 2000, *Thick-restart Lanczos method for large symmetric eigenvalue problems*).

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

from subspace_optim._progress import Progress
from subspace_optim._validation import ConvergenceWarning, NonFiniteError, check_integer
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.products import not_finite, own_precision
from subspace_optim.linalg.rows import column_blocks, orthonormalise_
from subspace_optim.linalg.start_vectors import SmallProblem, StartVectors

_START = 2
"""Random vectors that a solve starts from."""
_CROWDED = 10.0
"""Eigenvalues that differ by less than this many residuals may hide another between them."""
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
_SMALL = 256
"""Up to this size, and up to 4k + 12, all rows are kept: they take little memory, and end in exact
pairs."""
_ROUNDED = 0.9
"""A remainder with a part as long as this in the rows that it remains outside of is rounding."""
_LARGE = 1 << 12
"""From this size on, random vectors are nearly orthogonal to a few rows, and cost time to draw."""


@dataclass(frozen=True)
class EigenSolution:
    """What an eigensolve returns.

    Attributes:
        basis: the top eigenpairs.
        products: products with the matrix that were used.
        restarts: Rayleigh-Ritz steps, each with the solve's only synchronisation with the host.
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
    restarts: int
    converged: bool
    guard: EigenBasis
    lowest: float
    mean: float
    asymmetry: float


class _KrylovRows:
    """Orthonormal rows, held in two blocks so that the first becomes the result without a copy."""

    def __init__(self, k: int, rows: int, size: int, dtype: torch.dtype, device: torch.device):
        self.head = torch.empty(k, size, dtype=dtype, device=device)
        self.tail = torch.empty(rows - k, size, dtype=dtype, device=device)

    def __getitem__(self, j: int) -> Tensor:
        k = len(self.head)
        return self.head[j] if j < k else self.tail[j - k]

    def coefficients(self, v: Tensor, n: int) -> Tensor:
        """Returns ``⟨q_i, v⟩`` for the first ``n`` rows."""
        k = len(self.head)
        return torch.cat([self.head[:n] @ v, self.tail[: max(n - k, 0)] @ v])

    def subtract_(self, v: Tensor, coefficients: Tensor) -> None:
        """Subtracts ``Σ_i c_i q_i`` from ``v``, in place."""
        k, n = len(self.head), len(coefficients)
        v.addmv_(self.head[:n].T, coefficients[:k], alpha=-1)
        if n > k:
            v.addmv_(self.tail[: n - k].T, coefficients[k:], alpha=-1)

    def rotate_(self, rotation: NDArray[np.float64]) -> None:
        """Replaces the first ``n`` rows by ``p`` combinations of them; ``rotation`` is ``(p, n)``.

        In place, some columns at a time: a restart allocates no vector.
        """
        k, (p, n) = len(self.head), rotation.shape
        weights = torch.from_numpy(rotation.copy()).to(self.head)
        for columns in column_blocks(self.head.shape[1]):
            rows = torch.cat([self.head[:n, columns], self.tail[: max(n - k, 0), columns]])
            rotated = weights @ rows
            self.head[:p, columns] = rotated[:k]
            self.tail[: max(p - k, 0), columns] = rotated[k:]


class _Lanczos:
    """The state of one eigensolve.

    Rows are *multiplied* (their product was taken) or *pending*. Every product is expanded in all
    rows, and what remains outside becomes a new pending row, so that with the rows ``Q`` split
    into ``M`` and ``D``

        H Q_M = Q_M T_MM + Q_D T_DM:

    the residual of a Ritz pair ``(θ, y)`` of ``T_MM`` is ``‖T_DM y‖``. One pending row is the
    classic Lanczos recurrence; several are a band (Ruhe 1979).
    """

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
    ):
        self.matmat, self.size, self.k = matmat, size, k
        self.max_products = max(max_products, k)  # without k products there are no k pairs
        self.max_rows = size if size <= max(_SMALL, 4 * k + 12) else 2 * k + 6
        self.rows = _KrylovRows(k, self.max_rows, size, dtype, device)
        self.projected = torch.zeros(self.max_rows, self.max_rows, dtype=dtype, device=device)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.epsilon = torch.finfo(dtype).eps
        self.longest = torch.zeros((), dtype=torch.float64, device=device)
        self.floor = max(50 * self.epsilon, accuracy)
        self.tol = max(tol, self.floor)
        self.count = 0
        self.multiplied: list[int] = []
        self.pending: list[int] = []
        # Directions that a restart had no room for: their part in the product of each Ritz row.
        self.lost: NDArray[np.float64] = np.zeros((0, 0))
        self.products = 0
        self.restarts = 0
        self.progress = Progress(f"top {k} eigenpairs")
        self.asymmetry = 0.0
        for _ in range(min(_START, size)):
            self.add_random_row()
        self.spare = self._random()
        self.starts = StartVectors(size, self.epsilon)
        self.first = list(self.pending)  # the rows that a solve or restart began with

    @property
    def complete(self) -> bool:
        """All of the space was multiplied: the Ritz pairs are the eigenpairs."""
        return len(self.multiplied) == self.size

    def _random(self) -> Tensor:
        v = torch.randn(
            self.size,
            generator=self.generator,
            dtype=self.projected.dtype,
            device=self.projected.device,
        )
        return v.div_(torch.linalg.vector_norm(v))

    def _add_row(self, row: Tensor) -> None:
        self.rows[self.count].copy_(row)
        self.pending.append(self.count)
        self.count += 1

    def add_random_row(self) -> None:
        """Adds a random direction outside the rows to the pending ones."""
        v = self._random()
        for _ in range(2):
            self.rows.subtract_(v, self.rows.coefficients(v, self.count))
            v.div_(torch.linalg.vector_norm(v))
        self._add_row(v)

    def multiply(self, block: list[int]) -> None:
        """Takes the products with some pending rows, and adds what remains of each as a new one.

        No value leaves the device. A remainder that is no more than rounding is replaced by a
        random direction: an invariant subspace is then complete, and the search goes on outside.
        """
        products = self.matmat(torch.stack([self.rows[j] for j in block])).contiguous()
        for j, product in zip(block, products, strict=True):
            self._expand(j, product)
        self.progress.tick(lambda: f"{self.products} products")

    def _expand(self, j: int, w: Tensor) -> None:
        """Expands the product ``w`` with row ``j`` in all rows; what remains is a new row."""
        n = self.count
        self.products += 1
        self.pending.remove(j)
        self.multiplied.append(j)
        h = self.rows.coefficients(w, n)
        self.rows.subtract_(w, h)
        self.projected[:n, j] = h
        if n == self.size:
            return
        # In float64: squares of float32 overflow from 1e19 on, and vanish below 1e-22.
        norm = torch.linalg.vector_norm(w, dtype=torch.float64)
        # Beside the largest product so far: that of a row in the kernel is rounding altogether.
        length = torch.linalg.vector_norm(h, dtype=torch.float64)
        self.longest = torch.maximum(self.longest, length)
        direction = w.div_(torch.where(norm > 0, norm, 1.0))
        again = self.rows.coefficients(direction, n)
        # ... or lies in the rows once more: what rounding has left there.
        broke_down = norm <= 4 * self.epsilon * self.longest
        broke_down |= torch.linalg.vector_norm(again) > _ROUNDED
        # Another one at each product: the same again would be in the rows already.
        other = self.spare.roll(self.products) if self.size >= _LARGE else self._random()
        direction = torch.where(broke_down, other, direction)
        again = torch.where(broke_down, self.rows.coefficients(other, n), again)
        norm = torch.where(broke_down, 0.0, norm)
        # Twice is enough (Giraud et al. 2005), but for random vectors of few dimensions.
        for repeated in (False,) if self.size >= _LARGE else (False, True):
            if repeated:
                again = self.rows.coefficients(direction, n)
            self.rows.subtract_(direction, again)
            self.projected[:n, j] += norm * again
            length = torch.linalg.vector_norm(direction)
            direction.div_(length)
            norm = norm * length
        self._add_row(direction)
        self.projected[n, j] = norm

    def extend(self, steps: int) -> None:
        """Takes ``steps`` products, the oldest pending row first, and solves the small problem."""
        self.make_room(steps)
        steps = self._possible(steps)
        while steps > 0:
            block = self.pending[: min(_START, steps)]
            self.multiply(block)
            steps -= len(block)
        self.rayleigh_ritz()

    def _possible(self, steps: int) -> int:
        """How many of ``steps`` products the space and the limit allow."""
        left = self.max_products - self.products
        return max(0, min(steps, left, self.size - len(self.multiplied)))

    @property
    def exhausted(self) -> bool:
        """No product is left."""
        return self.products >= self.max_products

    def rayleigh_ritz(self) -> None:
        """Solves the small eigenproblem, descending, in float64. The only host synchronisation.

        Raises:
            NonFiniteError: a product was not finite.
        """
        projected = self.projected.to("cpu", torch.float64).numpy()
        if not np.isfinite(projected).all():
            raise NonFiniteError(not_finite(self.products))
        if self.restarts == 0:  # zᵀHz of random unit vectors has the mean tr H / P
            self.mean = float(np.diagonal(projected)[:_START].mean())
        # Every product was expanded in all rows of its time, and a later row is in it as its
        # remainder, or not at all: both triangles are known. The upper one is the measured one.
        square = projected[np.ix_(self.multiplied, self.multiplied)]
        if length := np.linalg.norm(projected[:, self.multiplied]):
            self.asymmetry = max(self.asymmetry, float(np.linalg.norm(square - square.T) / length))
        upper = np.triu(square)
        values, ritz = np.linalg.eigh(upper + np.triu(upper, 1).T)
        self.values, self.ritz = values[::-1].copy(), ritz[:, ::-1].copy()
        self.coupling = projected[np.ix_(self.pending, self.multiplied)] @ self.ritz
        unknown = len(self.multiplied) - self.lost.shape[1]
        self.lost = np.pad(self.lost, ((0, 0), (0, unknown)))
        self.restarts += 1

    @property
    def scale(self) -> float:
        """``max|λ|``, as the Ritz values know it."""
        return float(max(abs(self.values[0]), abs(self.values[-1])))

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
        return self._residuals(self.k)

    def _residuals(self, n: int) -> NDArray[np.float64]:
        held: NDArray[np.float64] = np.linalg.norm(self.coupling[:, :n], axis=0)
        gone: NDArray[np.float64] = np.abs(self.lost @ self.ritz[:, :n]).sum(axis=0)
        return held + gone

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
        resolved = self._residuals(self.k + 1)[-1] <= _RESOLVED * gaps[-1]
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
        hidden = self.starts.overlooked(self._small_problem(), last + step, self.accuracy)
        return hidden <= _OVERLOOKED

    def _small_problem(self) -> SmallProblem:
        m, rows = len(self.multiplied), self.multiplied + self.pending
        known = np.zeros((len(rows), m + len(self.pending)))
        known[:m, :m], known[m:, m:] = self.ritz, np.eye(len(self.pending))
        first = known[[rows.index(j) for j in self.first]]
        return SmallProblem(self.values, first, self.coupling)

    @property
    def crowded(self) -> NDArray[np.float64]:
        """Those of the top k Ritz values that are so close to the one above that a third may hide.

        Only a third that would be among the top k itself matters.
        """
        above = self.values[: max(1, self.k - 1)]
        width = max(_CROWDED * self.residuals.max(), 50 * self.epsilon * self.scale)
        close: NDArray[np.float64] = above[1:][-np.diff(above) <= width]
        return close

    def make_room(self, steps: int) -> None:
        """Restarts if there is no room for ``steps`` more rows: the best Ritz vectors stay."""
        if self.count + steps <= self.max_rows or self.max_rows == self.size:
            return
        # Pending rows that an invariant subspace left behind carry nothing; of the others the
        # strongest stay, as many as leave room for the k Ritz vectors, and always the newest,
        # with which a search goes on.
        strength = np.abs(self.coupling).max(axis=1)
        strength[-1] = np.inf
        useful = int((strength > self.epsilon * self.scale).sum())
        stay = max(1, min(useful, self.max_rows - steps - self.k))
        keep = min(self.max_rows - steps - stay, (self.k + self.max_rows) // 2)
        keep = max(self.k, min(keep, len(self.multiplied)))
        kept = self._kept(keep)
        ranked = np.argsort(-strength, kind="stable")
        staying, leaving = np.sort(ranked[:stay]), ranked[stay:]
        self.starts.restarts.append((self._small_problem(), staying))
        rotation = np.zeros((keep + stay, self.count))
        rotation[:keep, self.multiplied] = self.ritz[:, kept].T
        rotation[keep + np.arange(stay), np.array(self.pending)[staying]] = 1.0
        self.rows.rotate_(rotation)
        arrow = np.zeros((self.max_rows, self.max_rows))
        arrow[range(keep), range(keep)] = self.values[kept]
        arrow[keep : keep + stay, :keep] = self.coupling[np.ix_(staying, kept)]
        self.projected.copy_(torch.from_numpy(arrow))
        lost = np.concatenate([self.lost @ self.ritz, self.coupling[leaving]])[:, kept]
        self.lost = lost[np.abs(lost).max(axis=1) > self.epsilon * self.scale]
        self.multiplied = list(range(keep))
        self.pending = list(range(keep, keep + stay))
        self.first = list(self.pending)
        self.count = keep + stay

    @property
    def _beyond(self) -> NDArray[np.bool_]:
        """Which Ritz values are a negative end that is larger than all that is wanted."""
        beyond: NDArray[np.bool_] = self.values < -np.abs(self.values[: self.k]).max()
        return beyond

    def _kept(self, count: int) -> NDArray[np.intp]:
        """Which Ritz vectors stay: the top, and of a negative end that is larger half as many.

        Without these each restart would have to find that end again before it sees the top.
        """
        ends = min(int(self._beyond.sum()), (count - self.k + 1) // 2)
        order = np.arange(len(self.values))
        return np.concatenate([order[: count - ends], order[len(order) - ends :]])

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
        for _ in range(self._possible(steps)):
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
        found = self._beyond & (self._residuals(len(self.values)) <= self.accuracy)
        lowest = self.values[~found][-1]
        spread = max(below - lowest, self.epsilon * self.scale)
        height = max(hidden - below, self.epsilon * self.scale)
        growth = math.acosh(1 + 2 * height / spread)
        degree = math.log(2 * math.sqrt(self.size) / _MISS_PROBABILITY) / growth
        length = max(2, math.ceil(degree) + 1)
        return length if height > _HARDLY * self.accuracy else min(length, _LONGEST_SEARCH)

    def pairs(self) -> tuple[EigenBasis, EigenBasis]:
        """Returns the top k Ritz pairs, and the next one as the guard. The rows are used up."""
        k, n = self.k, min(self.k + 1, len(self.multiplied))
        residuals = self._residuals(n)
        rotation = np.zeros((n, self.count))
        rotation[:, self.multiplied] = self.ritz[:, :n].T
        self.rows.rotate_(rotation)
        vectors, guard = self.rows.head, self.rows.tail[: n - k].clone()
        del self.rows
        orthonormalise_(vectors)
        values, reached = (torch.from_numpy(a[:n]).to(vectors) for a in (self.values, residuals))
        return (
            EigenBasis(values[:k], vectors, reached[:k]),
            EigenBasis(values[k:], guard, reached[k:]),
        )


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
    )
    cycle = max(2, k // 4)
    solver.extend(k + cycle)
    while not (accurate := solver.converged(max_angle)) or not solver.complete:
        if accurate and not solver.exhausted:
            if not len(solver.crowded):
                break
            grown, noticed = solver.search(), solver.accuracy
            accurate = solver.converged(max_angle) and not solver.exhausted
            if accurate and grown <= noticed:
                break
        if solver.exhausted:
            accurate = solver.complete
            break
        solver.extend(cycle)

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
        solver.restarts,
        converged,
        guard,
        lowest,
        solver.mean,
        solver.asymmetry,
    )
