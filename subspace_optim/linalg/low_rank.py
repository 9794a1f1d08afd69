"""``LowRankCurvature``: a symmetric matrix as a sum of rank-one terms, as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subspace_optim._display import numbers
from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.linalg.eigenbasis import ALL, EigenBasis
from subspace_optim.linalg.products import own_precision
from subspace_optim.linalg.rows import GRAM_DIGITS, column_blocks, exact_gram, orthonormalise_


@dataclass(frozen=True, eq=False)
class LowRankCurvature:
    r"""The terms ``(λ_k, v_k)`` of a matrix of rank at most C.

    .. math:: H = \sum_{k=1}^C \lambda_k v_k v_k^\top

    (`class_gradient_2020`, eq. 11). The ``v_k`` are not orthogonal: ``λ_k`` and ``v_k`` are no
    eigenpairs of ``H``, and ``Σ_k v_k v_kᵀ`` is no projector, so there is no ``project``;
    ``orthogonalised()`` has one. It is a value: nothing changes it after it was made.

    Attributes:
        eigenvalues: ``(C,)``, the ``λ_k`` in the order of the classes.
        vectors: ``(C, P)``, one ``v_k`` a row, of norm 1, or zero for a term that is not there.
            Of a model that is sharded, the coordinates that lie on this rank.
        inner: completes sums over coordinates.

    Raises:
        ArgumentError: the shapes do not belong together.
    """

    eigenvalues: Tensor
    vectors: Tensor
    inner: InnerProduct = WHOLE

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2:
            raise ArgumentError("vectors", tuple(self.vectors.shape), "of shape (C, P)")
        shape = tuple(self.eigenvalues.shape)
        if shape != (self.k,):
            allowed = f"({self.k},), one value a vector"
            raise ArgumentError("the shape of eigenvalues", shape, allowed)

    def __repr__(self) -> str:
        values = numbers(self.eigenvalues)
        return f"LowRankCurvature(k={self.k}, P={self.size:,}, eigenvalues={values})"

    @property
    def k(self) -> int:
        """C, the number of terms."""
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
        """The largest ``λ_k`` of the terms that are there; 0 without any."""
        there = self.inner.sum(torch.linalg.vector_norm(self.vectors, dim=1)) > 0
        return float(torch.where(there, self.eigenvalues, 0.0).max()) if self.k else 0.0

    @own_precision
    def coefficients(self, v: Tensor) -> Tensor:
        """Returns ``⟨v_k, v⟩``: ``(C,)`` for ``v`` of shape ``(P,)``, ``(j, C)`` for ``(j, P)``."""
        return self.inner.sum(v.to(self.dtype) @ self.vectors.T)

    @own_precision
    def add_to(
        self, out: Tensor, coefficients: Tensor, *, alpha: float = 1, columns: slice = ALL
    ) -> Tensor:
        """Adds ``α Σ c_k v_k`` to ``out: (P,)``, as ``EigenBasis.add_to`` does."""
        return out.addmv_(self.vectors[:, columns].T, coefficients, alpha=alpha)

    @own_precision
    def orthogonalised(self) -> EigenBasis:
        r"""Returns the eigenpairs of ``H`` that do not vanish, by its C×C Gram problem.

        .. math::
            A = \mathrm{diag}(\sqrt{\lambda}) V, \qquad A A^\top w_i = \mu_i w_i
            \quad\Longrightarrow\quad H u_i = \mu_i u_i, \quad u_i = A^\top w_i / \sqrt{\mu_i}

        It does not depend on the order of the terms, as Gram-Schmidt would. The Gram matrix is
        summed up in float64, and the rows are made orthonormal once more if those of small ``μ_i``
        have lost digits. Pairs with ``μ_i ≤ ε μ_1`` (ε of the dtype) are dropped: rounding
        may have made them.

        Returns:
            ``r ≤ C`` pairs, descending, with residuals 0; none for ``H = 0``.

        Raises:
            ArgumentError: a ``λ_k`` is negative, or something is not finite.
        """
        weights = self.eigenvalues.double()
        gram, roots = exact_gram(self.vectors, self.inner).cpu(), weights.sqrt().cpu()
        if not (gram.isfinite().all() and roots.isfinite().all()):
            found = self.eigenvalues.tolist()
            raise ArgumentError("eigenvalues", found, "at least 0 and finite, as the vectors")
        values, combinations = torch.linalg.eigh(roots[:, None] * gram * roots)
        values, combinations = values.flip(0), combinations.T.flip(0)
        epsilon = torch.finfo(self.dtype).eps
        kept = values > max(epsilon, self.k * GRAM_DIGITS) * values[:1].clamp(min=0)
        values, combinations = values[kept], combinations[kept]
        combinations = (combinations * roots / values.sqrt()[:, None]).to(self.device)
        vectors = self.vectors.new_empty(len(values), self.vectors.shape[1])
        for columns in column_blocks(vectors.shape[1]):
            vectors[:, columns] = (combinations @ self.vectors[:, columns].double()).to(self.dtype)
        # Rounding of the Gram matrix makes rows that are not orthogonal by this much.
        if len(vectors) and self.k * GRAM_DIGITS * values[0] > values[-1] * epsilon:
            orthonormalise_(vectors, self.inner)
        eigenvalues = values.to(self.device, self.dtype)
        return EigenBasis(eigenvalues, vectors, torch.zeros_like(eigenvalues), self.inner)
