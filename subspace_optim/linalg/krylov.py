r"""``Krylov``: the Krylov space of a symmetric matrix, row by row, and its restarts.

With orthonormal rows ``Q`` and ``T = Q H Qᵀ``, an eigenpair ``(θ, y)`` of the small ``T`` gives the
Ritz pair ``(θ, Qᵀy)`` of ``H``, and all that ``H Qᵀy − θ Qᵀy`` can hold lies outside the span of
``Q``. When the rows fill the memory that they are allowed, the best Ritz vectors replace them and
the next direction is kept (Wu & Simon 2000).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._progress import Progress
from subspace_optim._validation import NonFiniteError
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.products import not_finite
from subspace_optim.linalg.rows import column_blocks, norm, orthonormalise_
from subspace_optim.linalg.start_vectors import SmallProblem, StartVectors

START = 2
"""Random vectors that a solve starts from."""
_SMALL = 256
"""Up to this size, and up to 4k + 12, all rows are kept: they take little memory, and end in exact
pairs."""
_LARGE = 1 << 12
"""From this size on, random vectors are nearly orthogonal to the few rows that there are."""


def _perhaps(condition: Tensor, inner: InnerProduct) -> bool:
    """Whether a condition may hold; it is looked up where that costs less than to act as if.

    That is where it does not wait for a device, or where what is done is summed over ranks.
    """
    waits = condition.device.type != "cpu" and type(inner) is InnerProduct
    return waits or bool(condition)


class KrylovRows:
    """Orthonormal rows, held in two blocks so that the first becomes the result without a copy.

    Args:
        k: rows of the first block.
        rows: of both.
        size: P.
        dtype: of the rows.
        device: of the rows.
        inner: completes sums over coordinates.
    """

    def __init__(
        self,
        k: int,
        rows: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        inner: InnerProduct = WHOLE,
    ):
        self._inner, here = inner, inner.here(size)
        self.head = torch.empty(k, here, dtype=dtype, device=device)
        self.tail = torch.empty(rows - k, here, dtype=dtype, device=device)

    def __getitem__(self, j: int) -> Tensor:
        k = len(self.head)
        return self.head[j] if j < k else self.tail[j - k]

    def several(self, numbers: list[int]) -> Tensor:
        """Returns some rows as one tensor: no copy where they lie side by side."""
        first, end = numbers[0], numbers[0] + len(numbers)
        blocks = [rows for rows in self._blocks(first, end) if len(rows)]
        if numbers == list(range(first, end)) and len(blocks) == 1:
            return blocks[0]
        return torch.stack([self[j] for j in numbers])

    def share_memory_with(self, tensor: Tensor) -> bool:
        """Whether to write to ``tensor`` would change a row."""
        own = {rows.untyped_storage().data_ptr() for rows in (self.head, self.tail)}
        return tensor.untyped_storage().data_ptr() in own

    def _blocks(self, first: int, end: int) -> list[Tensor]:
        """Returns the rows from ``first`` to ``end`` in their two blocks; one may be empty."""
        k = len(self.head)
        return [self.head[first:end], self.tail[max(first - k, 0) : max(end - k, 0)]]

    def project_out_(self, v: Tensor, first: int, end: int) -> Tensor:
        """Subtracts from ``v`` its part in the rows from ``first`` to ``end``, in place.

        Returns:
            What it was, ``⟨q_j, v⟩`` of these rows.
        """
        blocks = [rows for rows in self._blocks(first, end) if len(rows)]
        if not blocks:
            return v.new_zeros(0)
        parts = self._inner.sum(torch.cat([rows @ v for rows in blocks]))
        for rows, part in zip(blocks, parts.split([len(rows) for rows in blocks]), strict=True):
            v.addmv_(rows.T, part, alpha=-1)
        return parts

    def rotate_(self, rotation: NDArray[np.float64]) -> None:
        """Replaces the first ``n`` rows by ``p`` combinations of them; ``rotation`` is ``(p, n)``.

        In place, some columns at a time: a restart allocates no vector.
        """
        k, (p, n) = len(self.head), rotation.shape
        weights = torch.from_numpy(rotation.copy()).to(self.head)
        blocks = self._blocks(0, n)
        parts = weights.split([len(rows) for rows in blocks], dim=1)
        for columns in column_blocks(self.head.shape[1]):
            rotated = parts[0] @ blocks[0][:, columns]
            if len(blocks[1]):
                rotated.addmm_(parts[1], blocks[1][:, columns])
            self.head[:p, columns] = rotated[:k]
            self.tail[: max(p - k, 0), columns] = rotated[k:]


class Krylov:
    """The rows of one eigensolve, the products with them, and the Ritz pairs.

    Rows are *multiplied* (their product was taken) or *pending*. Every product is expanded in all
    rows, and what remains outside becomes a new pending row, so that with the rows ``Q`` split
    into ``M`` and ``D``

        H Q_M = Q_M T_MM + Q_D T_DM:

    the residual of a Ritz pair ``(θ, y)`` of ``T_MM`` is ``‖T_DM y‖``. One pending row is the
    classic Lanczos recurrence; several are a band (Ruhe 1979).

    Args:
        known: orthonormal rows to begin with, in the place of random ones; fewer than ``START``.
        inner: completes sums over coordinates. Three of them are taken for each product, and all
            else follows from what they give.
    """

    def __init__(
        self,
        matmat: Callable[[Tensor], Tensor],
        size: int,
        k: int,
        *,
        max_products: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        known: Tensor | None = None,
        inner: InnerProduct = WHOLE,
    ):
        self.matmat, self.size, self.k, self.inner = matmat, size, k, inner
        self.max_products = max(max_products, k)  # without k products there are no k pairs
        self.max_rows = size if size <= max(_SMALL, 4 * k + 12) else 2 * k + 6
        self.rows = KrylovRows(k, self.max_rows, size, dtype, device, inner)
        self.projected = torch.zeros(self.max_rows, self.max_rows, dtype=dtype, device=device)
        self.generator = torch.Generator(device=device).manual_seed(inner.seed(seed))
        self.epsilon = torch.finfo(dtype).eps
        self.longest = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0
        self.multiplied: list[int] = []
        self.pending: list[int] = []
        # Directions that a restart had no room for: their part in the product of each Ritz row.
        self.lost: NDArray[np.float64] = np.zeros((0, 0))
        self.products = 0
        self.ritz_steps = 0
        self.progress = Progress(f"top {k} eigenpairs", "products", estimated=True)
        self.foreseen = min(size, 2 * k + 6)  # products in all, as a first guess
        self.relative_residual: float | None = None
        self.asymmetry = 0.0
        # Of each pending row, the first one whose product has a part in it.
        self.since: dict[int, int] = {}
        for row in () if known is None else known:
            self._add_row(row, 1.0, self.count)
        begun = self.count
        for _ in range(min(START, size) - begun):
            self.add_random_row()
        self.starts = StartVectors(size, self.epsilon)
        self.first = self.pending[begun:]  # random rows, or those that a restart began with

    @property
    def complete(self) -> bool:
        """All of the space was multiplied: the Ritz pairs are the eigenpairs."""
        return len(self.multiplied) == self.size

    def _random(self) -> Tensor:
        """Returns a random direction outside the rows, of length 1."""
        v = torch.randn(
            self.inner.here(self.size),
            generator=self.generator,
            dtype=self.projected.dtype,
            device=self.projected.device,
        )
        for _ in range(1 if self.size >= _LARGE else 2):
            self.rows.project_out_(v, 0, self.count)
        return v.div_(norm(v, self.inner))

    def _add_row(self, v: Tensor, length: Tensor | float, since: int) -> None:
        """Adds ``v`` over its length to the pending rows."""
        torch.div(v, length, out=self.rows[self.count])
        self.pending.append(self.count)
        self.since[self.count] = since
        self.count += 1

    def add_random_row(self) -> None:
        """Adds a random direction outside the rows to the pending ones."""
        self._add_row(self._random(), 1.0, self.count)

    def multiply(self, block: list[int]) -> None:
        """Takes the products with some pending rows, and adds what remains of each as a new one.

        No value leaves the device, unless that is the host. A remainder that is no more than
        rounding is replaced by a random direction: an invariant subspace is then complete, and the
        search goes on outside.
        """
        products = self.matmat(self.rows.several(block)).contiguous()
        if self.rows.share_memory_with(products):
            products = products.clone()
        for j, product in zip(block, products, strict=True):
            self._expand(j, product)
        self.progress.tick(self.products, self.foreseen, self.relative_residual)

    def _expand(self, j: int, w: Tensor) -> None:
        """Expands the product ``w`` with row ``j`` in all rows; what remains is a new row.

        In two passes. A symmetric matrix has parts in the rows of its recurrence alone: those that
        are pending, and those that were multiplied since ``j`` was found. The first pass is over
        these few, and what it leaves in any row is so little that the second is enough (Giraud et
        al. 2005).
        """
        n = self.count
        # A direction that a restart has lost was in none of the rows that are beside the kept ones.
        recurrence = 0 if len(self.lost) else min(self.since[j], *self.pending)
        self.products += 1
        self.pending.remove(j)
        self.multiplied.append(j)
        for other in self.pending:
            self.since[other] = min(self.since[other], j)
        column = self.projected[:n, j]
        column[recurrence:] = self.rows.project_out_(w, recurrence, n)
        again = self.rows.project_out_(w, 0, n)
        column += again
        if n == self.size:
            return
        # Beside the largest product so far: that of a row in the kernel is rounding altogether.
        self.longest = torch.maximum(self.longest, norm(column))
        length = coupling = norm(w, self.inner)
        broke_down = length <= 4 * self.epsilon * self.longest
        if _perhaps(broke_down, self.inner):
            w = torch.where(broke_down, self._random(), w)
            length = torch.where(broke_down, 1.0, length)
            coupling = torch.where(broke_down, 0.0, coupling)
        self._add_row(w, length, j)
        self.projected[n, j] = coupling

    def extend(self, steps: int) -> None:
        """Takes ``steps`` products, the oldest pending row first, and solves the small problem."""
        self.make_room(steps)
        steps = self.possible(steps)
        while steps > 0:
            block = self.pending[: min(START, steps)]
            self.multiply(block)
            steps -= len(block)
        self.rayleigh_ritz()

    def possible(self, steps: int) -> int:
        """Returns how many of ``steps`` products the space and the limit allow."""
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
        if self.ritz_steps == 0:  # zᵀHz of random unit vectors has the mean tr H / P
            self.mean = float(np.diagonal(projected)[:START].mean())
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
        self.ritz_steps += 1

    @property
    def scale(self) -> float:
        """``max|λ|``, as the Ritz values know it."""
        return float(max(abs(self.values[0]), abs(self.values[-1])))

    def residuals_of(self, n: int) -> NDArray[np.float64]:
        """``‖Hv − θv‖`` of the top n Ritz pairs; an upper bound where a direction was lost."""
        held: NDArray[np.float64] = np.linalg.norm(self.coupling[:, :n], axis=0)
        gone: NDArray[np.float64] = np.abs(self.lost @ self.ritz[:, :n]).sum(axis=0)
        return held + gone

    def small_problem(self) -> SmallProblem:
        """Returns what is known of the matrix in the rows."""
        m, rows = len(self.multiplied), self.multiplied + self.pending
        known = np.zeros((len(rows), m + len(self.pending)))
        known[:m, :m], known[m:, m:] = self.ritz, np.eye(len(self.pending))
        first = known[[rows.index(j) for j in self.first]]
        return SmallProblem(self.values, first, self.coupling)

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
        self.starts.restarts.append((self.small_problem(), staying))
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
        self.since = dict.fromkeys(self.pending, 0)
        self.first = list(self.pending)
        self.count = keep + stay

    @property
    def beyond(self) -> NDArray[np.bool_]:
        """Which Ritz values are a negative end that is larger than all that is wanted."""
        beyond: NDArray[np.bool_] = self.values < -np.abs(self.values[: self.k]).max()
        return beyond

    def _kept(self, count: int) -> NDArray[np.intp]:
        """Which Ritz vectors stay: the top, and of a negative end that is larger half as many.

        Without these each restart would have to find that end again before it sees the top.
        """
        ends = min(int(self.beyond.sum()), (count - self.k + 1) // 2)
        order = np.arange(len(self.values))
        return np.concatenate([order[: count - ends], order[len(order) - ends :]])

    def pairs(self) -> tuple[EigenBasis, EigenBasis]:
        """Returns the top k Ritz pairs, and the next one as the guard. The rows are used up."""
        k, n = self.k, min(self.k + 1, len(self.multiplied))
        residuals = self.residuals_of(n)
        rotation = np.zeros((n, self.count))
        rotation[:, self.multiplied] = self.ritz[:, :n].T
        self.rows.rotate_(rotation)
        vectors, guard = self.rows.head, self.rows.tail[: n - k].clone()
        del self.rows
        orthonormalise_(vectors, self.inner)
        values, reached = (torch.from_numpy(a[:n]).to(vectors) for a in (self.values, residuals))
        return (
            EigenBasis(values[:k], vectors, reached[:k], self.inner),
            EigenBasis(values[k:], guard, reached[k:], self.inner),
        )
