r"""``ControlVariate``: a cheap symmetric matrix that agrees with a dear one on a few rows.

With orthonormal rows ``V`` and ``O = V (S − H)``, known from one product with each of them,

.. math:: \hat H = S - V^\top O - O^\top V + V^\top (O V^\top) V

has ``V Ĥ = V H``, and on the complement ``S`` has its way. Where the rows span an invariant
subspace of ``H`` it is one of ``Ĥ``. While both matrices change, ``Ĥ`` has the noise of the
*change* of ``S``, and not of ``S``: a control variate, as variance-reduced gradients are made with
(Johnson & Zhang 2013).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subspace_optim._inner_product import WHOLE, InnerProduct
from subspace_optim.linalg.products import own_precision
from subspace_optim.linalg.rows import gram


class ControlVariate:
    """Products with the corrected matrix.

    Args:
        matmat: products with the cheap matrix ``S``.
        rows: ``(j, P)``, orthonormal.
        offset: ``(j, P)``, the products of ``S`` with the rows less those of ``H``.
        inner: completes sums over coordinates.
    """

    def __init__(
        self,
        matmat: Callable[[Tensor], Tensor],
        rows: Tensor,
        offset: Tensor,
        inner: InnerProduct = WHOLE,
    ) -> None:
        self._matmat, self.rows, self.offset, self._inner = matmat, rows, offset, inner
        inside = gram(offset, rows, inner)
        self._inside = ((inside + inside.T) / 2).to(rows)

    @own_precision
    def __call__(self, vectors: Tensor) -> Tensor:
        """Returns the products with the rows of ``vectors: (i, P)``."""
        products = self._matmat(vectors)
        parts = torch.stack([vectors @ self.rows.T, vectors @ self.offset.T])
        along, offset = self._inner.sum(parts)
        products.addmm_(along, self.offset, alpha=-1)
        return products.addmm_(along @ self._inside - offset, self.rows)
