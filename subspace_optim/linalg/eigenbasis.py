"""``EigenBasis``: k eigenpairs of a symmetric matrix, as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subspace_optim._display import numbers
from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError, check_integer
from subspace_optim.linalg.products import own_precision

ALL = slice(None)
"""Columns: all that lie here."""


@dataclass(frozen=True, eq=False)
class EigenBasis:
    r"""Eigenpairs ``(λ_i, u_i)``, and the projection onto the span of the ``u_i``.

    .. math:: P_k v = \sum_{i=1}^k u_i u_i^\top v, \qquad P_k^\perp v = v - P_k v

    (`song_2024`, Definitions 1 and 2), in the dtype of the vectors, also inside of
    ``torch.autocast``. It is a value: nothing changes it after it was made.

    Attributes:
        eigenvalues: ``(k,)``, descending.
        vectors: ``(k, P)``, one eigenvector a row, orthonormal to a few units in the last place.
            Of a model that is sharded, the coordinates that lie on this rank, as of all vectors
            that it is asked about.
        residuals: ``(k,)``, the norms ``‖H u_i − λ_i u_i‖`` that the solver reached.
        inner: completes sums over coordinates.
        rounding: the sine of the largest angle that rounding has turned the vectors by since the
            solver found them: 0 but for a basis that is, or was, held in fewer bits
            (``linalg.rounded``).

    Raises:
        ArgumentError: the shapes do not belong together.
    """

    eigenvalues: Tensor
    vectors: Tensor
    residuals: Tensor
    inner: InnerProduct = WHOLE
    rounding: float = 0.0

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2:
            raise ArgumentError("vectors", tuple(self.vectors.shape), "of shape (k, P)")
        for name in ("eigenvalues", "residuals"):
            shape = tuple(getattr(self, name).shape)
            if shape != (self.k,):
                raise ArgumentError(
                    f"the shape of {name}", shape, f"({self.k},), one value a vector"
                )

    def __repr__(self) -> str:
        return f"EigenBasis(k={self.k}, P={self.size:,}, eigenvalues={numbers(self.eigenvalues)})"

    @property
    def k(self) -> int:
        """The dimension of the subspace."""
        return self.vectors.shape[0]

    @property
    def size(self) -> int:
        """P, the number of coordinates of a vector."""
        return self.inner.size(self.vectors.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds the vectors."""
        return self.vectors.device

    @cached_property
    def largest(self) -> float:
        """``max|λ_i|``; 0 without any."""
        return float(self.eigenvalues.abs().max()) if self.k else 0.0

    def first(self, k: int) -> EigenBasis:
        """Returns the first ``k`` pairs, those of the largest eigenvalues: views, not copies.

        A ``k`` that is not from 0 to the basis's own raises ``ArgumentError``.
        """
        k = check_integer("k", k, minimum=0, maximum=self.k)
        values, vectors, residuals = (
            each[:k] for each in (self.eigenvalues, self.vectors, self.residuals)
        )
        return EigenBasis(values, vectors, residuals, self.inner, self.rounding)

    @own_precision
    def coefficients(self, v: Tensor) -> Tensor:
        """Returns ``⟨u_i, v⟩``: ``(k,)`` for ``v`` of shape ``(P,)``, ``(j, k)`` for ``(j, P)``."""
        return self.inner.sum(self._overlaps(v))

    def _overlaps(self, v: Tensor) -> Tensor:
        """Returns what the coordinates that lie here add to ``⟨u_i, v⟩``."""
        return v.to(self.dtype) @ self.vectors.T

    @own_precision
    def combine(self, coefficients: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns ``Σ c_i u_i``: ``(P,)`` for coefficients of shape ``(k,)``, else by rows.

        Args:
            coefficients: ``(k,)``, or ``(j, k)``.
            out: where to write it, of the basis's dtype.
        """
        if out is None:
            return coefficients @ self.vectors
        if coefficients.dim() == 1:
            return torch.mv(self.vectors.T, coefficients, out=out)
        return torch.mm(coefficients, self.vectors, out=out)

    @own_precision
    def add_to(
        self, out: Tensor, coefficients: Tensor, *, alpha: float = 1, columns: slice = ALL
    ) -> Tensor:
        """Adds ``α Σ c_i u_i`` to ``out`` and returns that, without memory for another vector.

        Args:
            out: a vector, or rows, of the basis's dtype.
            coefficients: as of ``combine``.
            alpha: α.
            columns: which coordinates ``out`` has, of those that lie here.
        """
        vectors = self.vectors[:, columns]
        if out.dim() == 1:
            return out.addmv_(vectors.T, coefficients, alpha=alpha)
        return out.addmm_(coefficients, vectors, alpha=alpha)

    @own_precision
    def project(self, v: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns ``P_k v``, the dominant component of ``v``: ``(P,)``, or ``(j, P)`` by rows.

        Args:
            v: a vector, or rows.
            out: where to write it, of the basis's dtype; ``v`` itself too. Fresh memory costs
                more than the arithmetic for a vector of millions.
        """
        return self.combine(self.coefficients(v), out=out)

    @own_precision
    def project_out(self, v: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Returns ``P_k^⊥ v = v − P_k v``, the bulk component of ``v``: ``(P,)`` or ``(j, P)``.

        Args:
            v: a vector, or rows.
            out: as in ``project``.
        """
        coefficients = self.coefficients(v)
        if out is None:
            out = v.to(self.dtype, copy=True)
        elif out is not v:
            out.copy_(v)
        return self.add_to(out, coefficients, alpha=-1)
