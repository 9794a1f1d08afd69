r"""``RoundedBasis``: eigenpairs whose vectors are held in fewer bits than they are computed with.

To round the rows of ``U`` turns each by a little. What is held, ``R``, is no longer orthonormal,
and spans another subspace; those orthonormal vectors of it that are nearest to ``R``,

.. math:: U' = C R, \qquad C = (R R^\top)^{-1/2},

take a k×k matrix beside it. So the projection is as exact as any other, onto a subspace that is off
by a sine that is known: it is measured where the rows are rounded.

In ``torch.bfloat16``, of 8 significant bits, each entry is off by at most ``2^-8`` of it, and by
``2^-8/√12`` to ``2^-8/√3`` in the mean square: random, so that hardly anything of it is inside of
the subspace. The sine is 0.0017 for entries like normal ones, whatever P, and 0.0023 at most where
many that are not alike share in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Never

import torch
from torch import Tensor

from subspace_optim._display import numbers
from subspace_optim._inner_product import InnerProduct
from subspace_optim._validation import check_integer
from subspace_optim.linalg.eigenbasis import ALL, EigenBasis
from subspace_optim.linalg.products import own_precision
from subspace_optim.linalg.rows import exact_gram

_COLUMNS = 1 << 14
"""Columns that are widened at a time on a CPU: they stay in its cache."""
_PIECES = 16
"""Elsewhere there are so many of these pieces, since each takes calls of the device."""


def stored(basis: EigenBasis, dtype: torch.dtype | None) -> EigenBasis:
    """Returns the basis with vectors that are held in a dtype; itself if they are already.

    Args:
        basis: of either kind.
        dtype: narrower than that of the vectors; ``None``: their own.
    """
    if isinstance(basis, RoundedBasis):
        return basis if basis.rows.dtype == dtype else stored(basis.widened(), dtype)
    return basis if dtype is None or not basis.k else rounded(basis, dtype)


@own_precision
def rounded(basis: EigenBasis, dtype: torch.dtype) -> RoundedBasis:
    """Returns the basis with rounded vectors, and measures by what angle that turns them.

    Args:
        basis: of at least one pair.
        dtype: narrower than that of the vectors.
    """
    rows, inner = basis.vectors.to(dtype), basis.inner
    values = basis.eigenvalues.to(basis.dtype)
    result = RoundedBasis(values, rows, basis.residuals, inner)
    inside = result.coefficients(basis.vectors) @ result.mixing
    outside = torch.zeros(basis.k, basis.k, dtype=torch.float64, device=basis.device)
    for columns, block in result.blocks():
        part = basis.vectors[:, columns] - inside @ block
        outside += part @ part.T
    turned = float(torch.linalg.eigvalsh(inner.sum(outside))[-1].clamp(min=0).sqrt())
    rounding = min(1.0, basis.rounding + turned)
    return RoundedBasis(values, rows, basis.residuals, inner, rounding, result.mixing)


class RoundedBasis(EigenBasis):
    """An ``EigenBasis`` that holds rows ``R`` of a narrow dtype, and the ``C`` of ``C R``.

    It computes in the dtype of the eigenvalues, with the rows widened some columns at a time.
    ``vectors`` makes all of them, anew each time: for what needs them once in a while. Eigenvalues
    and residuals are those of the vectors before they were rounded.

    Args:
        eigenvalues: ``(k,)``, descending, of the dtype to compute in.
        rows: ``(m, P)``, R, on their device.
        residuals: ``(k,)``.
        inner: completes sums over coordinates.
        rounding: as of ``EigenBasis``.
        mixing: ``(k, m)``, C; ``None``: of m = k rows, as above.
    """

    rows: Tensor
    mixing: Tensor

    def __init__(
        self,
        eigenvalues: Tensor,
        rows: Tensor,
        residuals: Tensor,
        inner: InnerProduct,
        rounding: float = 0.0,
        mixing: Tensor | None = None,
    ) -> None:
        if mixing is None:
            values, directions = torch.linalg.eigh(exact_gram(rows, inner).cpu())
            mixing = (directions / values.sqrt()) @ directions.T
        vars(self).update(
            eigenvalues=eigenvalues,
            residuals=residuals,
            inner=inner,
            rounding=rounding,
            rows=rows,
            mixing=mixing.to(eigenvalues),
        )

    def __setattr__(self, name: str, value: object) -> Never:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __repr__(self) -> str:
        values, held = numbers(self.eigenvalues), self.rows.dtype
        return f"EigenBasis(k={self.k}, P={self.size:,}, eigenvalues={values}, held in {held})"

    @property
    def k(self) -> int:
        """The dimension of the subspace."""
        return len(self.mixing)

    @property
    def size(self) -> int:
        """P, the number of coordinates of a vector."""
        return self.inner.size(self.rows.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in, and has the results in."""
        return self.mixing.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds the rows."""
        return self.rows.device

    @property
    def vectors(self) -> Tensor:
        """``(k, P)``, orthonormal rows: new memory each time."""
        return self.combine(torch.eye(self.k, dtype=self.dtype, device=self.device))

    def widened(self) -> EigenBasis:
        """Returns the same pairs with vectors that are held as they are computed with."""
        return EigenBasis(self.eigenvalues, self.vectors, self.residuals, self.inner, self.rounding)

    def first(self, k: int) -> RoundedBasis:
        """Returns the first ``k`` pairs; the rows are shared."""
        k = check_integer("k", k, minimum=0, maximum=self.k)
        values, residuals, mixing = self.eigenvalues[:k], self.residuals[:k], self.mixing[:k]
        return RoundedBasis(values, self.rows, residuals, self.inner, self.rounding, mixing)

    def blocks(self, columns: slice = ALL) -> Iterator[tuple[slice, Tensor]]:
        """Yields the rows, widened, in blocks of columns; each is overwritten by the next.

        Args:
            columns: which of them; those that are yielded count from the first of these.
        """
        rows = self.rows[:, columns]
        size = rows.shape[1]
        width = _COLUMNS if rows.device.type == "cpu" else math.ceil(size / _PIECES)
        memory = self.mixing.new_empty(len(rows), min(width, size))
        for start in range(0, size, max(1, width)):
            piece = rows[:, start : start + width]
            yield (
                slice(start, start + piece.shape[1]),
                memory[:, : piece.shape[1]].copy_(piece),
            )

    def _overlaps(self, v: Tensor) -> Tensor:
        total = self.mixing.new_zeros(*v.shape[:-1], len(self.rows))
        for columns, block in self.blocks():
            total += v[..., columns].to(self.dtype) @ block.T
        return total @ self.mixing.T

    @own_precision
    def combine(self, coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns ``Σ c_i u_i``, as ``EigenBasis.combine`` does."""
        if out is None:
            out = self.mixing.new_empty(*coefficients.shape[:-1], self.rows.shape[1])
        weights = coefficients @ self.mixing
        for columns, block in self.blocks():
            if out.dim() == 1:
                torch.mv(block.T, weights, out=out[columns])
            else:
                torch.mm(weights, block, out=out[:, columns])
        return out

    @own_precision
    def add_to(
        self, out: Tensor, coefficients: Tensor, *, alpha: float = 1, columns: slice = ALL
    ) -> Tensor:
        """Adds ``α Σ c_i u_i`` to ``out``, as ``EigenBasis.add_to`` does."""
        weights = coefficients @ self.mixing
        for part, block in self.blocks(columns):
            if out.dim() == 1:
                out[part].addmv_(block.T, weights, alpha=alpha)
            else:
                out[:, part].addmm_(weights, block, alpha=alpha)
        return out
